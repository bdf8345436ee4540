"""tokens.py: what is written is what is read, damage is named, the order is a pure function."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, in_processes

from formats import files, shards
from formats.shards import TokenReader, read_header
from training import sequences
from training.sequences import (
    Mixture,
    move_to_documents,
    parse_mix,
    permute,
    sequence_starts,
    split_sequence_number,
    training_starts,
)


def llmc_file(path, ids, magic=20240520, version=1, count=None, dtype="<u2"):
    """Write a token file in llm.c's layout, independently of ShardWriter."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(ids).astype(dtype).tobytes())


def mask_file(path, marks, count=None):
    header = np.array([20241121, 1, len(marks) if count is None else count, *[0] * 253], "<i4")
    path.write_bytes(header.tobytes() + bytes(marks))


def planned(folder, counts, **meta):
    """Write the meta.json of a download that is under way: {split: {file: tokens}}."""
    splits = {split: {"tokens": sum(files.values()), "shards": [
        {"file": name, "tokens": count} for name, count in files.items()]}
        for split, files in counts.items()}
    (folder / "meta.json").write_text(json.dumps(
        {"dataset": "x", "tokenizer": "gpt2", "vocab_size": 50257, "splits": splits, **meta}))


def everything(reader):
    return reader.rows(np.array([0]), reader.tokens)[0].tolist()


@pytest.fixture
def ready_made(tmp_path):
    """A folder with ready-made FineWeb shards: two for training, one for validation."""
    llmc_file(tmp_path / "fineweb_train_000001.bin", range(100, 150))
    llmc_file(tmp_path / "fineweb_train_000002.bin", range(200, 230))
    llmc_file(tmp_path / "fineweb_val_000000.bin", range(300, 340))
    return tmp_path


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("vocab_size, dtype, start", [
    (50257, "<u2", (20240520, 1)), (65536, "<u2", (20240520, 1)), (65537, "<u4", (20240801, 7))])
def test_what_is_written_is_what_is_read(tmp_path, vocab_size, dtype, start):
    ids = np.random.default_rng(7).integers(0, vocab_size, 1000)
    ids[:2] = 0, vocab_size - 1
    with shards.ShardWriter(tmp_path, "train", vocab_size, shard_tokens=300) as writer:
        for part in np.split(ids, [1, 5, 290, 310, 950]):
            writer.add(part, size=3 * len(part))
        info = writer.finish()
        writer.publish()
    paths = sorted(tmp_path.iterdir())
    assert [path.name for path in paths] == [f"train_00000{i}.bin" for i in range(4)]
    assert info == {"tokens": 1000, "bytes": 3000, "documents": 0, "shards": [
        {"file": path.name, "tokens": count,
         "sha256": hashlib.sha256(path.read_bytes()[1024:]).hexdigest()}
        for path, count in zip(paths, (300, 300, 300, 100), strict=True)]}
    for path, part in zip(paths, np.split(ids, [300, 600, 900]), strict=True):
        header = np.frombuffer(path.read_bytes()[:1024], "<i4")
        assert header.tolist() == [*start, len(part)] + [0] * 253
        assert np.frombuffer(path.read_bytes()[1024:], dtype).tolist() == part.tolist()

    reader = TokenReader(f"{tmp_path}/", "train")
    assert reader.tokens == 1000 and everything(reader) == ids.tolist()
    starts = np.array([0, 1, 299, 300, 301, 250, 889, 595])  # also across one and two cuts
    for length in (1, 7, 111):
        rows = reader.rows(starts, length)
        assert rows.dtype == np.int64 and rows.shape == (8, length)
        assert rows.tolist() == [ids[start:start + length].tolist() for start in starts]


def test_documents_begin_with_the_end_of_text_token(tmp_path):
    with shards.ShardWriter(tmp_path, "val", 300, shard_tokens=3) as writer:
        writer.add(np.array([1, 2], np.uint8), 2, eot=256)
        writer.add(np.array([3], np.uint8), 1)
        writer.add(np.array([4], np.uint8), 1, eot=256)
        info = writer.finish()
        writer.publish()
    assert (info["tokens"], info["bytes"], info["documents"]) == (6, 4, 2)
    assert [shard["tokens"] for shard in info["shards"]] == [3, 3]
    assert everything_in(tmp_path, "val") == [256, 1, 2, 3, 256, 4]


