"""The ablation of the modern recipe: trains its runs, prints the tables, draws recipe.png.

    python experiments/recipe.py --corpus=books.jsonl.gz                 # everything, one by one
    python experiments/recipe.py --corpus=books.jsonl.gz --only='small/recipe-without-*'
    python experiments/recipe.py --out_dir=experiments/logs/recipe       # tables and plot alone
    python experiments/recipe.py --cost=True --threads=1     # processor time of an iteration

Each run is train.py in a process of its own, in <out_dir>/<size>/<name>/. Finished runs are
skipped and half done ones resumed, so the same command goes on where it was stopped.
"""

import fnmatch
import json
import os
import re
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from configurator import keyword_defaults, run  # noqa: E402

ITERS, SEEDS, PARTS = 840, (1337, 1338, 1339), (4, 6, 7, 8, 10, 12)
COMMON = dict(max_iters=ITERS, lr_decay_iters=ITERS, eval_interval=ITERS, eval_iters=120,
              log_interval=35, keep_checkpoints=1, batch_size=8, gradient_accumulation_steps=1,
              block_size=128, min_lr=0.0)  # 1,024 tokens per iteration, 122,880 of validation
SIZES = {"small": dict(n_layer=4, n_head=2, n_embd=64),  # 0.34M parameters as GPT-2
         "large": dict(n_layer=6, n_head=4, n_embd=128)}  # 1.47M
