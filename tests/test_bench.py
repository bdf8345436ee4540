"""bench.py: it times train.py's own step, with train.py's own settings."""

import json

import pytest

import bench
import configurator
import prepare
import train

TINY = ["--n_layer=1", "--n_head=1", "--n_embd=7", "--block_size=13", "--batch_size=2",
        "--gradient_accumulation_steps=3", "--device=cpu", "--dtype=float32", "--iterations=5",
        "--warmup=1", "--random=True"]


def test_times_the_training_step(capsys, monkeypatch):
    steps, step = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda *args: steps.append(1) or step(*args))
    configurator.run(bench.main, base=train.main, argv=TINY)
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(steps) == 6 and row["iterations"] == 5
    assert row["tokens_per_iter"] == 3 * 2 * 13
    assert 0 < row["ms_min"] <= row["ms_median"] <= row["ms_max"]
    assert row["tokens_per_s"] == pytest.approx(1000 * 3 * 2 * 13 / row["ms_median"])
    assert 0 < row["batch_source_share"] < 1 and row["peak_memory_mb"] > 10
    assert "mfu" not in row  # a CPU's peak is not known


def test_times_a_mixture(capsys, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("some text " * 99)
        prepare.main(dataset=f"{tmp_path}/{name}", input=f"{tmp_path}/{name}.txt")
    configurator.run(bench.main, base=train.main, argv=[
        *TINY, "--random=False", f"--mix={tmp_path}/a:0.7,{tmp_path}/b:0.3"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["iterations"] == 5


def test_profile_writes_a_trace(capsys, tmp_path):
    configurator.run(bench.main, base=train.main,
                     argv=[*TINY, "--profile=True", f"--trace={tmp_path / 'trace.json'}"])
    assert "aten::mm" in capsys.readouterr().out
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize("flags, says", [
    (["--iterations=0"], "iterations=0: must be 1 or more"),
    (["--random=False", "--dataset=nowhere"], "python prepare.py --dataset=nowhere"),
    (["--n_heads=3"], "did you mean 'n_head'?"),
])
def test_a_user_s_mistake_is_one_line(capsys, flags, says):
    with pytest.raises(SystemExit) as stopped:
        configurator.run(bench.main, base=train.main, argv=[*TINY, *flags])
    assert stopped.value.code == 2 and says in capsys.readouterr().err
