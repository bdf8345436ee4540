"""Climb the ladder of language models: from counting to the transformer, on the same text.

    python climb.py                                      # data/stdlib, ten minutes on two CPU cores
    python climb.py --dataset=shakespeare_char --order=7
    python climb.py --dataset=ptb --model=kneser_ney --order=5 --test=ptb_test   # of words
    python climb.py --model=lstm --seconds=600

Trains each rung, a file of ladder/, on the training tokens of a dataset that prepare.py wrote, and
measures all on the same validation tokens. Prints a table and a sample of each; draws climb.png,
the loss over the seconds of training. Writes out/ladder_<dataset>/<rung>/: model.safetensors and
meta.json. A rung that is finished is not trained again.
"""

import math
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

import train
from configurator import UserError, check_settings, configure, run
from formats.dataset import dataset_folder
from formats.files import flush_to_disk, naming_write_errors, read_json, write_json
from formats.shards import TokenReader
from ladder.masked import MaskedGPT, blank_losses, choose_blanks, special_ids
from ladder.neural import NEURAL, blanks_filled, make_neural, train_neural
from ladder.ngram import NGram
from ladder.transformer import Transformer, learning_curve
from ladder.word_scores import describe, draw_words
from ladder.word_vectors import WordVectors, words_of
from runtime.terminal import Progress, say
from text.tokenizer import Tokenizer, load_tokenizer

NGRAMS = ("maximum_likelihood", "add_k", "kneser_ney")
CONFIG = Path(__file__).parent / "config"
TRANSFORMERS = {"gpt": ["train_stdlib.py"], "modern": ["train_stdlib.py", "modern.py"]}
RUNGS = (*NGRAMS, *NEURAL, *TRANSFORMERS, "vectors")
LIMITS = {"order": ">= 1, <= 100", "short_order": ">= 1, <= 100", "added": "> 0",
          "train_tokens": ">= 1", "eval_tokens": ">= 2", "seconds": ">= 0", "max_iters": ">= 0",
          "width": ">= 0", "layers": ">= 0", "dropout": ">= 0, < 1", "learning_rate": ">= 0",
          "draws": ">= 0", "sample_tokens": ">= 1", "temperature": "> 0", "epochs": ">= 1",
          "model": ("", *RUNGS)}

# of the table: (key, width, number format)
COLUMNS = (("bits_per_byte", 14, ".4f"), ("loss", 8, ".4f"), ("perplexity", 11, ".2f"),
           ("test", 9, ".2f"), ("blanks", 8, ".4f"), ("size", 18, ""), ("seconds", 9, ".1f"),
           ("tokens_per_s", 13, ",.0f"))


def main(
    dataset="stdlib",  # data/<dataset>, made by prepare.py; or a folder's path
    model="",  # one rung alone; '': all of them
    out_dir="",  # where the rungs go ('': out/ladder_<dataset>)
    test="",  # another dataset with the same tokenizer, whose validation split is measured too
    train_tokens=20_000_000,  # read the first so many training tokens, at most
    eval_tokens=200_000,  # measure on the first so many validation tokens, at most
    seed=1337,  # of the first weights, the data order, dropout and the samples
    # n-grams
    order=6,  # of kneser_ney and mlp: tokens in an n-gram
    short_order=3,  # of maximum_likelihood and add_k, which need more text than there is
    added=0.1,  # add_k: what is added to each count
    # neural models
    seconds=45.0,  # train each for so long, without evaluations
    max_iters=0,  # train for so many iterations instead
    width=0,  # hidden units; 0: the rung's own, as in the next two
    layers=0,  # of rnn, gru, lstm and masked
    learning_rate=0.0,  # at the peak
    draws=2000,  # of 4,000 tokens and more, train on so many at once (ladder/sampled.py); 0: all
    dropout=0.0,  # 0.1 and more where there are many passes over the text
    # word vectors
    epochs=1,  # passes over the text
    words="",  # whose neighbours are shown ('': some common ones)
    analogies="",  # a file of questions as word2vec's questions-words.txt
    judgements="",  # a file of people's scores of pairs of words, as WordSim-353's
    # samples
    start="\n",  # the text that samples continue; '': the beginning of a document
    sample_tokens=200,  # tokens in a sample
    temperature=0.8,  # 1: the model's own probabilities; less: the probable is more so
    blanks="",  # a text whose [MASK]s `masked` fills; '': some of the validation tokens
):
    c = SimpleNamespace(**locals())
    check_settings(vars(c), LIMITS)
    data = read_data(c)
    folder = Path(out_dir or Path("out") / f"ladder_{dataset_folder(dataset).name}")

    # Climb: train the rungs that are missing, and measure them.
    rungs = [model] if model else RUNGS
    for number, name in enumerate(rungs, start=1):
        say(f"{name}, rung {number} of {len(rungs)}")
        row = climb_rung(name, c, data, folder / name)
        say(f"\n--- {name}\n{row['sample']}\n")

    # Show them, beside those of earlier calls that were measured alike.
    rows = {name: read_json(folder / name / "meta.json") for name in RUNGS
            if (folder / name / "meta.json").is_file()}
    rows = {name: row for name, row in rows.items() if row.get("measuring") == measuring_of(c)}
    say(table(rows, data))
    draw(folder / "climb.png", rows)


