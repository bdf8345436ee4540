"""sample.py: what is drawn, when it stops, how it is printed, prompts and wrong input."""

import io
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch

import sample
from formats.checkpoint import load_model, save_weights
from inference.generate import cast_weights, draw, generate, next_tokens
from model import GPT, GPTConfig
from runtime.processes import Runtime
from sample import newest_run, read_prompt, write_text
from text.tokenizer import Tokenizer

ROOT = Path(sample.__file__).parent
CPU = Runtime(torch.device("cpu"), torch.float32)
V, BLOCK = 11, 7
BYTES = Tokenizer({"kind": "bytes"})  # 257 tokens, the last of them end of text
LETTERS = Tokenizer({"kind": "chars", "alphabet": "\n abcdefgé", "documents": True})  # 11
ONE_TEXT = Tokenizer({"kind": "chars", "alphabet": "abc", "documents": False})  # no end of text


def write_checkpoint(folder, tokenizer, rows=0, seed=1):
    """A tiny model with a vocabulary of `rows` rows, or just the tokenizer's, as train.py does."""
    folder.mkdir(parents=True)
    config = GPTConfig(block_size=BLOCK, vocab_size=rows or tokenizer.vocab_size, n_layer=2,
                       n_head=3, n_embd=21)
    model = GPT(config, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():  # or a token's likeliest successor is itself
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    save_weights(model, folder)
    tokenizer.save(folder)
    (folder / "meta.json").write_text(json.dumps({"model": asdict(config)}))
    return folder


def set_logits(folder, logits):
    """Make a checkpoint's model give these logits whatever it reads."""
    model = load_model(folder)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.zero_()
        model.transformer.ln_f.bias[0] = 1.0
        model.transformer.wte.weight[:, 0] = torch.as_tensor(logits)
    save_weights(model, folder)


@pytest.fixture
def run_dir(tmp_path):
    """out/letters/ with two checkpoints, the better one not the latest."""
    run = tmp_path / "out" / "letters"
    for name, seed in (("iter_000002", 1), ("iter_000003", 2)):
        write_checkpoint(run / name, LETTERS, seed=seed)
    (run / "best").write_text("iter_000002\n")
    (run / "latest").write_text("iter_000003\n")
    return run


def texts(capsys, **settings):
    """Run sample.main; return its samples."""
    settings = {"device": "cpu", "dtype": "float32", "num_samples": 1, "max_new_tokens": 13,
                "start": "abc", **{key: str(value) if isinstance(value, Path) else value
                                   for key, value in settings.items()}}
    sample.main(**settings)
    *samples, rest = capsys.readouterr().out.split("\n---------------\n")
    assert rest == "" and len(samples) == settings["num_samples"]
    return samples


# ---------------------------------------------------------------------- drawing


class Scripted:
    """Stands in for a model: `script(number of the step)` gives the logits; keeps what it saw."""

    def __init__(self, script, block_size=BLOCK):
        self.config = GPTConfig(block_size=block_size)
        self.script, self.seen = script, []

    def make_cache(self, batch_size, dtype):
        return torch.zeros(1, 2, batch_size, 1, self.config.block_size, 1, dtype=dtype)

    def hidden(self, tokens, cache, start):
        self.seen.append((self.seen[-1] if start else []) + tokens[0].tolist())
        assert len(self.seen[-1]) == start + tokens.shape[1]
        return torch.zeros(*tokens.shape, 1)

    def head(self, x):
        return torch.as_tensor(self.script(len(self.seen) - 1), dtype=torch.float32).expand(
            len(x), -1)


def run_scripted(model, ids=(1,), count=5, temperature=0.0, top_k=0, seed=1, tokenizer=LETTERS):
    step = partial(next_tokens, model, tokenizer.vocab_size, temperature, top_k, 1.0, CPU)
    generators = [torch.Generator().manual_seed(seed)]
    return [token for token, in generate(model, step, ids, generators, count, tokenizer.eot, CPU)]


def only(token, size=V):
    return [100.0 if i == token else 0.0 for i in range(size)]


def test_greedy_takes_the_likeliest():
    model = Scripted(lambda step: only([3, 0, 9][step]))
    assert run_scripted(model, count=3) == [3, 0, 9]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_end_of_text_ends_a_sample_and_is_not_given(temperature):
    model = Scripted(lambda step: only([3, 5, LETTERS.eot, 4][step]))
    assert run_scripted(model, count=4, temperature=temperature) == [3, 5]
    no_eot = Scripted(lambda step: only(2, 3))
    assert run_scripted(no_eot, count=4, tokenizer=ONE_TEXT) == [2] * 4


@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, 0), (1.0, 0), (1.0, 200), (5.0, 3)])
def test_ids_that_only_pad_the_vocabulary_are_never_drawn(temperature, top_k):
    logits = [0.0] * 10 + [-100.0] + [50.0] * 6  # 11 tokens, end of text unlikely, 6 of padding
    model = Scripted(lambda step: logits)
    assert max(run_scripted(model, count=50, temperature=temperature, top_k=top_k)) < V - 1


