"""Evaluate a model: its loss and bits per byte on a dataset, the perplexity of a text, tasks.

    python evaluate.py --out_dir=out/stdlib                     # the data that it was trained on
    python evaluate.py --out_dir=out/mine --text=book.txt --stride=64
    python evaluate.py --init_from=gpt2 --tasks="hellaswag lambada_openai blimp"
    python evaluate.py --init_from=gpt2 --tasks=arc_easy:500 --shots=5
    python evaluate.py --init_from=gpt2 --harness=mmlu,sciq     # after pip install lm_eval==0.4.13
    torchrun --standalone --nproc_per_node=8 evaluate.py --init_from=gpt2-xl --dataset=openwebtext

Prints the scores and writes them into the run's folder, as evaluation.json; scores of tasks are
drawn too, beside those that are published of GPT-2, as evaluation.png.
"""

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from configurator import UserError, check_settings, run

# Those come before torch: they set how long its threads spin (runtime/__init__.py).
# isort: split
import torch

from evaluation.loss import split_loss, text_loss
from evaluation.report import draw, read_published, table, write_json
from evaluation.scoring import Scorer
from evaluation.suite import ROWS, load_suite, score_suite
from exchange.huggingface import load_gpt2
from formats.checkpoint import open_checkpoint
from formats.dataset import dataset_folder
from formats.files import naming_write_errors
from formats.shards import TokenReader
from inference.generate import prepare_model
from runtime.cpu import tune_cpu
from runtime.processes import setup
from runtime.terminal import Progress
from sample import newest_run
from text.tokenizer import Tokenizer, gpt2_spec, load_tokenizer
from training.loss import chunk_losses
from training.sequences import parse_mix

LIMITS = {"eval_tokens": ">= 0", "shots": ">= 0", "stride": ">= 0", "batch_size": ">= 1",
          "split": ("val", "train"), "checkpoint": ("best", "latest")}


def main(
    # the model
    init_from="resume",  # resume: the run in out_dir; or a checkpoint's folder, gpt2, gpt2-xl, ...
    out_dir="",  # the run's folder; '': the newest run in out/
    checkpoint="best",  # which of the run's checkpoints: best or latest
    # loss and bits per byte
    dataset="",  # of a dataset; '': the one that the run was trained on, if nothing else is asked
    split="val",  # val, or train
    eval_tokens=0,  # how many of its tokens, evenly spaced; 0: the whole split
    text="",  # of a text file, with the perplexity per token and per word
    stride=0,  # tokens by which the model's window moves over the text; 0: block_size, the cheapest
    # tasks
    tasks="",  # such as 'blimp:1000 hellaswag my_questions.jsonl'; docs/evaluation.md names them
    shots=0,  # solved examples before each question
    harness="",  # tasks of EleutherAI's lm-evaluation-harness, as hellaswag,mmlu; see --help
    task_data=str(ROWS),  # the folder of the tasks' rows; what is missing is downloaded into it
    # the hardware
    batch_size=8,  # sequences of block_size computed together
    device="auto",  # auto, cpu, mps, cuda or, of several GPUs, cuda:1
    dtype="auto",  # of matrix products: float32, bfloat16, float16; auto: bfloat16 where native
):
    c = SimpleNamespace(**locals())
    check_settings(vars(c), LIMITS)
    suite = load_suite(tasks, task_data, shots)
    runtime = setup(device, dtype)
    tune_cpu(runtime.device)

    # The model, ready for evaluation.
    subject = load_subject(c)
    model = prepare_model(subject.model, runtime)
    chunk_losses(model)
    if stride > model.config.block_size:
        raise UserError(f"stride={stride}: must be at most the model's block_size, "
                        f"{model.config.block_size}, or tokens would be left out")

    # All that is asked for.
    results = {"model": {"name": subject.name, **subject.facts}}
    with runtime:
        if runtime.world_size > 1:
            runtime.init_process_group()
        if dataset or not (text or tasks or harness):
            results["loss"] = dataset_scores(c, subject, runtime)
        if text:
            results["text"] = text_scores(c, subject, runtime)
        if tasks:
            results["tasks"] = suite_scores(c, suite, subject, runtime)
        if harness:
            results["harness"] = harness_scores(c, subject, runtime)

    if runtime.is_main:
        write_results(subject.folder, results)


# ---------------------------------------------------------------------- the model


class Subject(NamedTuple):
    """The model that is evaluated."""
    name: str  # its checkpoint's folder, or gpt2, gpt2-xl, ...
    model: torch.nn.Module
    tokenizer: Tokenizer
    folder: Path  # where the results go
    settings: dict  # those that it was trained with; {} where they are not known
    facts: dict  # that the results mention


