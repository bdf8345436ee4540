"""bench.py: it times our own step and loop, runs what it is compared with, and keeps them apart."""

import json
import re
import runpy
import sys
import time

import pytest
import torch
from conftest import ROOT

import bench
import configurator
import prepare
import train
from runtime import child, speed
from runtime.processes import Runtime
from training import log as run_log
from training.batches import BatchSource

CPU = Runtime(torch.device("cpu"), torch.float32)

TINY = ["--n_layer=1", "--n_head=1", "--n_embd=7", "--block_size=13", "--batch_size=2",
        "--gradient_accumulation_steps=3", "--device=cpu", "--dtype=float32", "--iterations=5",
        "--warmup=2", "--repeats=2"]

SMALL_MACHINE = {"float32_gflop_per_s": 1.0, "bfloat16_gflop_per_s": 1.0, "read_gb_per_s": 1.0}

# what bench.py wants of a folder with nanoGPT's layout: its flags are nanoGPT's keys
PEER = {
    "train.py": """
import sys
flags = dict(arg[2:].split("=", 1) for arg in sys.argv[1:])
assert flags["batch_size"] == "2" and flags["gradient_accumulation_steps"] == "3", flags
assert flags["device"] == "cpu" and flags["n_embd"] == "7"
print("step 0: val loss 4.2")
for number in range(int(flags["max_iters"]) + 1):
    print(f"iter {number}: loss 1.0, time {900 if number < 2 else 10 + number:.2f}ms")
""",
    "sample.py": "print('text')",
    "model.py": """
import torch
from types import SimpleNamespace as GPTConfig
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.n_layer == 1 and config.block_size == 13
    def generate(self, ids, count, top_k):
        assert ids.shape[1] <= 9 and count == 1
        assert torch.is_autocast_enabled("cpu") == (DTYPE == "bfloat16")
        return ids
""",
    "data/openwebtext/prepare.py": """
from datasets import load_dataset
total_batches = 1024
assert total_batches == 1 and len(load_dataset("openwebtext", num_proc=8)["train"]) >= 1
""",
}


@pytest.fixture
def peer(tmp_path):
    for name, text in PEER.items():
        path = tmp_path / "their" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "their"


@pytest.fixture
def quick(monkeypatch):
    """Our side is measured in this process, which has torch already, and a small machine."""
    own = child.run_python

    def run_python(script, *flags, **options):
        if script != "bench.py":
            return own(script, *flags, **options)
        lines = []
        with monkeypatch.context() as patch:
            patch.setattr("builtins.print", lambda *text, **kw: lines.append(
                child.Line(0.0, text[-1])))
            configurator.run(bench.main, base=train.main, argv=flags)
        return lines

    monkeypatch.setattr(child, "run_python", run_python)
    monkeypatch.setattr(bench, "measure_machine", lambda device: SMALL_MACHINE)


def bench_with(*flags):
    configurator.run(bench.main, base=train.main, argv=[*TINY, *flags])


def test_times_the_training_step_by_turns_with_theirs(capsys, monkeypatch, quick, peer, tmp_path):
    steps, step, log = [], train.train_step, tmp_path / "log.jsonl"
    (peer / "torch.py").write_text("class cuda: is_initialized = bool")  # a quick one
    monkeypatch.setattr(train, "train_step", lambda *args: steps.append(1) or step(*args))
    bench_with("--random=True", f"--compare={peer}", f"--log={log}")
    machine, *rows = map(json.loads, log.read_text().splitlines())
    assert machine["float32_gflop_per_s"] == 1.0 and machine["torch"] == torch.__version__
    assert [row["side"] for row in rows] == ["flatgpt", "their"] * 2
    assert [row["repeat"] for row in rows] == [0, 0, 1, 1] and len(steps) == 2 * 7
    for ours in rows[::2]:
        assert ours["tokens_per_s"] == pytest.approx(1000 * 3 * 2 * 13 / ours["ms"])
        assert 0 < ours["batch_source_share"] < 1 and ours["memory_mb"] >= 0
        assert "mfu" not in ours  # a CPU's peak is not known
    for theirs in rows[1::2]:  # 12, 13, 14, 15, 16 after the warm-up
        assert theirs["ms"] == 14 and theirs["tokens_per_s"] == pytest.approx(78 / 0.014)
    # 1 GFLOP/s, and 6 N + 12 L C T for a token, N with GPT-2's padded vocabulary
    N = 50304 * 7 + 12 * 7 * 7 + 3 * 7
    assert theirs["of_the_limit"] == pytest.approx(
        theirs["tokens_per_s"] * (6 * N + 12 * 7 * 13) / 1e9)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split("  ")[0] == "" and "flatgpt / their" in lines[1]
    ms = next(line for line in lines if line.startswith("ms "))
    assert "14 (14 to 14)" in ms


