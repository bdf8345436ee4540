"""Documents and the modern recipe at its small size: sequences that begin at documents, attention
that keeps to them, both, neither.

    python experiments/recipe_documents.py --corpus=short.jsonl.gz --threads=1   # train, evaluate
    python experiments/recipe_documents.py --out_dir=experiments/logs/recipe_documents  # the table

Each run is train.py in a process of its own; finished ones are skipped. Its last checkpoint is then
evaluated in four ways: on validation's blocks as training sees them or moved to where documents
begin, with attention free or kept to the documents.
"""

import itertools
import json
import os
import statistics
from pathlib import Path

import recipe

import train
from configurator import run
from formats.checkpoint import find_checkpoint, load_model
from text.tokenizer import load_tokenizer
from training.sequences import evenly_spaced_starts, move_to_documents

ITERS = 560  # of 1,024 tokens
RUNS = {"neither": {}, "align": dict(align_documents=True), "mask": dict(mask_documents=True),
        "both": dict(align_documents=True, mask_documents=True)}
WAYS = [f"{a}, {b}" for a, b in itertools.product(("blocks", "documents"), ("free", "masked"))]


def main(
    corpus="",  # short documents, .jsonl.gz; '': train nothing
    out_dir="out/recipe_documents",  # where the runs are
    threads=0,  # of each run; 0: torch's choice
):
    out_dir = Path(out_dir).resolve()
    environ = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    if corpus:
        recipe.call(["prepare.py", f"--input={Path(corpus).resolve()}", "--tokenizer=bpe",
                     f"--dataset={out_dir}/data", "--vocab_size=2048"], environ)
    for seed, (kind, change) in itertools.product(recipe.SEEDS, RUNS.items() if corpus else ()):
        folder = out_dir / f"{kind}-{seed}"
        if recipe.final_loss(folder, ITERS) is None:
            iters = dict.fromkeys(("max_iters", "lr_decay_iters", "eval_interval"), ITERS)
            recipe.train(out_dir, folder.name, {
                **recipe.COMMON, **recipe.SIZES["small"], **recipe.RECIPE,
                **recipe.rates(*recipe.RECIPE_BEST), **iters, **change, "seed": seed},
                environ)
        if not (folder / "losses.json").is_file():
            losses = four_losses(folder, f"{out_dir}/data")
            (folder / "losses.json").write_text(json.dumps(losses) + "\n")
    print(table(out_dir))


def four_losses(folder, dataset):
    """Return {way: validation loss} of a run's last checkpoint."""
    settings, losses = recipe.COMMON, {}
    runtime = train.setup("cpu", "float32")
    model, document = load_model(find_checkpoint(folder)), load_tokenizer(dataset).eot
    for way in WAYS:
        T, N = settings["block_size"], settings["batch_size"]
        reader = train.Mixture({dataset: 1}, "val", T).readers[dataset]
        starts = evenly_spaced_starts(reader, settings["eval_iters"] * N, T)
        if way.startswith("documents"):
            starts = move_to_documents(reader, starts, T, document)
        reader.spread = lambda *_, starts=starts: starts
        model.document_start = document if way.endswith("masked") else None
        losses[way] = train.evaluate(model, model.config, reader, 0, N, runtime)
    return losses


def table(out_dir):
    """Return the means over the seeds and their standard deviations, as markdown."""
    rows = ["| trained with | seeds | " + " | ".join(WAYS) + " |", "|---" * 6 + "|"]
    for kind in RUNS:
        found = [json.loads(path.read_text()) for path in out_dir.glob(f"{kind}-*/losses.json")]
        cells = [f"{statistics.mean(of):.4f} ({statistics.pstdev(of):.4f})"
                 for of in ([losses[way] for losses in found] for way in WAYS) if of]
        rows.append(f"| {kind} | {len(found)} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    run(main)
