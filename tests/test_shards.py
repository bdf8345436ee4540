"""formats/shards.py: what is written is what is read, damage is named, masks, memory."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, in_processes
from token_files import LANDING, land, write_mask_file, write_plan, write_token_file

from formats import shards
from formats.shards import TokenReader, read_header
from training.sequences import Mixture


def all_tokens(reader):
    return reader.rows(np.array([0]), reader.tokens)[0].tolist()


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
    assert reader.tokens == 1000 and all_tokens(reader) == ids.tolist()
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
    assert tokens_of_files(tmp_path, "val") == [256, 1, 2, 3, 256, 4]


def tokens_of_files(folder, split):
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


def write_in_parts(folder, stops, masked, vocab_size=300):
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
    whole = write_in_parts(tmp_path / "whole", [], masked, vocab_size)
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len(files) == len(whole["shards"]) * (1 + masked) > 9
    for i, stops in enumerate(([2], [5], [3, 7, 8], [4, 6, 9, 12, 15], [10], [11, 13])):
        (tmp_path / f"{i}").mkdir()
        assert write_in_parts(tmp_path / f"{i}", stops, masked, vocab_size) == whole
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
    write_in_parts(tmp_path, [4, 9], masked=True)
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
    assert all_tokens(train) == [*range(100, 150), *range(200, 230)]
    assert all_tokens(val) == [*range(300, 340)]
    assert train.rows(np.array([48]), 4).tolist() == [[148, 149, 200, 201]]
    assert (train.meta, train.shards, train.bytes_per_token) == (None, [], None)
    for start in (-1, 77):  # never another text than was asked for
        with pytest.raises(AssertionError):
            train.rows(np.array([start]), 4)


def test_uint32_files_are_read(tmp_path):
    write_token_file(tmp_path / "x_train_000000.bin", [70000, 1], 20240801, 7, dtype="<u4")
    assert all_tokens(TokenReader(f"{tmp_path}", "train")) == [70000, 1]


def test_nanogpt_s_headerless_files_are_read(tmp_path):
    for name, ids in (("train", range(3, 903)), ("val", [5, 50256])):
        np.array(ids, "<u2").tofile(tmp_path / f"{name}.bin")
    assert all_tokens(TokenReader(f"{tmp_path}", "train")) == [*range(3, 903)]
    assert all_tokens(TokenReader(f"{tmp_path}", "val")) == [5, 50256]
    (tmp_path / "meta.pkl").write_bytes(b"")
    for text in ("PATH", f"{tmp_path}/input.txt"):
        command = f"python prepare.py --dataset={tmp_path} --tokenizer=chars --overwrite=True"
        with pytest.raises(ValueError, match=f"meta.pkl, and pickles.*: {command} --input={text}"):
            TokenReader(f"{tmp_path}", "train")
        (tmp_path / "input.txt").write_text("ab")


def test_a_dataset_without_validation_names_its_file(ready_made):
    (ready_made / "fineweb_val_000000.bin").unlink()
    with pytest.raises(ValueError, match="val.bin: No such file.*prepare"):
        TokenReader(f"{ready_made}", "val")


def damaged(change):
    """Return what is said of a file of 50 tokens after `change` of its bytes."""
    def of(path):
        write_token_file(path, range(100, 150))
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
    assert all_tokens(TokenReader(f"{ready_made}", "val")) == [*range(300, 340)]
    write_token_file(ready_made / "aside", range(500, 540))
    os.replace(ready_made / "aside", ready_made / "fineweb_val_000000.bin")
    assert all_tokens(TokenReader(f"{ready_made}", "val")) == [*range(500, 540)]


def test_forked_processes_read_at_once(tmp_path):
    """They share the open files, and so those files' positions."""
    write_token_file(tmp_path / "train_000000.bin", range(60000))
    reader = TokenReader(f"{tmp_path}", "train")
    starts = np.random.default_rng(7).integers(0, 59000, 5000)
    assert reader.rows(starts[:1], 3)[0, 0] == starts[0]

    def read(rank):
        assert (reader.rows(starts, 3)[:, 0] == starts).all()

    assert in_processes(3, read)[0] == [0, 0, 0]


def test_a_corpus_of_very_many_files(tmp_path):
    """More than may be open at a time."""
    for i in range(150):
        write_token_file(tmp_path / f"train_{i:06d}.bin", [i, i + 1000])
    reader = TokenReader(f"{tmp_path}", "train")
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    assert all_tokens(reader) == [i + extra for i in range(150) for extra in (0, 1000)]
    if sys.platform == "linux":
        assert 1 < len(os.listdir("/proc/self/fd")) - before < 70