def view(length, prompt, block_size=BLOCK):
    """The rule in a loop: how many of `length` tokens the model sees, after a prompt."""
    seen = min(prompt, block_size)
    for _ in range(length - prompt):
        seen = seen + 1 if seen < block_size else (block_size + 1) // 2
    return seen


@pytest.mark.parametrize("prompt", [1, 5, BLOCK, 10])
def test_what_the_model_sees_is_a_block_of_which_half_is_forgotten_when_it_is_full(prompt):
    model = Scripted(lambda step: only(step % 10))
    whole = list(range(10))[-prompt:] + [n % 10 for n in range(19)]
    assert run_scripted(model, whole[:prompt], count=19) == whole[prompt:]
    assert model.seen == [whole[end - view(end, prompt):end] for end in range(prompt, prompt + 19)]
    assert min(len(seen) for seen in model.seen[BLOCK:]) == (BLOCK + 1) // 2
    for block_size in (1, 2):
        model = Scripted(lambda step: only(step % 10), block_size)
        assert run_scripted(model, count=4) == [0, 1, 2, 3]
        assert [len(seen) for seen in model.seen] == [[1, 1, 1, 1], [1, 2, 1, 2]][block_size - 1]


def random_model(bias=True, seed=1, rows=16):
    """A tiny model whose likeliest token is not the last one; 11 tokens and 5 of padding."""
    model = GPT(GPTConfig(block_size=BLOCK, vocab_size=rows, n_layer=2, n_head=3, n_embd=21,
                          bias=bias), torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model.eval()


def run_model(model, ids, count, seeds, temperature=0.0, compiler=None, runtime=CPU):
    """The new tokens of each sample; without an end of text."""
    step = partial(next_tokens, model, V, temperature, 0, 1.0, runtime)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    steps = generate(model, step, ids, generators, count, None, runtime,
                     compiler and compiler(step))
    return [list(row) for row in zip(*steps, strict=True)]


@torch.no_grad()
def uncached(model, ids, count, seed, temperature):
    ids, prompt, generator = list(ids), len(ids), torch.Generator().manual_seed(seed)
    for _ in range(count):
        seen = torch.tensor([ids[-view(len(ids), prompt):]])
        chance = torch.rand(1, dtype=torch.float64, generator=generator)
        ids.append(int(draw(model.logits(seen)[:, -1, :V], temperature, 0, 1.0, chance)))
    return ids[prompt:]


COMPILERS = {"sliced": None, "fixed": lambda step: step,
             "fixed, traced": lambda step: torch.compile(step, backend="eager", fullgraph=True)}


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("prompt", [1, 5, BLOCK, 11])
@pytest.mark.parametrize("bias", [True, False])
def test_cached_and_batched_sampling_is_uncached_sampling_past_the_block(bias, prompt, temperature,
                                                                         compiler):
    model, ids, count = random_model(bias), [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5][:prompt], 23
    seeds = (1, 2, 3)
    expected = [uncached(model, ids, count, seed, temperature) for seed in seeds]
    assert len(set(expected[0])) > 2 and max(map(max, expected)) < V
    assert (expected[0] == expected[1]) == (temperature == 0)
    run = partial(run_model, model, ids, count, temperature=temperature,
                  compiler=COMPILERS[compiler])
    assert run(seeds) == expected
    assert run(seeds[1:2]) == expected[1:2]


def test_a_sample_that_has_ended_leaves_the_others_as_they_are():
    model = random_model()
    step = partial(next_tokens, model, V, 1.0, 0, 1.0, CPU)

    def run(seeds, eot):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return list(zip(*generate(model, step, [3, 1], generators, 13, eot, CPU), strict=True))

    rows = run((1, 2, 3), None)
    eot = rows[0][4]
    for row, ended in zip(rows, run((1, 2, 3), eot), strict=True):
        end = row.index(eot) if eot in row else 13
        assert ended == row[:end] + (None,) * (len(ended) - end)


def test_bfloat16_sampling_runs_and_its_matrices_are_converted_once():
    runtime = Runtime(torch.device("cpu"), torch.bfloat16)
    model = random_model()
    expected = model.logits(torch.tensor([[3, 1, 4]]))
    cast_weights(model, torch.bfloat16)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert kinds["transformer.wte.weight"] == torch.bfloat16
    assert kinds["transformer.h.0.mlp.c_fc.weight"] == torch.bfloat16
    assert kinds["transformer.wpe.weight"] == kinds["transformer.ln_f.weight"] == torch.float32
    rows = run_model(model, [3, 1], 23, (1, 2), 1.0, runtime=runtime)
    assert len(rows[0]) == 23 and max(map(max, rows)) < V
    with runtime.autocast():
        logits = model.logits(torch.tensor([[3, 1, 4]]))
    torch.testing.assert_close(logits.float(), expected, rtol=0.05, atol=0.3)


def test_an_untied_embedding_stays_float32_and_with_it_the_residual_stream():
    model = GPT(GPTConfig(block_size=BLOCK, vocab_size=V, n_layer=2, n_head=3, n_embd=24, rope=True,
                          rmsnorm=True, tied=False, bias=False)).eval()
    cast_weights(model, torch.bfloat16)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert kinds.pop("transformer.wte.weight") == torch.float32
    assert set(kinds.values()) == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        assert model.hidden(torch.tensor([[3, 1, 4]])).dtype == torch.float32


def draw_one(logits, temperature, top_k, generator, top_p=1.0):
    chance = torch.rand(1, dtype=torch.float64, generator=generator)
    return int(draw(torch.as_tensor(logits)[None], temperature, top_k, top_p, chance))


def frequencies(logits, temperature, top_k, count=2000, top_p=1.0):
    generator = torch.Generator().manual_seed(1)
    drawn = [draw_one(logits, temperature, top_k, generator, top_p) for _ in range(count)]
    return [drawn.count(i) / count for i in range(len(logits))]


@pytest.mark.parametrize(("top_p", "kept"), [
    (1e-9, {1}), (0.39, {1}), (0.41, {1, 3}), (0.69, {1, 3}), (0.71, {1, 2, 3}),
    (0.95, {0, 1, 2, 3}), (1.0, {0, 1, 2, 3})])
def test_top_p_keeps_the_fewest_tokens_that_have_that_probability(top_p, kept):
    shares = [0.1, 0.4, 0.2, 0.3]
    whole = sum(shares[i] for i in kept)
    found = frequencies([math.log(p) for p in shares], 1.0, 0, top_p=top_p)
    assert found == pytest.approx([p / whole * (i in kept) for i, p in enumerate(shares)], abs=0.05)
    assert {i for i, share in enumerate(found) if share} == kept


def test_top_p_is_a_share_of_the_top_k():
    logits = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]
    assert frequencies(logits, 1.0, 2, top_p=0.56) == [0, 1, 0, 0]  # 4/7 of those two
    assert frequencies(logits, 1.0, 2, top_p=0.58)[3] > 0.3