# ---------------------------------------------------------------------- data


class Data(NamedTuple):
    """The tokens that all rungs share."""
    tokenizer: Tokenizer
    train: np.ndarray  # (N,) ids
    val: np.ndarray  # (M,) ids; all but the first are predicted
    test: np.ndarray | None  # the same of another dataset
    prompt: list  # of the samples, ids
    note: str  # which tokens are measured, in words


def read_data(c):
    """Return the Data that the settings name."""
    others = [c.test] if c.test else []
    tokenizer = load_tokenizer(c.dataset, *others)
    test = None
    if c.test:
        test = read_tokens(c.test, "val", tokenizer, c.eval_tokens)
    val = read_tokens(c.dataset, "val", tokenizer, c.eval_tokens)
    train = read_tokens(c.dataset, "train", tokenizer, c.train_tokens)
    prompt = tokenizer.encode_prompt(c.start)
    if not prompt and tokenizer.eot is None:
        raise UserError("start='': this dataset has no documents, with whose beginning samples "
                        "could begin; give them a text to continue")
    note = f"measured on {len(val) - 1:,} validation tokens, trained on up to {len(train):,}"
    return Data(tokenizer, train, val, test, prompt or [tokenizer.eot], note)


def read_tokens(dataset, split, tokenizer, limit):
    """Return the first tokens of a split, (N,) int32. Before words there is a line end, so that the
    first word is predicted too. Raises UserError where one is not in the vocabulary."""
    reader = TokenReader(dataset, split)
    count = min(reader.tokens, limit)
    tokens = np.frombuffer(reader.read(0, count), reader.dtype).astype(np.int32)
    if tokens.max() >= tokenizer.vocab_size:
        raise UserError(f"{reader.folder}: token {tokens.max()} is not one of its tokenizer's "
                        f"{tokenizer.vocab_size:,}; prepare the dataset again")
    if count < 2:
        raise UserError(f"{reader.folder}: the {split} split has one token, and nothing to "
                        "predict; prepare more text")
    if tokenizer.kind == "words" and tokens[0] != tokenizer.eot:
        tokens = np.insert(tokens, 0, tokenizer.eot)
    return tokens


# ---------------------------------------------------------------------- one rung


def climb_rung(name, c, data, folder):
    """Return what is known of a rung, its meta.json. What an earlier call did is not done again."""
    training, measuring = training_settings(name, c, data), measuring_of(c)
    meta, model = {}, None
    if (folder / "meta.json").is_file():
        meta = read_json(folder / "meta.json")

    # Train it.
    if meta.get("training") != training:
        started = time.perf_counter()
        if name in TRANSFORMERS:
            curve = train_transformer(name, c, folder)
        else:
            model = make_model(name, c, data.tokenizer)
            curve = train_model(name, model, c, data)
            save_model(folder, model)
        seconds = time.perf_counter() - started
        if curve:
            seconds = curve[-1][0]  # without evaluations
        meta = {"training": training, "seconds": seconds, "curve": curve}
        write_json(folder / "meta.json", meta)

    # Measure it.
    if meta.get("measuring") != measuring:
        model = model or load_model(name, c, data.tokenizer, folder)
        meta |= {"measuring": measuring, **measure(model, c, data)}
        if name == "vectors":
            draw_words(folder / "words.png", model, c.words)
        write_json(folder / "meta.json", meta)
    return meta