def load_subject(c):
    """Return the Subject that the settings name. Raises UserError where there is none."""
    # one of OpenAI's
    if c.init_from != "resume" and not Path(c.init_from).is_dir():
        model = load_gpt2(c.init_from)
        return Subject(c.init_from, model, Tokenizer(gpt2_spec()), Path("out") / c.init_from, {},
                       {"parameters": parameter_count(model)})
    # a checkpoint: of a run, or a folder of its own
    folder = c.init_from
    if c.init_from == "resume":
        folder = c.out_dir or newest_run(Path("out"))
    found = open_checkpoint(folder, c.checkpoint)
    model, tokenizer = found.load_model(), Tokenizer.load(found.folder)
    settings = found.meta["config"]
    if settings.get("mask_documents"):
        model.document_start = tokenizer.eot
    facts = {"parameters": parameter_count(model), "iter_num": found.meta["iter_num"],
             "tokens": found.meta["tokens"]}
    return Subject(str(found.folder), model, tokenizer, Path(folder), settings, facts)


def parameter_count(model):
    # of a quantized model too, which has buffers in their place
    return sum(tensor.numel() for tensor in model.state_dict().values())


# ---------------------------------------------------------------------- loss


def dataset_scores(c, subject, runtime):
    """Return {dataset: its scores} of the dataset that is asked for, or of those of the run."""
    datasets = [c.dataset]
    if not c.dataset:
        if "dataset" not in subject.settings:
            raise UserError(f"{subject.name} does not say what it was trained on; give --dataset=, "
                            "--text=, --tasks= or --harness=")
        datasets = parse_mix(subject.settings.get("mix", ""), subject.settings["dataset"])
    # how much of each
    blocks = None
    if c.eval_tokens:
        blocks = math.ceil(c.eval_tokens / subject.model.config.block_size)

    # one after the other
    scores, token_bytes = {}, subject.tokenizer.token_bytes()
    for name in datasets:
        if load_tokenizer(name).spec != subject.tokenizer.spec:
            raise UserError(f"{name} is prepared with another tokenizer than that of "
                            f"{subject.name}; prepare its text with the same one, or give --text=")
        label = f"{dataset_folder(name).name}/{c.split}"
        scores[label] = split_loss(subject.model, TokenReader(name, c.split), token_bytes, blocks,
                                   c.batch_size, runtime, progress_line(label, runtime))
        runtime.print_main(f"{label}: {loss_text(scores[label])}")
    return scores


def text_scores(c, subject, runtime):
    """Return {file: its scores}."""
    try:
        text = Path(c.text).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"text={c.text!r}: cannot be read ({error}); name a file of UTF-8 "
                        "text") from error
    scorer = make_scorer(c, subject, runtime)
    scores = text_loss(scorer, text, c.stride, progress_line(c.text, runtime))
    runtime.print_main(f"{c.text}: {loss_text(scores)}\n  perplexity {scores['perplexity']:,.2f} "
                       f"per token, {scores['word_perplexity']:,.2f} per word "
                       f"({scores['words']:,} words)")
    return {c.text: scores}


def loss_text(scores):
    """Return the scores of a split or of a text in words."""
    words = f"loss {scores['loss']:.4f} nats per token"
    if "bits_per_byte" in scores:
        words += f", {scores['bits_per_byte']:.4f} bits per byte"
    return f"{words} ({scores['tokens']:,} tokens, {scores['bytes']:,} bytes)"


def make_scorer(c, subject, runtime):
    tokens_at_once = c.batch_size * subject.model.config.block_size
    return Scorer(subject.model, subject.tokenizer, runtime, tokens_at_once)


# ---------------------------------------------------------------------- tasks


def suite_scores(c, suite, subject, runtime):
    """Return {task or group: its result}."""
    scorer = make_scorer(c, subject, runtime)
    results = score_suite(suite, scorer, partial(progress_line, runtime=runtime))
    if scorer.cut:
        runtime.print_main(f"{scorer.cut:,} requests were longer than the model's block_size of "
                           f"{subject.model.config.block_size} tokens and lost their first ones")
    return results


def harness_scores(c, subject, runtime):
    """Return {the harness's task or group: its result}."""
    from evaluation.harness import run_harness  # imports the whole harness

    shots = c.shots
    if shots == 0:
        shots = None  # each task's own number
    return run_harness(c.harness.split(","), make_scorer(c, subject, runtime), shots)


def progress_line(label, runtime):
    """Return a function of the share that is done, which shows a line of progress."""
    share = 0.0
    line = Progress(label, lambda: share)

    def show(done):
        nonlocal share
        share = min(1.0, done)
        if runtime.is_main:
            line.show()

    return show


# ---------------------------------------------------------------------- results


def write_results(folder, results):
    """Write evaluation.json. Print the scores of tasks as a table, and draw evaluation.png."""
    with naming_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "evaluation.json", results)
    scores = {**results.get("harness", {}), **results.get("tasks", {})}
    if scores:
        published = read_published()
        print(table(scores, published))
        draw(folder / "evaluation.png", scores, published, results["model"]["name"])


if __name__ == "__main__":
    run(main)