def test_files_of_two_widths_are_refused(ready_made):
    write_token_file(ready_made / "fineweb_train_000003.bin", [7], 20240801, 7, dtype="<u4")
    with pytest.raises(ValueError, match="train_000003.bin: tokens of 4 bytes, .* before it have"):
        TokenReader(f"{ready_made}", "train")


def test_files_that_changed_since_they_were_prepared_are_refused(ready_made):
    write_plan(ready_made, {"train": {"fineweb_train_000001.bin": 51}})
    with pytest.raises(ValueError, match="000001.bin: has 50 tokens and meta.json says 51: it has"):
        TokenReader(f"{ready_made}", "train")


# ---------------------------------------------------------------------- loss masks


def test_masks_are_read_beside_the_tokens(ready_made):
    assert TokenReader(f"{ready_made}", "train").masks(np.array([0]), 3) is None
    marks = np.random.default_rng(7).integers(0, 2, 80)
    write_mask_file(ready_made / "fineweb_train_000001.mask", marks[:50].tolist())
    write_mask_file(ready_made / "fineweb_train_000002.mask", marks[50:].tolist())
    reader, starts = TokenReader(f"{ready_made}", "train"), np.array([0, 48, 50, 73, 7])
    masks = reader.masks(starts, 7)
    assert masks.dtype == bool
    assert masks.tolist() == [(marks[i:i + 7] == 1).tolist() for i in starts]
    rows, mask = Mixture({f"{ready_made}": 1}, "train", 7).sequences(np.arange(5), seed=3)
    ids = np.array([*range(100, 150), *range(200, 230)])
    assert mask.tolist() == (marks[np.searchsorted(ids, rows)] == 1).tolist()


@pytest.mark.parametrize("change, says", [
    (lambda path: path.unlink(), "fineweb_train_000002.mask: No such file"),
    (lambda path: write_mask_file(path, [1] * 29), "002.mask: is for 29 tokens, .*002.bin has 30"),
    (lambda path: write_mask_file(path, [1] * 29, count=30), "should have 30 tokens and has 29"),
    (lambda path: write_token_file(path, range(30)), "train_000002.mask: not a token file"),
], ids=["missing", "short", "cut", "tokens"])
def test_a_mask_that_does_not_fit(ready_made, change, says):
    write_mask_file(ready_made / "fineweb_train_000001.mask", [1] * 50)
    write_mask_file(ready_made / "fineweb_train_000002.mask", [1] * 30)
    change(ready_made / "fineweb_train_000002.mask")
    with pytest.raises(ValueError, match=says):
        TokenReader(f"{ready_made}", "train")


# ---------------------------------------------------------------------- files that land


def test_a_file_that_does_not_come_or_is_another(tmp_path, monkeypatch):
    write_plan(tmp_path, LANDING, order="by_file")
    monkeypatch.setattr("formats.dataset.POLL", 0.01)
    monkeypatch.setattr("formats.dataset.PATIENCE", 0.06)
    data = Mixture({f"{tmp_path}": 1}, "train", 7)
    with pytest.raises(ValueError, match="x_train_000000.bin: not there after 0.001 minutes; run"):
        data.sequences(np.arange(6), seed=5)
    write_token_file(tmp_path / "x_train_000000.bin", range(49))
    with pytest.raises(ValueError, match="has 49 tokens and meta.json says 50"):
        data.sequences(np.arange(6), seed=5)
    land(tmp_path, "x_train_000000.bin")
    write_token_file(tmp_path / "x_train_000002.bin", range(36), 20240801, 7, dtype="<u4")
    with pytest.raises(ValueError, match="x_train_000002.bin: tokens of 4 bytes"):
        data.sequences(np.arange(10), seed=5)
    write_plan(tmp_path, LANDING, order="sideways")
    with pytest.raises(ValueError, match="order 'sideways', this version knows by_file"):
        TokenReader(f"{tmp_path}", "train")


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
        write_token_file(Path(file.name), [])
        file.write(np.array([20240520, 1, 100_000_000, *[0] * 253], "<i4").tobytes())
        for _ in range(100):
            file.write(np.full(1_000_000, 7, "<u2").tobytes())
    done = subprocess.run([sys.executable, "-c", MEASURE, tmp_path], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 8, "MB, of 200 MB that were read"