def training_settings(name, c, data):
    """Return what the weights of a rung depend on."""
    keys = ["seconds", "max_iters", "seed", "width", "layers", "learning_rate", "draws",
            "dropout"]
    if name == "mlp":
        keys.append("order")
    if name == "vectors":
        keys = ["seed", "epochs"]
    if name in NGRAMS:
        keys = ["order"] if name == "kneser_ney" else ["short_order"]
    if name == "add_k":
        keys.append("added")
    settings = {key: getattr(c, key) for key in keys}
    return {"dataset": c.dataset, "tokens": len(data.train), **settings}


def measuring_of(c):
    """Return what the scores of a rung depend on, beside its weights."""
    keys = ("test", "eval_tokens", "seed", "start", "sample_tokens", "temperature", "blanks",
            "words", "analogies", "judgements")
    return {key: getattr(c, key) for key in keys}


def make_model(name, c, tokenizer):
    """Return the untrained model of a rung. All models but `masked` and `vectors` have

        losses(tokens)      (N,) ids of a text to (N - 1,) float64: nats of each but the first
        start()             the state before the first token
        step(token, state)  the log-probabilities of the next token, (V,) float64; the new state
        size()              (a number, "parameters" or "bytes")
        state_dict(), load_state_dict(tensors)
    """
    if name == "vectors":
        return WordVectors(seed=c.seed)
    if name in NEURAL:
        return make_neural(name, tokenizer, c)
    order = c.order if name == "kneser_ney" else c.short_order
    return NGram(order, tokenizer.vocab_size, name, c.added, tokenizer.eot)


def train_model(name, model, c, data):
    """Train a model; return its learning curve, [(seconds, loss)]; [] for one without."""
    if name in NEURAL:
        return train_neural(name, model, data.train, data.val, data.tokenizer, c)
    # The others have no curve, but a line of progress.
    share = 0.0
    progress = Progress(name, lambda: share)

    def show(done):
        nonlocal share
        share = done
        progress.show()

    if name == "vectors":
        ids, vocabulary = words_of(data.train, data.tokenizer)
        model.fit(ids, vocabulary, c.epochs, show_progress=show)
    else:
        model.fit(data.train, show)
    return []


def train_transformer(name, c, folder):
    """Train a transformer by train.py, in a folder; return its learning curve."""
    # The settings of train.py: its config files, and what is asked for here.
    argv = [str(CONFIG / file) for file in TRANSFORMERS[name]]
    iterations = c.max_iters or 10**9  # until the seconds are over
    argv += [f"--dataset={c.dataset}", f"--out_dir={folder}", f"--seed={c.seed}",
             f"--max_minutes={c.seconds / 60}", f"--max_iters={iterations}",
             f"--lr_decay_iters={iterations}", "--eval_interval=100", "--eval_tokens=20480",
             "--log_interval=20"]
    train.main(**configure(train.main, argv))
    return learning_curve(folder)


def save_model(folder, model):
    """Write model.safetensors; the meta.json of an older one goes first."""
    import torch
    from safetensors.torch import save_file

    # Write the new model aside; a model without meta.json is not finished.
    tensors = {key: torch.as_tensor(value) for key, value in model.state_dict().items()}
    path, aside = folder / "model.safetensors", folder / "model.tmp"
    with naming_write_errors(path, "run the same command again"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "meta.json").unlink(missing_ok=True)
        save_file(tensors, aside)
        flush_to_disk(aside)
        os.replace(aside, path)


def load_model(name, c, tokenizer, folder):
    """Return the model of a rung that was saved."""
    from safetensors.torch import load_file

    if name in TRANSFORMERS:
        return Transformer.load(folder)
    model = make_model(name, c, tokenizer)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