def test_each_chance_takes_its_place_in_the_cumulative_distribution():
    logits = torch.tensor([[math.log(p) for p in (0.25, 0.5, 0.25)] + [-math.inf]]).expand(5, -1)
    chances = torch.tensor([0.0, 0.2, 0.3, 0.7, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, 1.0, 0, 1.0, chances).tolist() == [0, 0, 1, 1, 2]


def test_draw_follows_the_softmax_over_the_top_k():
    logits = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]
    assert frequencies(logits, 1.0, 0) == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=0.05)
    assert frequencies(logits, 1.0, 99) == frequencies(logits, 1.0, 0)
    assert frequencies(logits, 1.0, 2) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.05)
    squares = [0.01, 0.16, 0.04, 0.09]
    assert frequencies(logits, 0.5, 0) == pytest.approx([p / 0.3 for p in squares], abs=0.05)


def test_top_k_takes_exactly_k_of_equals():
    assert sum(share > 0 for share in frequencies([1.0] * 5, 1.0, 2, count=300)) == 2


def test_top_1_is_greedy():
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randint(4, (V,), generator=generator).float()  # with equals
        assert draw_one(logits, 1.0, 1, generator) == draw_one(logits, 0.0, 0, generator)


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-320])
def test_a_tiny_temperature_does_not_overflow(temperature):
    for top_k in (0, 3):
        logits = torch.tensor([-3e4, 3e4, 2.9e4, 0.0])
        assert draw_one(logits, temperature, top_k, torch.Generator().manual_seed(1)) == 1