def everything_in(folder, split):
    return [i for path in sorted(folder.glob(f"{split}_*.bin"))
            for i in np.frombuffer(path.read_bytes()[1024:], "<u2").tolist()]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_no_file_has_its_final_name_before_it_is_published(tmp_path):
    with shards.ShardWriter(tmp_path, "train", 300, shard_tokens=4) as writer:
        writer.add(np.arange(6), 6)
        assert names(tmp_path) == ["train_000000.bin.tmp", "train_000001.bin.tmp"]
        writer.publish()
        assert names(tmp_path) == ["train_000000.bin", "train_000001.bin.tmp"]
        writer.finish()
        assert names(tmp_path) == ["train_000000.bin", "train_000001.bin.tmp"]
        writer.publish()
    assert names(tmp_path) == ["train_000000.bin", "train_000001.bin"]


def in_parts(folder, stops, masked, vocab_size=300):
    """Write 60 tokens in parts of 1 to 5; at each stop go on from the last noted state, which is
    two parts old, with what was written since lying on the disk."""
    rng, state = np.random.default_rng(3), None
    ids, marks = rng.integers(0, vocab_size, 60), rng.integers(0, 2, 60)
    cuts = np.cumsum(rng.integers(1, 6, 60))
    parts = list(zip(*(np.split(row, cuts[cuts < 60]) for row in (ids, marks)), strict=True))
    done, noted = 0, 0
    for stop in [*stops, len(parts)]:
        done = noted
        with shards.ShardWriter(folder, "train", vocab_size, 7, state) as writer:
            for number, (part, marked) in enumerate(parts[done:stop], done):
                if number == stop - 2 < len(parts) - 2:
                    state, noted = json.loads(json.dumps(writer.state())), number
                    if number % 2:
                        writer.publish()
                eot = vocab_size if number % 3 == 0 else None
                writer.add(part, 2 * len(part), eot, marked if masked else None)
            if stop == len(parts):
                info = writer.finish()
                writer.publish()
    return info


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("vocab_size", [300, 70000])
def test_a_writer_that_was_stopped_goes_on(tmp_path, masked, vocab_size):
    (tmp_path / "whole").mkdir()
    whole = in_parts(tmp_path / "whole", [], masked, vocab_size)
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len(files) == len(whole["shards"]) * (1 + masked) > 9
    for i, stops in enumerate(([2], [5], [3, 7, 8], [4, 6, 9, 12, 15], [10], [11, 13])):
        (tmp_path / f"{i}").mkdir()
        assert in_parts(tmp_path / f"{i}", stops, masked, vocab_size) == whole
        assert {path.name: path.read_bytes() for path in (tmp_path / f"{i}").iterdir()} == files
    (tmp_path / "bad").mkdir()
    with shards.ShardWriter(tmp_path / "bad", "train", vocab_size, 7) as writer:
        writer.add(np.arange(3), 3, mask=np.ones(3) if masked else None)
        state = writer.state()
    path = tmp_path / "bad" / f"train_000000.{'mask' if masked else 'bin'}.tmp"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{path.name}: is not what its preparation left.*remove"):
        shards.ShardWriter(tmp_path / "bad", "train", vocab_size, 7, state)


def test_masks_that_are_written_are_read(tmp_path):
    in_parts(tmp_path, [4, 9], masked=True)
    reader, rng = TokenReader(f"{tmp_path}", "train"), np.random.default_rng(3)
    ids, marks = rng.integers(0, 300, 60), rng.integers(0, 2, 60)
    masks, rows = (read(np.array([0]), reader.tokens)[0] for read in (reader.masks, reader.rows))
    documents = rows == 300
    assert rows[~documents].tolist() == ids.tolist()
    assert masks[~documents].tolist() == (marks == 1).tolist() and not masks[documents].any()
    header = np.frombuffer((tmp_path / "train_000000.mask").read_bytes()[:1024], "<i4")
    assert header.tolist() == [20241121, 1, 7, *[0] * 253]
    assert reader.masks(np.array([5]), 20)[0].tolist() == masks[5:25].tolist()
    with pytest.raises(AssertionError, match="for all or none"), \
            shards.ShardWriter(tmp_path, "val", 300, 7) as writer:
        writer.add(np.arange(3), 3)
        writer.add(np.arange(3), 3, mask=np.ones(3))


def test_llm_c_s_ready_made_files_are_read(ready_made):
    train, val = TokenReader(f"{ready_made}", "train"), TokenReader(f"{ready_made}", "val")
    assert everything(train) == [*range(100, 150), *range(200, 230)]
    assert everything(val) == [*range(300, 340)]
    assert train.rows(np.array([48]), 4).tolist() == [[148, 149, 200, 201]]
    assert (train.meta, train.shards, train.bytes_per_token) == (None, [], None)
    for start in (-1, 77):  # never another text than was asked for
        with pytest.raises(AssertionError):
            train.rows(np.array([start]), 4)