# ---------------------------------------------------------------------- measuring


def measure(model, c, data):
    """Return the losses of a model, its size, a sample, and how fast it was drawn."""
    number, unit = model.size()
    scores = {"size": number, "unit": unit}
    if isinstance(model, WordVectors):
        scores["sample"] = describe(model, c.words, c.analogies, c.judgements)
        return scores
    # The same tokens for all: `masked` sees both sides of them, the others the left one.
    places = choose_blanks(data.val, special_ids(data.tokenizer), np.random.default_rng(c.seed))
    if isinstance(model, MaskedGPT):
        scores["blanks"] = float(blank_losses(model, data.val, places).mean())
        scores["sample"] = blanks_filled(model, data.tokenizer, data.val, c.blanks)
        return scores
    # What each token costs, after those before it.
    losses = model.losses(data.val)
    scores |= {"loss": float(losses.mean()), "blanks": float(losses[places - 1].mean())}
    if data.test is not None:
        scores["test_loss"] = float(model.losses(data.test).mean())
    # Of words, the text is not known again from the tokens.
    if data.tokenizer.kind != "words":
        text_bytes = int(data.tokenizer.token_bytes()[data.val[1:]].sum())
        nats = scores["loss"] * (len(data.val) - 1)
        scores["bits_per_byte"] = nats / math.log(2) / text_bytes

    # A sample.
    started, rng = time.perf_counter(), np.random.default_rng(c.seed)
    ids = draw_sample(model, data.prompt, c.sample_tokens, c.temperature, rng)
    scores["tokens_per_s"] = (len(data.prompt) + len(ids)) / (time.perf_counter() - started)
    scores["sample"] = data.tokenizer.decode([*data.prompt, *ids])
    return scores


def draw_sample(model, prompt, count, temperature, rng):
    """Return `count` ids that continue a prompt, each drawn from the model's probabilities."""
    # Read the prompt.
    state = model.start()
    for token in prompt:
        log_p, state = model.step(token, state)
    ids = []
    for _ in range(count):
        # Sharpen the distribution, and draw by its cumulative probabilities.
        weights = np.exp((log_p - log_p.max()) / temperature)
        cumulative = weights.cumsum()
        token = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
        ids.append(token)
        log_p, state = model.step(token, state)
    return ids


# ---------------------------------------------------------------------- the table, the picture


def table(rows, data):
    """Return the rungs as text, one in a line; what one of them has not is a dash."""
    lines = [data.note, f"{'rung':<20}" + "".join(f"{key:>{width}}" for key, width, _ in COLUMNS)]
    # A line for each rung.
    for name, row in rows.items():
        cells = {**row, "size": f"{row['size']:,} {row['unit'][:6]}"}
        if "loss" in row:
            cells["perplexity"] = perplexity(row["loss"])
        if "test_loss" in row:
            cells["test"] = perplexity(row["test_loss"])
        line = f"{name:<20}"
        for key, width, number_format in COLUMNS:
            text = "-"
            if key in cells:
                text = format(cells[key], number_format)
            line += text.rjust(width)
        lines.append(line)
    lines.append("loss: nats per token. test: perplexity there. blanks: nats of 15% of the tokens, "
                 "which masked sees from both sides, the others from the left")
    return "\n".join(lines)


def perplexity(loss):
    with np.errstate(over="ignore"):
        return float(np.exp(loss))


def draw(path, rows):
    """Draw the loss over the seconds of training; models without a curve are points. `masked` has
    no such loss."""
    rows = {name: row for name, row in rows.items() if "loss" in row}
    if not rows:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # A line, or a point, for each rung.
    figure, axes = plt.subplots(figsize=(8, 5))
    for name, row in rows.items():
        seconds, losses = zip(*(row["curve"] or [(row["seconds"], row["loss"])]), strict=True)
        axes.plot(seconds, losses, "o-", markersize=4, label=f"{name} {row['loss']:.3f}")
    axes.set(xlabel="seconds of training", ylabel="validation loss, nats per token")
    axes.legend()
    figure.tight_layout()
    with naming_write_errors(path, "run the same command again"):
        figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    run(main)
