"""experiments/recipe.py: its list of runs, and its tables of metrics that are made up."""

import importlib.util
import inspect
import json

import pytest
from conftest import ROOT

import train


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("recipe", ROOT / "experiments/recipe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder, *rows):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(iters, loss):
    return {"iter": iters, "tokens": iters * 2048, "val_loss": loss}


def cells(text, beginning):
    """Return the cells of the one row of the tables that begins with these cells."""
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
             if line.startswith("| " + " | ".join(beginning) + " |")]
    assert len(found) == 1, found
    return found[0][len(beginning):]


def test_tables_of_metrics(recipe, tmp_path, capsys):
    n, best = recipe.ITERS, recipe.BEST["small"]
    pair = "{}-{}".format(*recipe.RECIPE_BEST)
    write(tmp_path / f"small/gpt2-{best}", row(0, 7.5), row(n // 2, 4.9), row(n, 4.5))
    for seed, loss in zip(recipe.SEEDS[1:], (4.25, 4.75), strict=True):
        write(tmp_path / f"small/gpt2-seed-{seed}", row(n, loss + 0.25))
    write(tmp_path / f"small/recipe-{pair}", row(n, 4.0))
    write(tmp_path / "small/recipe-over-4", row(n // 4, 4.625))
    write(tmp_path / "small/recipe-over-6", row(n // 6 - 1, 4.5))  # not at its end
    write(tmp_path / "small/recipe-without-rope", row(n, 4.125))
    write(tmp_path / "small/gpt2-with-rope", row(n, 4.375))
    write(tmp_path / "small/recipe-with-swiglu", row(n, 3.75))
    recipe.main(out_dir=str(tmp_path))
    text = capsys.readouterr().out
    assert "8 of " in text
    assert cells(text, [f"small/gpt2-{best}"]) == ["4.5000", "taken"]
    assert cells(text, ["small", "gpt2"]) == ["4.5000", "4.5000", "5.0000", "4.6667"]
    assert cells(text, ["small", "recipe"]) == ["4.0000", "", "", "4.0000"]
    assert cells(text, ["small", str(n // 4)]) == ["4x", "4.6250", "-0.0417"]
    assert cells(text, ["small", str(n)]) == ["1x", "4.0000", "-0.6667"]
    assert cells(text, ["rope"]) == ["4.1250", "+0.1250", "4.3750", "-0.1250"]
    assert cells(text, ["swiglu"]) == ["3.7500", "-0.2500", "", ""]
    assert "| rmsnorm |" not in text and "| large |" not in text and "| 6x |" not in text
    assert (tmp_path / "recipe.png").stat().st_size > 1000


def test_runs_differ_in_what_their_names_say(recipe):
    runs = recipe.runs()
    known = inspect.signature(train.main).parameters
    assert all(key in known or key == "patch" for settings in runs.values() for key in settings)
    full = runs["small/recipe-{}-{}".format(*recipe.RECIPE_BEST)]
    gpt2 = runs[f"small/gpt2-{recipe.BEST['small']}"]
    for switch in recipe.SWITCHES:
        if switch == "optimizer":
            continue
        out, added = runs[f"small/recipe-without-{switch}"], runs[f"small/gpt2-with-{switch}"]
        expected = {switch, "eval_interval"}
        assert {key for key in full if full[key] != out[key]} == expected
        assert {key for key in gpt2 if gpt2[key] != added[key]} == expected
        assert (out[switch], added[switch]) == (gpt2[switch], full[switch])
    assert runs["small/recipe-without-optimizer"]["learning_rate"] == gpt2["learning_rate"]
    assert runs["small/gpt2-with-optimizer"]["muon_lr"] == full["muon_lr"]
    seeds = {settings.get("seed", 1337) for name, settings in runs.items() if "large/" in name}
    assert seeds == set(recipe.SEEDS)


def test_finished_runs_are_not_trained_again(recipe, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(recipe, "call", lambda command, *rest: trained.append(command))
    write(tmp_path / "small/recipe-without-rope", row(recipe.ITERS, 4.0))
    write(tmp_path / "small/recipe-without-mlp", row(recipe.ITERS // 2, 4.0))
    recipe.main(corpus="books.jsonl.gz", out_dir=str(tmp_path), only="small/recipe-without-[rm]*")
    names = [flag.rpartition("/")[2] for command in trained for flag in command
             if flag.startswith("--out_dir=")]
    assert trained[0][0] == "prepare.py"
    assert names == ["recipe-without-rmsnorm", "recipe-without-mlp",
                     "recipe-without-residual_scalars"]
    assert all("--init_from=auto" in command for command in trained[1:])


def test_the_character_models_by_the_clock(tmp_path, capsys, monkeypatch):
    """With times and losses that are played; the commands name both checkouts' own flags."""
    spec = importlib.util.spec_from_file_location("characters",
                                                  ROOT / "experiments/characters.py")
    characters = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(characters)
    with pytest.raises(ValueError, match="no train.py there; name a checkout of nanoGPT"):
        characters.main(compare=str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        characters.run(characters.main, argv=["--size=tiny"])
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith("error: size='tiny': ch")
    (tmp_path / "train.py").touch()
    known = inspect.signature(train.main).parameters

    def timed(folder, flags):
        if folder == ROOT:
            assert {flag[2:].split("=")[0] for flag in flags if flag[:2] == "--"} <= set(known)
            return 8.0, "step 0: val_loss 4.1, val_bpb 6\nstep 160: val_loss 1.85, val_bpb 2.7"
        return 100.0, ("step 0: train loss 4.2, val loss 4.2\niter 0: loss 4.2, time 9000.00ms\n"
                       "iter 1: loss 4.1, time 2000.00ms\niter 2: loss 4.0, time 4000.00ms")

    monkeypatch.setattr(characters, "timed", timed)
    for size, says in (("small", "nanoGPT 100.0, ours 8.0; 12.5 times as fast (12.5 to 12.5)"),
                       ("large", "nanoGPT 5250.0, ours 8.0; 656.2 times")):
        characters.main(compare=str(tmp_path), size=size)
        out = capsys.readouterr().out
        assert "seconds: " + says in out and '"val_losses": [4.1, 1.85]' in out