def test_uint32_files_are_read(tmp_path):
    llmc_file(tmp_path / "x_train_000000.bin", [70000, 1], 20240801, 7, dtype="<u4")
    assert everything(TokenReader(f"{tmp_path}", "train")) == [70000, 1]


def test_nanogpt_s_headerless_files_are_read(tmp_path):
    for name, ids in (("train", range(3, 903)), ("val", [5, 50256])):
        np.array(ids, "<u2").tofile(tmp_path / f"{name}.bin")
    assert everything(TokenReader(f"{tmp_path}", "train")) == [*range(3, 903)]
    assert everything(TokenReader(f"{tmp_path}", "val")) == [5, 50256]
    (tmp_path / "meta.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match="meta.pkl, and pickles can run code.*prepare.py"):
        TokenReader(f"{tmp_path}", "train")


def test_a_missing_dataset_names_the_command_that_prepares_it(tmp_path):
    for name in (f"{tmp_path}/nowhere", "no_such_dataset"):
        with pytest.raises(ValueError, match=f"python prepare.py --dataset={name}"):
            TokenReader(name, "train")
    for name in ("", ".", ".."):
        with pytest.raises(ValueError, match="give it a name"):
            TokenReader(name, "train")
    assert shards.dataset_folder("mine") == ROOT / "data" / "mine"


def test_a_dataset_without_validation_names_its_file(ready_made):
    (ready_made / "fineweb_val_000000.bin").unlink()
    with pytest.raises(ValueError, match="val.bin: No such file.*prepare"):
        TokenReader(f"{ready_made}", "val")


def test_a_dataset_that_is_not_finished_is_refused(ready_made):
    (ready_made / "UNFINISHED").touch()
    with pytest.raises(ValueError, match="did not finish; run python prepare.py --dataset="):
        TokenReader(f"{ready_made}", "train")


@pytest.mark.parametrize("text, says", [
    ('{"splits": ', "meta.json: damaged"), ("[5]", "meta.json: damaged"), ("7", "damaged"),
    ("\udcff", "meta.json: damaged"), ('{"model": {}}', "is not a dataset's folder")])
def test_a_damaged_meta_json(ready_made, text, says):
    (ready_made / "meta.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=says):
        TokenReader(f"{ready_made}", "train")


def damaged(change):
    """Return what is said of a file of 50 tokens after `change` of its bytes."""
    def of(path):
        llmc_file(path, range(100, 150))
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(ValueError) as error:
            read_header(path)
        assert str(error.value).startswith(f"{path}: ") and "prepare" in str(error.value)
        return str(error.value)

    return of


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "fineweb_train_000001.bin"
    assert "should have 50 tokens and has 40;" in damaged(lambda raw: raw[:-20])(path)
    assert "should have 50 tokens and has 49.5;" in damaged(lambda raw: raw[:-1])(path)
    assert "should have 50 tokens and has 52;" in damaged(lambda raw: raw + b"abcd")(path)
    assert "should have 0 tokens and has 0;" in damaged(lambda raw: raw[:8] + bytes(1016))(path)
    promises = np.array([90], "<i4").tobytes()
    more = damaged(lambda raw: raw[:8] + promises + raw[12:])(path)
    assert "should have 90 tokens and has 50;" in more
    negative = np.array([-50], "<i4").tobytes()
    assert "should have -50" in damaged(lambda raw: raw[:8] + negative + raw[12:])(path)
    assert "magic 7," in damaged(lambda raw: bytes([7, 0, 0, 0]) + raw[4:])(path)
    assert "version 2)" in damaged(lambda raw: raw[:4] + bytes([2, 0, 0, 0]) + raw[8:])(path)
    for size in (0, 3, 1023):
        assert "not a token file" in damaged(lambda raw, size=size: raw[:size])(path)
    path = tmp_path / "train.bin"  # nanoGPT's name: no header is needed, whole tokens are
    assert "should have 3 tokens and has 3.5" in damaged(lambda raw: raw[-7:])(path)
    assert "should have 0 tokens" in damaged(lambda raw: b"")(path)
    assert "should have 50 tokens and has 40" in damaged(lambda raw: raw[:-20])(path)
    with pytest.raises(ValueError, match="nowhere.bin: No such file"):
        read_header(tmp_path / "nowhere.bin")


@pytest.mark.parametrize("opened_before", [True, False])
def test_a_file_that_is_cut_short_after_the_start_is_named(ready_made, opened_before):
    reader = TokenReader(f"{ready_made}", "train")
    if opened_before:
        reader.rows(np.array([60]), 5)
    path = ready_made / "fineweb_train_000002.bin"
    os.truncate(path, 1024 + 2 * 20)
    assert reader.rows(np.array([40]), 30)[0, -1] == 219
    with pytest.raises(ValueError, match="fineweb_train_000002.bin: ends before token 21; it was"):
        reader.rows(np.array([40]), 31)


def test_a_new_reader_sees_new_files(ready_made):
    assert everything(TokenReader(f"{ready_made}", "val")) == [*range(300, 340)]
    llmc_file(ready_made / "aside", range(500, 540))
    os.replace(ready_made / "aside", ready_made / "fineweb_val_000000.bin")
    assert everything(TokenReader(f"{ready_made}", "val")) == [*range(500, 540)]


def test_forked_processes_read_at_once(tmp_path):
    """They share the open files, and so those files' positions."""
    llmc_file(tmp_path / "train_000000.bin", range(60000))
    reader = TokenReader(f"{tmp_path}", "train")
    starts = np.random.default_rng(7).integers(0, 59000, 5000)
    assert reader.rows(starts[:1], 3)[0, 0] == starts[0]

    def read(rank):
        assert (reader.rows(starts, 3)[:, 0] == starts).all()

    assert in_processes(3, read)[0] == [0, 0, 0]


def test_a_corpus_of_very_many_files(tmp_path):
    """More than may be open at a time."""
    for i in range(150):
        llmc_file(tmp_path / f"train_{i:06d}.bin", [i, i + 1000])
    reader = TokenReader(f"{tmp_path}", "train")
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    assert everything(reader) == [i + extra for i in range(150) for extra in (0, 1000)]
    if sys.platform == "linux":
        assert 1 < len(os.listdir("/proc/self/fd")) - before < 70


def test_files_of_two_widths_are_refused(ready_made):
    llmc_file(ready_made / "fineweb_train_000003.bin", [7], 20240801, 7, dtype="<u4")
    with pytest.raises(ValueError, match="train_000003.bin: tokens of 4 bytes, .* before it have"):
        TokenReader(f"{ready_made}", "train")


def test_files_that_changed_since_they_were_prepared_are_refused(ready_made):
    planned(ready_made, {"train": {"fineweb_train_000001.bin": 51}})
    with pytest.raises(ValueError, match="000001.bin: has 50 tokens and meta.json says 51: it has"):
        TokenReader(f"{ready_made}", "train")


# ---------------------------------------------------------------------- loss masks


def test_masks_are_read_beside_the_tokens(ready_made):
    assert TokenReader(f"{ready_made}", "train").masks(np.array([0]), 3) is None
    marks = np.random.default_rng(7).integers(0, 2, 80)
    mask_file(ready_made / "fineweb_train_000001.mask", marks[:50].tolist())
    mask_file(ready_made / "fineweb_train_000002.mask", marks[50:].tolist())
    reader, starts = TokenReader(f"{ready_made}", "train"), np.array([0, 48, 50, 73, 7])
    masks = reader.masks(starts, 7)
    assert masks.dtype == bool
    assert masks.tolist() == [(marks[i:i + 7] == 1).tolist() for i in starts]
    rows, mask = Mixture({f"{ready_made}": 1}, "train", 7).sequences(np.arange(5), seed=3)
    ids = np.array([*range(100, 150), *range(200, 230)])
    assert mask.tolist() == (marks[np.searchsorted(ids, rows)] == 1).tolist()


@pytest.mark.parametrize("change, says", [
    (lambda path: path.unlink(), "fineweb_train_000002.mask: No such file"),
    (lambda path: mask_file(path, [1] * 29), "000002.mask: is for 29 tokens, .*002.bin has 30"),
    (lambda path: mask_file(path, [1] * 29, count=30), "should have 30 tokens and has 29"),
    (lambda path: llmc_file(path, range(30)), "fineweb_train_000002.mask: not a token file"),
], ids=["missing", "short", "cut", "tokens"])
def test_a_mask_that_does_not_fit(ready_made, change, says):
    mask_file(ready_made / "fineweb_train_000001.mask", [1] * 50)
    mask_file(ready_made / "fineweb_train_000002.mask", [1] * 30)
    change(ready_made / "fineweb_train_000002.mask")
    with pytest.raises(ValueError, match=says):
        TokenReader(f"{ready_made}", "train")


# ---------------------------------------------------------------------- files that land


LANDING = {"train": {f"x_train_{i:06d}.bin": count for i, count in enumerate([50, 3, 36, 90])},
           "val": {"x_val_000000.bin": 40}}


def land(folder, *names):
    """Let files of LANDING arrive whole, as a download does; without names all of them."""
    first = 0
    for name, count in [*LANDING["train"].items(), *LANDING["val"].items()]:
        if not names or name in names:
            llmc_file(folder / "aside", range(first, first + count))
            os.replace(folder / "aside", folder / name)
        first += count


def test_by_file_each_block_comes_once_per_epoch_file_after_file(tmp_path):
    planned(tmp_path, LANDING, order="by_file")
    reader = TokenReader(f"{tmp_path}", "train")  # nothing is there yet
    assert (reader.tokens, reader.bytes_per_token) == (179, None)
    blocks, ends = [6, 0, 4, 11], [50, 53, 89, 179]  # of 7 tokens: the second file has none
    starts = training_starts(reader, np.arange(3 * 21), 7, seed=5)
    orders = []
    for epoch in starts.reshape(3, 21):
        parts = np.split(epoch, np.cumsum(blocks)[:-1])
        for part, count, end, size in zip(parts, blocks, ends, LANDING["train"].values(),
                                          strict=True):
            assert len({*part.tolist()}) == count and len({*(part % 7).tolist()}) == (count > 0)
            assert all(end - size <= start <= end - 8 for start in part)  # within its file
        orders.append((parts[0].tolist(), parts[3].tolist()))
    assert orders[0] != orders[1] != orders[2]
    shuffled = np.random.default_rng(3).permutation(3 * 21)
    assert training_starts(reader, shuffled, 7, seed=5).tolist() == starts[shuffled].tolist()
    assert training_starts(reader, np.arange(63), 7, seed=6).tolist() != starts.tolist()
    with pytest.raises(ValueError, match="block_size=90 needs 91 tokens, the train .* has 90"):
        Mixture({f"{tmp_path}": 1}, "train", 90)


def test_a_file_that_is_needed_is_waited_for(tmp_path, monkeypatch, capsys):
    planned(tmp_path, LANDING, order="by_file")
    monkeypatch.setattr(shards, "POLL", 0.01)
    land(tmp_path, "x_train_000000.bin")
    data = Mixture({f"{tmp_path}": 1}, "train", 7)
    first, _ = data.sequences(np.arange(6), seed=5)
    assert first.max() < 50 and capsys.readouterr().err == ""
    late = threading.Timer(0.3, land, [tmp_path, "x_train_000002.bin"])
    late.start()
    second, _ = data.sequences(np.arange(10), seed=5)
    late.join()
    assert capsys.readouterr().err == (f"waiting for {tmp_path / 'x_train_000002.bin'}, which "
                                       "prepare.py is downloading\n")
    land(tmp_path)
    whole, _ = Mixture({f"{tmp_path}": 1}, "train", 7).sequences(np.arange(10), seed=5)
    assert whole.tolist() == second.tolist() and whole[:6].tolist() == first.tolist()


def test_a_file_that_does_not_come_or_is_another(tmp_path, monkeypatch):
    planned(tmp_path, LANDING, order="by_file")
    monkeypatch.setattr(shards, "POLL", 0.01)
    monkeypatch.setattr(shards, "PATIENCE", 0.06)
    data = Mixture({f"{tmp_path}": 1}, "train", 7)
    with pytest.raises(ValueError, match="x_train_000000.bin: not there after 0.001 minutes; run"):
        data.sequences(np.arange(6), seed=5)
    llmc_file(tmp_path / "x_train_000000.bin", range(49))
    with pytest.raises(ValueError, match="has 49 tokens and meta.json says 50"):
        data.sequences(np.arange(6), seed=5)
    land(tmp_path, "x_train_000000.bin")
    llmc_file(tmp_path / "x_train_000002.bin", range(36), 20240801, 7, dtype="<u4")
    with pytest.raises(ValueError, match="x_train_000002.bin: tokens of 4 bytes"):
        data.sequences(np.arange(10), seed=5)
    planned(tmp_path, LANDING, order="sideways")
    with pytest.raises(ValueError, match="order 'sideways', this version knows by_file"):
        TokenReader(f"{tmp_path}", "train")


# ---------------------------------------------------------------------- mixtures


@pytest.mark.parametrize("mix", [
    "a:0.7,b:0.3", "a:0.5,b:0.5", "a:0.999,b:0.001", "a:1,b:2", "a:0.333333333333,b:0.666666666667",
    "a:0.3333,b:0.3333,c:0.3334", "a:0.001,b:0.998,c:0.001", "a:.1,b:.2,c:.3,d:.4",
    "a:0.97,b:0.01,c:0.01,d:0.01", "a:1,b:2,c:3,d:4,e:5,f:6,g:7,h:8"])
def test_after_any_number_of_sequences_each_dataset_has_its_share(mix):
    weights = list(parse_mix(mix, "").values())
    bound = 0.5 if len(weights) == 2 else int(np.ceil(np.log2(len(weights)))) / 2
    for first in (0, 10**12):  # and there is no drift
        places = [split_sequence_number(number, weights) for number in range(first, first + 3000)]
        for which, weight in enumerate(weights):
            own = [(n, index) for n, (its, index) in enumerate(places, first) if its == which]
            indices = [index for _, index in own]
            assert indices == [*range(indices[0], indices[0] + len(own))] if own else True
            assert first or not own or indices[0] == 0
            for n, index in own:  # before sequence n its count is index, after it index + 1
                for count, total in ((index, n), (index + 1, n + 1)):
                    off = abs(count * sum(weights) - total * weight) / sum(weights)
                    assert off < bound or off == bound == 0.5
    shuffled = np.random.default_rng(3).permutation(500).tolist()
    assert [split_sequence_number(n, weights) for n in shuffled] == [
        [split_sequence_number(n, weights) for n in range(500)][n] for n in shuffled]


def test_shares_are_exact():
    assert parse_mix("", "mine") == {"mine": 1}
    assert parse_mix("fineweb:0.7,mytext:0.3", "other") == {"fineweb": 7, "mytext": 3}
    assert parse_mix("a:0.1, b:0.35", "") == {"a": 2, "b": 7}
    assert parse_mix("C:/x:2,b:.5", "") == {"C:/x": 4, "b": 1}


@pytest.mark.parametrize("mix, says", [
    ("a:0.7,b", "'b' is not a dataset and its share above 0"), ("a:0.7,b:-1", "'b:-1' is not"),
    ("a:0,b:1", "'a:0' is not"), ("a:0.0,b:1", "'a:0.0' is not"), ("a:1,", "'' is not"),
    (":1", "':1' is not"), ("a:nan", "'a:nan' is not"), ("a:1e9", "'a:1e9' is not"),
    ("a:1,b:1,a:2", "'a' is in it twice"), ("a:1,x/a:2", "'a' is in it twice")])
def test_a_mix_that_is_none(mix, says):
    with pytest.raises(ValueError, match=f"mix='{mix}': {says}"):
        parse_mix(mix, "")


def test_each_dataset_of_a_mixture_has_its_own_order_and_epochs(tmp_path):
    for name, first in (("a", 0), ("b", 1000), ("c", 2000)):
        (tmp_path / name).mkdir()
        llmc_file(tmp_path / name / "train_000000.bin", range(first, first + 100))
    mask_file(tmp_path / "b" / "train_000000.mask", [0] * 100)
    mix = parse_mix(f"{tmp_path}/a:0.5,{tmp_path}/b:0.3,{tmp_path}/c:0.2", "")
    data = Mixture(mix, "train", 10)
    rows, mask = data.sequences(np.arange(90), seed=5)
    assert rows.shape == (90, 11) and (np.diff(rows) == 1).all()
    assert mask.tolist() == [[row[0] // 1000 != 1] * 11 for row in rows]  # only b's is masked
    assert data.tokens == 300 and data.bytes_per_token is None
    own = [[row[0] % 1000 for row in rows if row[0] // 1000 == which] for which in range(3)]
    assert list(map(len, own)) == [45, 27, 18]
    for starts in own:
        for epoch in range(len(starts) // 9):  # each of nine blocks once
            assert len({start // 10 for start in starts[9 * epoch:9 * epoch + 9]}) == 9
    assert own[0][:9] != own[1][:9] != own[2][:9] != own[0][:9]
    alone, _ = Mixture({f"{tmp_path}/a": 1}, "train", 10).sequences(np.arange(45), seed=5)
    assert alone[:, 0].tolist() == own[0]
    shuffled = np.random.default_rng(3).permutation(90)
    for part in np.split(shuffled, [7, 8, 60]):
        again, marks = data.sequences(part, seed=5)
        assert np.array_equal(again, rows[part]) and np.array_equal(marks, mask[part])


# ---------------------------------------------------------------------- documents


def slowly_aligned(ids, start, block_size, end):
    """Where a sequence moves that begins at `start`, a token at a time; 7 begins a document."""
    for moved in range(start, start + block_size):
        if ids[moved] == 7:
            return moved if moved + block_size + 1 <= end else start
    return start


@pytest.mark.parametrize("by_file", [False, True])
def test_sequences_begin_at_the_first_document_of_their_block(tmp_path, by_file):
    ids = np.random.default_rng(3).integers(0, 13, 140 + 40)
    ids[[128, 168]], ids[[130, 172]] = 0, 7
    llmc_file(tmp_path / "x_train_000000.bin", ids[:140])
    llmc_file(tmp_path / "x_train_000001.bin", ids[140:])
    llmc_file(tmp_path / "x_val_000000.bin", ids[:40])
    if by_file:
        planned(tmp_path, {"train": {"x_train_000000.bin": 140, "x_train_000001.bin": 40},
                           "val": {"x_val_000000.bin": 40}}, order="by_file")
    reader = TokenReader(f"{tmp_path}", "train")
    plain = training_starts(reader, np.arange(200), 11, seed=5)
    plain = np.append(plain, [128, 168])  # at a file's end
    ends = [140 if by_file and start < 140 else 180 for start in plain]
    expected = [slowly_aligned(ids, *of) for of in zip(plain.tolist(), [11] * 202, ends,
                                                       strict=True)]
    assert move_to_documents(reader, plain, 11, 7).tolist() == expected
    moved = sum(a != b for a, b in zip(plain, expected, strict=True))
    stayed = sum(a == b and ids[a] != 7 and 7 in ids[a:a + 11]
                 for a, b in zip(plain, expected, strict=True))
    assert 20 < moved < 180 and stayed  # as there was no room to move
    mask_file(tmp_path / "x_train_000000.mask", (ids[:140] % 2).tolist())
    mask_file(tmp_path / "x_train_000001.mask", (ids[140:] % 2).tolist())
    data = Mixture({f"{tmp_path}": 1}, "train", 11)
    data.document_start = 7
    rows, mask = data.sequences(np.arange(200), seed=5)
    assert rows.tolist() == [ids[start:start + 12].tolist() for start in expected[:200]]
    assert (mask == rows % 2).all()  # the marks move with their tokens
    shuffled = np.random.default_rng(3).permutation(200)  # as ranks ask, and resumed runs
    for part in np.split(shuffled, [7, 8, 60]):
        assert np.array_equal(data.sequences(part, seed=5)[0], rows[part])


# ---------------------------------------------------------------------- small files


def test_write_aside_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "meta.json"
    files.write_atomically(path, "first\r\n\n")
    assert path.read_bytes() == b"first\r\n\n"
    with pytest.raises(UnicodeEncodeError):
        files.write_atomically(path, "half \udcff")
    monkeypatch.setattr(os, "replace", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        files.write_atomically(path, "second")
    assert path.read_bytes() == b"first\r\n\n" and [*tmp_path.iterdir()] == [path]


def test_load_json(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"a": "é"}), encoding="utf-8")
    assert files.read_json(tmp_path / "x.json") == {"a": "é"}
    with pytest.raises(ValueError, match="nowhere.json: No such file"):
        files.read_json(tmp_path / "nowhere.json")


# ---------------------------------------------------------------------- the order


KEYS = [hashlib.blake2b(bytes([i]), digest_size=32).digest() for i in range(3)]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 65, 1000, 12345])
def test_permute_is_a_bijection(n):
    for key in KEYS:
        assert sorted(permute(np.arange(n), n, key).tolist()) == list(range(n))


def test_permute_depends_on_the_key_and_moves_things():
    orders = [permute(np.arange(1000), 1000, key).tolist() for key in KEYS]
    for order in orders:
        assert sum(a == b for a, b in zip(order, range(1000), strict=True)) < 10
        steps = {b - a for a, b in zip(order, order[1:], strict=False)}
        assert len(steps) > 500  # no stride
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert sum(x == y for x, y in zip(orders[a], orders[b], strict=True)) < 10


def test_permute_is_spread_evenly():
    """Where the first element lands, over many keys: every tenth gets its share."""
    landed = [int(permute(np.array([0]), 1000, hashlib.blake2b(
        f"{i}".encode(), digest_size=32).digest())[0]) for i in range(1000)]
    counts = np.bincount(np.array(landed) // 100, minlength=10)
    assert 60 < counts.min() and counts.max() < 140  # 100 expected, standard deviation 9.5


def test_the_order_is_this_one():
    """Golden: resuming an old run, or repeating it, needs this very order."""
    starts = sequence_starts(np.arange(12), tokens=1000, block_size=97, seed=1337)
    assert starts.dtype == np.int64
    assert starts.tolist() == [446, 349, 58, 834, 252, 543, 640, 155, 737, 402, 208, 499]


@pytest.mark.parametrize("block_size", [1, 2, 3, 7, 16])
def test_every_token_but_less_than_two_blocks_once_per_epoch(block_size):
    """Brute force over small corpora, three epochs each."""
    for count in range(block_size + 1, 6 * block_size + 8):
        blocks = max(1, count // block_size - 1)
        starts = sequence_starts(np.arange(3 * blocks), count, block_size, seed=5)
        assert starts.min() >= 0 and starts.max() + block_size + 1 <= count
        for epoch in starts.reshape(3, blocks):
            targets = (epoch[:, None] + 1 + np.arange(block_size)).ravel()
            assert len(set(targets.tolist())) == len(targets)  # each at most once
            assert count - len(targets) < 2 * block_size + 1  # the first token is no target
            assert len({start % block_size for start in epoch.tolist()}) == 1


def test_the_cuts_move_from_epoch_to_epoch():
    blocks = 50 // 7 - 1
    epochs = sequence_starts(np.arange(60 * blocks), 50, 7, seed=5).reshape(60, blocks)
    assert set(epochs.min(axis=1).tolist()) == set(range(7))


def test_the_order_does_not_depend_on_how_it_is_asked_for(monkeypatch):
    asked = dict(tokens=5000, block_size=7, seed=3)
    blocks = 5000 // 7 - 1
    monkeypatch.setattr(sequences, "CHUNK", 64)  # several chunks in an epoch, the last not full
    sequences.starts_of_chunk.cache_clear()
    whole = sequence_starts(np.arange(3 * blocks), **asked)
    for size in (1, 12, 64, 1000):
        parts = [sequence_starts(np.arange(i, min(i + size, 3 * blocks)), **asked)
                 for i in range(0, 3 * blocks, size)]
        assert np.concatenate(parts).tolist() == whole.tolist()
    shuffled = np.random.default_rng(3).permutation(3 * blocks)  # as ranks ask, and resumed runs
    assert sequence_starts(shuffled, **asked).tolist() == whole[shuffled].tolist()
    monkeypatch.setattr(sequences, "CHUNK", 1000)
    sequences.starts_of_chunk.cache_clear()
    assert sequence_starts(np.arange(3 * blocks), **asked).tolist() == whole.tolist()
    sequences.starts_of_chunk.cache_clear()
    assert sorted(whole[:blocks] - whole[:blocks].min()) == list(range(0, 7 * blocks, 7))


def test_another_order_in_another_epoch_and_for_another_seed():
    blocks = 1000 // 7 - 1
    one = sequence_starts(np.arange(3 * blocks), 1000, 7, seed=1) // 7
    two = sequence_starts(np.arange(3 * blocks), 1000, 7, seed=2) // 7
    orders = [*one.reshape(3, blocks), *two.reshape(3, blocks)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).mean() < 0.1


def test_an_iteration_across_the_end_of_an_epoch():
    blocks = 100 // 10 - 1
    last, first = blocks - 2, blocks + 3
    across = sequence_starts(np.arange(last, first), 100, 10, seed=4)
    assert across[:2].tolist() == sequence_starts(np.arange(last, blocks), 100, 10, 4).tolist()
    assert across[2:].tolist() == sequence_starts(np.arange(blocks, first), 100, 10, 4).tolist()
    epochs = sequence_starts(np.arange(2 * blocks), 100, 10, seed=4).reshape(2, blocks)
    assert across.tolist() == [*epochs[0, -2:], *epochs[1, :3]]


def test_a_split_shorter_than_a_sequence_is_refused(ready_made):
    assert sequence_starts(np.arange(3), 8, 7, seed=1).tolist() == [0, 0, 0]
    assert Mixture({f"{ready_made}": 1}, "val", 39).tokens == 40
    with pytest.raises(ValueError, match="block_size=40 needs 41 tokens, the val split of .* 40;"):
        Mixture({f"{ready_made}": 1}, "val", 40)


# ---------------------------------------------------------------------- memory


MEASURE = """
import sys
import numpy as np
from formats.shards import TokenReader
from training.sequences import sequence_starts

reader = TokenReader(sys.argv[1], "train")

def read(iterations):
    for i in iterations:
        rows = reader.rows(sequence_starts(np.arange(64 * i, 64 * i + 64), reader.tokens, 1024, 1),
                           1025)
        assert rows[:, 0].sum() == 64 * 7
    status = open("/proc/self/status").read()  # getrusage counts the parent's memory too
    return int(status.split("VmHWM:")[1].split()[0])

before = read(range(20))
print((read(range(20, 1560)) - before) / 1e3)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured in /proc")
def test_resident_memory_does_not_grow_with_what_was_read(tmp_path):
    """All of a file of 200 MB, in training's order."""
    with open(tmp_path / "x_train_000000.bin", "wb") as file:
        llmc_file(Path(file.name), [])
        file.write(np.array([20240520, 1, 100_000_000, *[0] * 253], "<i4").tobytes())
        for _ in range(100):
            file.write(np.full(1_000_000, 7, "<u2").tobytes())
    done = subprocess.run([sys.executable, "-c", MEASURE, tmp_path], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 8, "MB, of 200 MB that were read"