def test_logits_that_are_not_finite_are_an_error():
    for bad in (math.nan, math.inf):
        model = Scripted(lambda step, bad=bad: [bad] + [0.0] * (V - 1))
        with pytest.raises(ValueError, match="not finite.*training diverged.*--dtype=float32"):
            run_scripted(model)


# ---------------------------------------------------------------------- the whole script


def test_seeds(run_dir, capsys):
    settings = {"out_dir": run_dir, "num_samples": 3, "temperature": 1.0}
    first, again = (texts(capsys, **settings, seed=1) for _ in range(2))
    assert first == again
    assert len(set(first)) == 3
    for batch_size in (1, 2):
        assert texts(capsys, **settings, seed=1, batch_size=batch_size) == first
    other = texts(capsys, **settings, seed=2)
    assert not set(first) & set(other)  # samples 2, 3 of a seed are not samples 1, 2 of the next
    assert all(text.startswith("abc") and len(text) > 3 for text in first + other)


def test_greedy_samples_are_the_argmax_of_the_model(run_dir, capsys):
    model = load_model(run_dir / "iter_000002").eval()
    ids = LETTERS.encode_prompt("abc")
    while len(ids) < 16 and (token := int(model.logits(torch.tensor(
            [ids[-view(len(ids), 3):]]))[0, -1].argmax())) != LETTERS.eot:
        ids.append(token)
    assert len(ids) > BLOCK  # or the test is too easy
    for settings in ({"temperature": 0.0}, {"top_k": 1}, {"temperature": 1e-6}):
        assert texts(capsys, out_dir=run_dir, **settings) == [LETTERS.decode(ids)]


def test_padded_ids_are_never_drawn_from_a_checkpoint(tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "padded", LETTERS, rows=16)
    set_logits(folder, [0.0, 0.0, 0.0, 0.0, 1.0] + [0.0] * 6 + [9.0] * 5)
    assert texts(capsys, init_from=folder, temperature=0.0, start="a") == ["a" + "c" * 13]
    set_logits(folder, [0.0] * 10 + [3.0] + [9.0] * 5)  # end of text, then padding
    assert texts(capsys, init_from=folder, temperature=0.0, start="a") == ["a"]


def test_the_checkpoint_that_is_asked_for(run_dir, capsys):
    settings = {"temperature": 0.0}
    best = texts(capsys, init_from=run_dir / "iter_000002", **settings)
    latest = texts(capsys, init_from=run_dir / "iter_000003", **settings)
    assert best != latest
    assert texts(capsys, out_dir=run_dir, **settings) == best
    assert texts(capsys, out_dir=run_dir, checkpoint="latest", **settings) == latest
    assert texts(capsys, init_from=run_dir, checkpoint="latest", **settings) == latest
    with pytest.raises(ValueError, match="checkpoint='last': choose best or latest.*--init_from="):
        texts(capsys, out_dir=run_dir, checkpoint="last")


def test_without_a_name_the_newest_run_is_taken(run_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    older = tmp_path / "out" / "older"
    write_checkpoint(older / "iter_000005", LETTERS, seed=3)
    (older / "latest").write_text("iter_000005\n")
    for run, time in ((run_dir, 2000), (older, 1000)):
        os.utime(run / "latest", (time, time))
    assert newest_run(Path("out")) == Path("out/letters")
    assert texts(capsys, temperature=0.0) == texts(capsys, out_dir=run_dir, temperature=0.0)
    os.utime(older / "latest", (3000, 3000))
    assert newest_run(Path("out")) == Path("out/older")
    assert newest_run(older) == older


def test_a_folder_whose_name_begins_like_gpt2s_is_a_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "gpt2-mine", LETTERS)
    assert texts(capsys, init_from="gpt2-mine")[0].startswith("abc")
    with pytest.raises(ValueError, match="gpt2-yours: neither a folder nor one of gpt2, gpt2-med"):
        texts(capsys, init_from="gpt2-yours")


# ---------------------------------------------------------------------- prompts


def test_prompts_from_a_file_and_from_standard_input(tmp_path, run_dir, capsys, monkeypatch):
    (tmp_path / "prompt.txt").write_text("gé\n", encoding="utf-8")
    start = f"FILE:{tmp_path / 'prompt.txt'}"
    assert read_prompt(start) == "gé\n"
    assert texts(capsys, out_dir=run_dir, start=start)[0].startswith("gé\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("fé".encode()), "ascii"))
    assert texts(capsys, out_dir=run_dir, start="-")[0].startswith("fé")
    assert read_prompt("-x") == "-x"


def test_prompts_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "latin").write_bytes(b"\xe9")
    for name, reason in (("none", "No such file"), ("latin", "0xe9"), ("", "directory")):
        with pytest.raises(ValueError, match=f"start='FILE:.*cannot be read as UTF-8.*{reason}"):
            read_prompt(f"FILE:{tmp_path / name}")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xe9"), "latin-1"))
    with pytest.raises(ValueError, match="start='-': cannot be read as UTF-8.*0xe9"):
        read_prompt("-")