# the rates of both are those that the sweeps at seed 1337 found best
SWEEP = (0.001, 0.002, 0.004, 0.008)
BEST = {"small": 0.004, "large": 0.004}
RECIPE_SWEEP = ((0.0125, 1), (0.025, 1), (0.05, 1), (0.025, 0.5), (0.025, 2))  # Muon's, AdamW's x
RECIPE_BEST = (0.025, 1)  # found at the small size, and taken to the large one
GPT2 = dict(bias=True, rope=False, rmsnorm=False, qk_norm=False, mlp="gelu", tied=True,
            zero_init=False, softcap=0.0, value_embeds=False, residual_scalars=False,
            optimizer="adamw", weight_decay=0.1, beta1=0.9, beta2=0.95, grad_clip=1.0,
            warmup_iters=ITERS // 10, schedule="cosine")
RECIPE = dict(bias=False, rope=True, rmsnorm=True, qk_norm=True, mlp="relu2", tied=False,
              zero_init=True, softcap=15.0, value_embeds=True, residual_scalars=True,
              optimizer="muon", weight_decay=0.05, beta1=0.8, beta2=0.95, grad_clip=0.0,
              warmup_iters=0, schedule="wsd")
OPTIMIZER = ("optimizer", "learning_rate", "muon_lr", "embed_lr", "weight_decay", "beta1", "beta2",
             "grad_clip", "warmup_iters")
SWITCHES = ("optimizer", "schedule", "rope", "rmsnorm", "qk_norm", "mlp", "tied", "zero_init",
            "softcap", "value_embeds", "residual_scalars", "bias")
OTHERS = {  # what the recipe does not have, or what has no switch; GPT-2 gets the first two as well
    "swiglu": dict(mlp="swiglu"),
    "n_kv_head_1": dict(n_kv_head=1),  # of 2
    "no_decay": dict(weight_decay=0.0),
    "qkv_as_one": dict(patch="optim.row_parts = lambda name, p, config: [len(p)]"),
    "no_momentum_warmup": dict(patch="rates = optim.set_rates\n"
                               "optim.set_rates = lambda a, b, c, iter_num: rates(a, b, c, 300)"),
    "adamw_half_rate": dict({key: GPT2[key] for key in OPTIMIZER if key in GPT2},
                            learning_rate=BEST["small"] / 2),
}


def main(
    corpus="",  # the Gutenberg books, .jsonl.gz; '': train nothing
    out_dir="out/recipe",  # where the runs are
    only="*",  # which of them to train, such as 'small/*'
    threads=0,  # of each run; 0: torch's choice
    cost=False,  # instead: measure what an iteration of both costs, once the corpus is prepared
):
    out_dir = Path(out_dir).resolve()
    if cost:
        return print_cost(out_dir, threads)
    if corpus:
        environ = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
        data = out_dir / "data"  # once it is prepared, a corpus with another date may stand for it
        if (data / "UNFINISHED").exists() or not (data / "meta.json").exists():
            call(["prepare.py", f"--input={Path(corpus).resolve()}", f"--dataset={data}",
                  "--tokenizer=bpe", "--vocab_size=2048", "--bpe_characters=20000000"], environ)
        for name, settings in runs().items():
            done = final_loss(out_dir / name, settings["max_iters"]) is not None
            if fnmatch.fnmatch(name, only) and not done:
                print(name, flush=True)
                train(out_dir, name, settings, environ)
    losses = {name: final_loss(out_dir / name, settings["max_iters"])
              for name, settings in runs().items()}
    losses = {name: loss for name, loss in losses.items() if loss is not None}
    print(f"\n{len(losses)} of {len(runs())} runs are finished\n\n{tables(losses)}")
    draw(out_dir, losses)


def runs():
    """Return {name: settings of train.py} of all runs, in the order in which they are trained."""
    found = {}
    for size, sizes in SIZES.items():
        gpt2 = {**COMMON, **sizes, **GPT2, "learning_rate": BEST[size]}
        recipe = {**COMMON, **sizes, **RECIPE, **rates(*RECIPE_BEST)}
        often = dict(eval_interval=ITERS // 6)
        for rate in SWEEP:
            found[f"{size}/gpt2-{rate}"] = {**gpt2, **often, "learning_rate": rate}
        for pair in RECIPE_SWEEP if size == "small" else (RECIPE_BEST,):
            found[f"{size}/recipe-{pair[0]}-{pair[1]}"] = {**recipe, **often, **rates(*pair)}
        for part in PARTS:
            iters = dict.fromkeys(("max_iters", "lr_decay_iters", "eval_interval"), ITERS // part)
            found[f"{size}/recipe-over-{part}"] = {**recipe, **iters}
        for seed in SEEDS[1:]:
            found[f"{size}/gpt2-seed-{seed}"] = {**gpt2, "seed": seed}
            found[f"{size}/recipe-seed-{seed}"] = {**recipe, "seed": seed}
        for switch in SWITCHES if size == "small" else ():
            keys = OPTIMIZER if switch == "optimizer" else (switch,)
            for to, name, other in ((recipe, "recipe-without", gpt2), (gpt2, "gpt2-with", recipe)):
                found[f"small/{name}-{switch}"] = {
                    **to, **{key: other[key] for key in keys if key in other}}
        for i, (name, change) in enumerate(OTHERS.items() if size == "small" else ()):
            found[f"small/recipe-with-{name}"] = {**recipe, **change}
            if i < 2:
                found[f"small/gpt2-with-{name}"] = {**gpt2, **change}
    return found


def first_runs(size):
    """Return the names of GPT-2's run and the recipe's at the rates taken, at the first seed."""
    return f"{size}/gpt2-{BEST[size]}", "{}/recipe-{}-{}".format(size, *RECIPE_BEST)


def rates(muon_lr, factor):
    """The recipe's rates: Muon's, and AdamW's by a factor of those in config/train_modern.py."""
    return dict(muon_lr=muon_lr, learning_rate=0.004 * factor, embed_lr=0.3 * factor)


# ---------------------------------------------------------------------- running


def train(out_dir, name, settings, environ):
    """Run train.py in <out_dir>/<name>, after the line of code `patch` where there is one."""
    folder, patch = out_dir / name, settings.get("patch")
    folder.mkdir(parents=True, exist_ok=True)
    script = ["train.py"] if not patch else [
        "-c", f"from training import optim\n{patch}\nimport train, configurator\n"
        "configurator.run(train.main, more_defaults=train.checkpoint_defaults)"]
    flags = {**settings, "dataset": out_dir / "data", "out_dir": folder, "init_from": "auto"}
    with open(folder / "log.txt", "a") as log:
        call([*script, *(f"--{key}={value}" for key, value in flags.items() if key != "patch")],
             environ, log)


def call(command, environ, log=None):
    """Run one of our scripts. A run that train.py refuses or stops, as one that diverges, is said
    and left unfinished; anything else ends the study."""
    code = subprocess.run([sys.executable, *command], cwd=ROOT, env=environ, stdout=log,
                          stderr=subprocess.STDOUT if log else None).returncode
    if code == 2 and log:
        print(f"  stopped: see {log.name}", flush=True)
    elif code:
        sys.exit(f"{command[0]} ended with {code}" + (f": see {log.name}" if log else ""))


def print_cost(out_dir, threads, repeats=15):
    """Print the processor milliseconds of an iteration, medians over repeats, taken by turns."""
    import torch

    import train

    torch.set_num_threads(threads or torch.get_num_threads())
    for size in SIZES:
        steps, spent = {}, {"gpt2": [], "recipe": []}
        for kind, name in zip(spent, first_runs(size), strict=True):
            settings = {**keyword_defaults(train.main), **runs()[name], "device": "cpu",
                        "dtype": "float32", "dataset": f"{out_dir}/data"}
            runtime = train.setup("cpu", "float32")
            model, *_ = train.make_model(settings, None)
            data = train.Mixture(train.parse_mix("", settings["dataset"]), "train", 128)
            steps[kind] = partial(train.train_step, model, train.make_optimizer(
                model, settings, runtime), torch.amp.GradScaler(enabled=False),
                train.load_batches(data, 0, 1, settings, model, runtime), 0.0, runtime)
        for _ in range(repeats):
            for kind, step in steps.items():
                began = time.process_time()
                step()
                spent[kind].append(1000 * (time.process_time() - began))
        ratios = sorted(b / a for a, b in zip(*spent.values(), strict=True))
        print(f"{size}: " + ", ".join(f"{kind} {statistics.median(ms):.0f} ms"
                                      for kind, ms in spent.items())
              + f"; ratio {statistics.median(ratios):.2f} (quarter to three quarters "
              f"{ratios[repeats // 4]:.2f} to {ratios[-1 - repeats // 4]:.2f})")


def metrics(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.open()] if path.is_file() else []


def final_loss(folder, max_iters):
    """Return the validation loss after the last iteration, None where the run is not there yet."""
    found = [row["val_loss"] for row in metrics(folder)
             if "val_loss" in row and row["iter"] == max_iters]
    return found[-1] if found else None


# ---------------------------------------------------------------------- tables


def table(head, rows, known):
    """Return a markdown table of the rows that have a number beyond the first `known` cells."""
    cells = [["" if cell is None else f"{cell:.4f}" if isinstance(cell, float) else str(cell)
              for cell in row] for row in rows if any(cell is not None for cell in row[known:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *cells])


def tables(losses):
    """Return the four tables of {name: final validation loss}, as markdown."""
    first = {size: first_runs(size) for size in SIZES}
    swept = [[name, loss, "taken" if name in first[name.partition("/")[0]] else ""]
             for name, loss in losses.items() if re.fullmatch(r"\w+/(gpt2|recipe)(-[\d.]+)+", name)]
    compared, shorter, changed = [], [], []
    for size, names in first.items():
        kinds = {}
        for kind, name in zip(("gpt2", "recipe"), names, strict=True):
            found = [losses.get(n) for n in
                     (name, *(f"{size}/{kind}-seed-{seed}" for seed in SEEDS[1:]))]
            kinds[kind] = mean(found)
            compared.append([size, kind, *found, mean(found)])
        goal = kinds["gpt2"]
        for part in (1, *PARTS):
            loss = losses.get(f"{size}/recipe-over-{part}") if part > 1 else losses.get(names[1])
            shorter.append([size, ITERS // part, f"{part}x", loss, minus(loss, goal)])
    gpt2, recipe = (losses.get(name) for name in first["small"])
    for switch in (*SWITCHES, *OTHERS):
        out = losses.get(f"small/recipe-with{'' if switch in OTHERS else 'out'}-{switch}")
        added = losses.get(f"small/gpt2-with-{switch}")
        changed.append([switch, out, minus(out, recipe), added, minus(added, gpt2)])
    heads = ["it", "worse by", "GPT-2 with it", "worse by"]
    return "\n\n".join([
        table(["rates at seed 1337", "loss", ""], swept, 1),
        table(["size", "model", *(f"seed {seed}" for seed in SEEDS), "mean"], compared, 2),
        table(["size", "iterations of the recipe", "fewer tokens", "loss", "above GPT-2's mean"],
              shorter, 3),
        table(["switch", "recipe without " + heads[0], *heads[1:]], changed[:len(SWITCHES)], 1),
        table(["other", "recipe with " + heads[0], *heads[1:]], changed[len(SWITCHES):], 1)])


def mean(losses):
    found = [loss for loss in losses if loss is not None]
    return statistics.mean(found) if found else None


def minus(a, b):
    return None if a is None or b is None else f"{a - b:+.4f}"


def draw(out_dir, losses):
    """Draw recipe.png: validation loss over tokens of both models at both sizes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    _, axes = plt.subplots(1, len(SIZES), figsize=(11, 4.5))
    for axis, size in zip(axes, SIZES, strict=True):
        for name, label in zip(first_runs(size), ("GPT-2, AdamW tuned", "recipe"), strict=True):
            rows = [row for row in metrics(out_dir / name) if "val_loss" in row and row["iter"]]
            axis.plot([row["tokens"] / 1e6 for row in rows], [row["val_loss"] for row in rows],
                      "o-", label=label)
        ends = [(metrics(out_dir / name)[-1]["tokens"] / 1e6, loss) for name, loss in losses.items()
                if name.startswith(f"{size}/recipe-over-")]
        axis.plot(*zip(*ends, strict=True) if ends else ([], []), "x",
                  label="recipe, its schedule over fewer tokens")
        axis.set(title=size, xlabel="million tokens", ylabel="validation loss, nats per token")
        axis.legend()
    plt.tight_layout()
    plt.savefig(out_dir / "recipe.png", dpi=110)
    plt.close()


if __name__ == "__main__":
    run(main)