def test_the_next_batches_are_read_while_the_device_is_at_work(monkeypatch):
    """As train.py does it; the first ones are read before."""
    events = []
    monkeypatch.setattr(train, "train_step", lambda training, batches, *rest: events.append(
        f"step {batches}"))
    monkeypatch.setattr(Runtime, "synchronize", lambda self: events.append("wait"))
    batches = BatchSource(lambda number: events.append(f"read {number}") or number)
    times = bench.time_iterations(batches, None, 1.0, CPU, range(2))
    assert events == ["read 0", "step 0", "read 1", "wait", "step 1", "read 2", "wait"]
    assert all(0 < t.reading < t.whole for t in times)


def test_one_micro_step_unless_more_are_given_and_a_line_per_repeat(
        capsys, monkeypatch, quick, tmp_path):
    monkeypatch.setattr(speed, "measure_machine", lambda device: SMALL_MACHINE)
    flags = [flag for flag in TINY if not flag.startswith("--gradient")]
    for more, micro_steps in (["--repeats=2"], 1), (["--gradient_accumulation_steps=4"], 4):
        argv = [*flags, "--random=True", f"--log={tmp_path}/log", *more]
        monkeypatch.setattr(sys, "argv", ["bench.py", *argv])
        runpy.run_path(bench.__file__, run_name="__main__")
        row = json.loads((tmp_path / "log").read_text().splitlines()[-1])
        assert row["tokens_per_s"] == pytest.approx(1000 * micro_steps * 2 * 13 / row["ms"])
        assert capsys.readouterr().err == "repeat 1 of 2: flatgpt\nrepeat 2 of 2: flatgpt\n"


def test_shows_the_share_of_a_peak_that_is_known(capsys, monkeypatch, quick, tmp_path):
    monkeypatch.setattr(run_log, "peak_flops", lambda runtime: 2e9)
    bench_with("--random=True", "--repeats=1", f"--log={tmp_path}/log")
    row = json.loads((tmp_path / "log").read_text().splitlines()[1])
    assert row["mfu"] == pytest.approx(row["of_the_limit"] / 2)  # the machine's is 1 GFLOP/s
    assert "\nmfu  " in capsys.readouterr().out


def test_memory_is_measured_in_a_process_of_its_own(capsys):
    bench_with("--suite=memory", "--random=True", "--repeats=1", "--batch_size=20",
               "--gradient_accumulation_steps=1", "--iterations=1", "--warmup=1")
    row = next(s for s in capsys.readouterr().out.splitlines() if s.startswith("memory_mb"))
    assert float(row.split()[1]) > 4e-6 * 20 * 13 * 50304  # float32 logits at the least