def test_an_empty_prompt_begins_at_end_of_text_where_there_is_one(run_dir, tmp_path, capsys):
    token = texts(capsys, out_dir=run_dir, start="<|endoftext|>", temperature=0.0)[0]
    empty = texts(capsys, out_dir=run_dir, start="", temperature=0.0)[0]
    assert token.startswith("<|endoftext|>")
    assert token.removeprefix("<|endoftext|>") == empty.removeprefix("<|endoftext|>") != ""
    folder = write_checkpoint(tmp_path / "one_text", ONE_TEXT)
    assert len(texts(capsys, init_from=folder, start="a")[0]) == 14
    with pytest.raises(ValueError, match="start='': this model has no token to begin with"):
        texts(capsys, init_from=folder, start="")


# ---------------------------------------------------------------------- printing


def test_a_character_of_several_tokens_is_printed_whole(capsys):
    text = "aé€😀"
    ids = BYTES.encode(text).tolist()
    write_text(BYTES, ids[:2], iter(ids[2:]))  # the prompt ends inside é
    assert capsys.readouterr().out == text + "\n"
    write_text(BYTES, ids[:1], iter(ids[1:-1]))  # 😀 is cut short
    assert capsys.readouterr().out == "aé€\N{REPLACEMENT CHARACTER}\n"


def test_text_is_printed_as_it_comes(monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "utf-8"))

    def new_ids():
        assert printed.getvalue() == b"a"
        yield ord("b")
        assert printed.getvalue() == b"ab"
        yield ord("c")
        assert printed.getvalue() == b"abc"

    write_text(BYTES, [ord("a")], new_ids())


def test_a_terminal_that_lacks_a_character_shows_a_question_mark(run_dir, monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "ascii"))
    sample.main(out_dir=str(run_dir), start="ég", num_samples=1, max_new_tokens=1, device="cpu")
    assert printed.getvalue().startswith(b"?g")


# ---------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(("settings", "message"), [
    ({"temperature": -0.5}, "temperature=-0.5, top_k=200: neither may be below 0"),
    ({"top_k": -1}, "top_k=-1: neither may be below 0"),
    ({"num_samples": 0}, "num_samples=0: must be 1 or more"),
    ({"max_new_tokens": 0}, "max_new_tokens=0: must be 1 or more"),
    ({"batch_size": 0}, "batch_size=0: must be 1 or more"),
    ({"top_p": 0.0}, "top_p=0.0: must be above 0 and at most 1"),
    ({"top_p": 1.1}, "top_p=1.1: must be above 0"),
    ({"device": "gpu"}, "device='gpu': choose auto, cpu"),
    ({"dtype": "half"}, "dtype='half': choose auto, float32"),
    ({"compile": "maybe"}, "compile='maybe': choose auto"),
    ({"start": "abc X\tY"}, r"lacks '\\tXY'"),
    ({"out_dir": "nowhere"}, "nowhere: no checkpoint here.*train one.*--out_dir="),
])
def test_wrong_settings(settings, message, run_dir, capsys):
    with pytest.raises(ValueError, match=message):
        texts(capsys, **{"out_dir": run_dir, **settings})


def command(*flags, cwd, **kwargs):
    return subprocess.run([sys.executable, ROOT / "sample.py", *flags], cwd=cwd, timeout=120,
                          capture_output=True, **kwargs)


def test_a_missing_run_ends_in_one_line_and_exit_code_2(tmp_path):
    done = command(cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == b""
    assert done.stderr.decode() == ("error: out/ holds no run yet; train one with python train.py, "
                                    "or name a run's folder with --out_dir=\n")


def test_a_prompt_beyond_the_vocabulary_ends_in_one_line_and_exit_code_2(run_dir):
    done = command(f"--out_dir={run_dir}", "--start=-", cwd=run_dir, input=b"abXcYX")
    assert done.returncode == 2 and done.stdout == b""
    place, error = done.stderr.decode().splitlines()
    assert place == str(run_dir / "iter_000002")
    assert error.startswith("error: the vocabulary of 11 characters lacks 'XY'")