def test_times_a_mixture(capsys, quick, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("some text " * 99)
        prepare.main(dataset=f"{tmp_path}/{name}", input=f"{tmp_path}/{name}.txt")
    bench_with(f"--mix={tmp_path}/a:0.7,{tmp_path}/b:0.3", f"--log={tmp_path}/log")
    assert len((tmp_path / "log").read_text().splitlines()) == 3


def test_profile_writes_a_trace(capsys, tmp_path):
    bench_with("--random=True", "--profile=True", f"--trace={tmp_path / 'trace.json'}")
    assert "aten::mm" in capsys.readouterr().out
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_samples_are_those_of_sample_py(quick, peer, tmp_path, monkeypatch, dtype, compiled):
    """Both sides in one number format, and ours compiled where that is asked for."""
    drawn, own = [], bench.generate
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(bench, "generate", lambda model, ids, generators, count, *rest: (
        drawn.append((len(generators), count, rest[-1])) or own(model, ids, generators, count,
                                                                *rest)))
    text = (peer / "model.py").read_text().replace("DTYPE", repr(dtype))
    (peer / "model.py").write_text(text)
    bench_with("--suite=sample", f"--compare={peer}", f"--log={tmp_path}/log", "--new_tokens=9",
               "--samples=3", "--repeats=1", f"--dtype={dtype}", f"--compile={compiled}")
    _, ours, theirs = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert drawn == [(3, 5, compiled), (3, 9, compiled)]
    assert ours["tokens_per_s"] > 0 and theirs["tokens_per_s"] > 0
    weights = 50304 * 7 + 12 * 7 * 7 + 3 * 7  # of 4 or 2 bytes, read at 1 GB/s
    size = 4 if dtype == "float32" else 2
    for row, count in ((ours, 3), (theirs, 1)):
        assert row["of_the_limit"] == pytest.approx(
            row["tokens_per_s"] / count * size * weights / 1e9)


def test_questions_are_scored(quick, tmp_path):
    bench_with("--suite=evaluate", "--questions=3", "--block_size=150",
               f"--log={tmp_path}/log")
    rows = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [row["suite"] for row in rows[1:]] == ["evaluate"] * 2
    assert all(row["questions_per_s"] > 0 for row in rows[1:])


def test_preparing_beside_tiktoken_and_their_script(gpt2, quick, peer, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(peer))
    (peer / "datasets.py").write_text("""
def load_dataset(kind, data_files):
    assert kind == "json"
    return {"train": open(data_files).readlines()}
""")
    bench_with("--suite=prepare", f"--compare={peer}", f"--log={tmp_path}/log", "--repeats=1",
               "--megabytes=0.1")
    _, ours, raw, theirs = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert [row["side"] for row in (ours, raw, theirs)] == ["flatgpt", "tiktoken", "their"]
    assert all(row["seconds"] > 0 for row in (ours, raw, theirs))


def test_the_texts_are_cut_into_documents(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "' + "a" * 5001 + '"}\n{"text": "b"}\n')
    path = tmp_path / "texts.jsonl"
    bench.write_texts(str(tmp_path / "in.jsonl"), 1, path)
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert [len(text) for text in texts] == [5000, 1, 1]
    with pytest.raises(ValueError, match="text='nowhere': no such file"):
        bench.write_texts("nowhere", 1, path)


def test_start_is_until_the_first_iteration(quick, peer, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "ROOT", peer)  # both sides are the stand-in, without torch
    text = PEER["train.py"].replace("for number", "import time; time.sleep(0.3)\nfor number")
    (peer / "train.py").write_text(text + "time.sleep(0.3)")
    (peer / "data" / "set").mkdir()
    (peer / "data" / "set" / "train.bin").write_bytes(b"some tokens")
    began = time.perf_counter()
    bench_with("--suite=start", f"--compare={peer}", f"--dataset={peer}/data/set",
               f"--log={tmp_path}/log", "--repeats=1")
    _, ours, theirs = map(json.loads, (tmp_path / "log").read_text().splitlines())
    parts = [row[key] for row in (ours, theirs) for key in ("train_s", "sample_s")]
    assert min(parts[::2]) > 0.3 and min(parts) > 0  # the sleep before iteration 0 is in it,
    assert sum(parts) < time.perf_counter() - began - 2 * 0.3  # and the one after it is not


def test_the_table_has_medians_and_ratios_of_one_repeat():
    text = bench.comparison_table({bench.OURS: [{"ms": 1.0}, {"ms": 8.0}, {"ms": 3.0}],
                        "b": [{"ms": 2.0}, {"ms": 2.0}, {"ms": 2.0}]})
    assert re.split(r"  +", text.splitlines()[1]) == [
        "ms", "3 (1 to 8)", "2 (2 to 2)", "1.5 (0.5 to 4)"]


@pytest.mark.parametrize("flags, says", [
    (["--iterations=0"], "iterations=0: must be at least 1"),
    (["--suite=speed"], "suite='speed': choose 'train', 'sample', 'evaluate', "),
    (["--compare=nowhere"], "compare='nowhere': has no train.py; give the folder of a nanoGPT"),
    (["--suite=sample", "--compare=/"], "compare='/': has no model.py"),
    (["--compare=transformers"], "compare='transformers': is for suite=sample"),
    (["--suite=evaluate", "--compare=/"], "suite=evaluate compares with lm_eval alone"),
    (["--suite=memory", "--profile=True"], "profile=True: suite=memory has none"),
    (["--dataset=nowhere"], "python prepare.py --dataset=nowhere"),
    (["--n_heads=3"], "did you mean 'n_head'?"),
])
def test_a_user_s_mistake_is_one_line(capsys, flags, says, quick):
    with pytest.raises(SystemExit) as stopped:
        bench_with(*flags)
    assert stopped.value.code == 2 and says in capsys.readouterr().err


def test_their_data_must_be_there(capsys, quick, peer, tmp_path):
    (tmp_path / "train_000000.bin").touch()
    with pytest.raises(SystemExit):
        bench_with(f"--compare={peer}", f"--dataset={tmp_path}")
    assert "train.bin is missing; prepare it there" in capsys.readouterr().err


def test_a_log_that_cannot_be_written_is_the_user_s_mistake(tmp_path):
    with pytest.raises(ValueError, match="nowhere/log.jsonl: cannot be written"):
        bench.append_log(f"{tmp_path}/nowhere/log.jsonl", {"ms": 1})


def test_nanogpt_s_flag_for_random_tokens_works(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench.py", "--real_data=False", "--random=maybe"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "bench.py"), run_name="__main__")
    assert "error: command line: random=maybe: not True or False" in capsys.readouterr().err
