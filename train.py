"""Train a GPT on token files that prepare.py wrote.

    python train.py                                          # config/train_stdlib.py, 3 minutes
    python train.py config/train_shakespeare_char.py --max_iters=500
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    python train.py --init_from=resume --out_dir=out/stdlib  # go on, with that run's own settings

Writes out/<run>/: metrics.jsonl, loss.png, checkpoints iter_000250/, and `latest` and `best`, which
name one of them. A run is the same on one process or eight, in one go or resumed.
"""

import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from checkpoint import (
    check_resumed,
    draw_loss,
    last_whole,
    load_trainer,
    open_run,
    read_meta,
    save_checkpoint,
    saved,
    verify,
)
from configurator import as_type_of, run
from model import GPT, IGNORE, GPTConfig, NoFirstWeights, find_checkpoint, load_model
from optim import adamw, lr_at, muon_and_adamw, set_rates
from runtime import (
    Signals,
    compile_model,
    describe,
    memory_needed,
    memory_there,
    peak_flops,
    recompute_blocks,
    seed_for,
    setup,
    tune_cpu,
)
from tokenizer import Tokenizer, load_tokenizer
from tokens import Mixture, parse_mix

MODEL_KEYS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "dropout", "rope", "rmsnorm",
              "qk_norm", "mlp", "tied", "zero_init", "softcap", "n_kv_head", "value_embeds",
              "residual_scalars")
NOT_RESUMED = ("out_dir", "init_from", "eval_only")  # settings that a resumed run gives anew
DATA_FAULT = 99  # what processes agree on beside signals, whose numbers are smaller
HALVINGS = 32  # updates that float16's scaler may skip until its scale, from 2**16, is no cause


def main(
    # run
    out_dir="",  # where the run goes ('': out/<dataset>, or out/<a>+<b>)
    init_from="scratch",  # scratch, resume, auto (which of them), a checkpoint's folder, gpt2, ...
    max_iters=600000,  # iterations (optimizer updates) in all
    eval_interval=2000,  # iterations between evaluations, each with a checkpoint
    eval_iters=200,  # an evaluation reads eval_iters * batch_size sequences, the same each time
    eval_only=False,  # evaluate once and stop, writing nothing
    log_interval=1,  # iterations between log lines
    always_save_checkpoint=True,  # save also where the validation loss is not the best so far
    keep_checkpoints=2,  # the newest that are kept, beside the best
    max_bad_steps=10,  # updates in a row that are not numbers, and so skipped, before it stops
    seed=1337,  # of the first weights, the data order and dropout, each on its own
    # weights and biases
    wandb_log=False,  # log there too
    wandb_project="owt",  # its project
    wandb_run_name="",  # its name for the run ('': the run's folder)
    # data
    dataset="openwebtext",  # data/<dataset>, made by prepare.py; or a folder's path
    mix="",  # several datasets and their shares instead of it: fineweb:0.7,mytext:0.3
    total_batch_size=0,  # tokens per iteration over all devices; 0: as the next keys give it
    gradient_accumulation_steps=40,  # micro-steps per iteration over all devices, where that is 0
    batch_size=12,  # sequences per micro-step and device
    block_size=1024,  # tokens per sequence
    # model
    n_layer=12,  # blocks
    n_head=12,  # attention heads
    n_embd=768,  # width
    dropout=0.0,  # 0 is good for pretraining, 0.1 and more for finetuning
    bias=False,  # biases in Linear and LayerNorm; GPT-2 has them
    rope=False,  # rotary positions instead of learned ones
    rmsnorm=False,  # RMSNorm without weights instead of LayerNorm
    qk_norm=False,  # RMSNorm of queries and keys
    mlp="gelu",  # relu2 or swiglu instead
    tied=True,  # the token embedding is the head's matrix
    zero_init=False,  # blocks begin as the identity
    softcap=0.0,  # logits stay within +-softcap; 0: anywhere
    n_kv_head=0,  # heads of keys and values, shared by groups of heads; 0: n_head
    value_embeds=False,  # a token table added to the values of every other layer
    residual_scalars=False,  # each block reads a x + b x0, x0 the embedding
    # optimizer
    optimizer="adamw",  # or muon, for the blocks' matrices, beside AdamW
    learning_rate=6e-4,  # at the peak; with muon that of the head
    muon_lr=0.025,  # of the blocks' matrices, with muon
    embed_lr=0.3,  # of the token embedding, with muon
    weight_decay=1e-1,  # of matrices and embeddings; with muon of the blocks' matrices
    beta1=0.9,  # AdamW
    beta2=0.95,  # AdamW
    grad_clip=1.0,  # the gradient's largest norm; 0: any
    decay_lr=True,  # by the schedule; False: the peak throughout
    schedule="cosine",  # or wsd: the peak, then linearly down over the last decay_share
    decay_share=0.5,  # of lr_decay_iters, with wsd
    warmup_iters=2000,  # iterations of linear warm-up
    lr_decay_iters=600000,  # where the decay ends; usually max_iters
    min_lr=6e-5,  # and what it ends at; usually learning_rate / 10
    # system
    backend="auto",  # between processes: nccl on CUDA, else gloo
    device="auto",  # cuda, mps, cpu, cuda:1
    dtype="auto",  # of matrix products: bfloat16 where native, else float32; float16
    compile="auto",  # torch.compile: True, False; auto: on CUDA, where it works
    activation_checkpointing=False,  # compute blocks twice instead of keeping what is in them
):
    config = resolve(dict(locals()))
    asked, init_from = dict(config), config["init_from"]
    check(config)
    runtime = setup(device, dtype, backend)
    tune_cpu(runtime.device)
    micro_steps = split_batch(config, runtime.world_size)
    tokens_per_iter = micro_steps * runtime.world_size * batch_size * block_size
    train_data, val_data = (Mixture(parse_mix(mix, dataset), split, block_size)
                            for split in ("train", "val"))
    run_dir = run_folder(config)
    place, news = last_whole(run_dir) if init_from == "resume" else (None, [])
    model, tokenizer, before = make_model(config, place)
    if before and not eval_only:
        news += check_resumed(before, config, tokens_per_iter, train_data.shards, place)
    model.to(runtime.device)
    if activation_checkpointing:
        recompute_blocks(model)
    optimizer = make_optimizer(model, config, runtime)
    peaks = [group["lr"] for group in optimizer.param_groups]
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    if before:
        load_trainer(place, optimizer, scaler)
    wrapped = compile_model(runtime.wrap(model), compile, runtime)
    record = open_run(run_dir, config, before, runtime)
    runtime.say("\n".join([
        describe(runtime), f"model: {model.parameter_count():,} parameters, vocabulary "
        f"{model.config.vocab_size:,}", memory_line(model, config, runtime),
        f"data: {train_data.folder}, {train_data.tokens:,} tokens, {tokens_per_iter:,} per "
        "iteration", f"run: {run_dir}", *news]))

    iter_num, best_val_loss = before.get("iter_num", 0), before.get("best_val_loss", math.inf)
    if before and iter_num >= max_iters and not eval_only:
        runtime.say(f"{run_dir} is already at iteration {iter_num} of max_iters={max_iters}; "
                    "raise --max_iters to go on")
    first_iter, saved_at, evaluated = iter_num, iter_num, "val_loss" in before
    bad = torch.tensor(before.get("bad_steps", [0, 0]), dtype=torch.float32, device=runtime.device)
    batches = began = fault = norm_mean = None
    clock, since_clock = time.perf_counter(), 0  # and the iterations since
    with Signals() as signals:
        while True:
            row, is_best, save = {"iter": iter_num, "tokens": iter_num * tokens_per_iter}, False, 0
            due = not evaluated and (iter_num % eval_interval == 0 or iter_num == max_iters)
            if eval_only or due and not fault:
                losses, fault = read(runtime.world_size > 1, validate, wrapped, model.config,
                                     val_data, eval_iters * batch_size, config["batch_size"],
                                     runtime)
                evaluated, row = True, {**row, **(losses or {})}
            if "val_loss" in row:
                record(row)
                runtime.say(f"step {iter_num}: " + ", ".join(
                    f"{key} {value:.4f}" for key, value in row.items() if key.startswith("val")))
                is_best = iter_num > 0 and row["val_loss"] < best_val_loss  # trained, and saved
                best_val_loss = row["val_loss"] if is_best else best_val_loss
                save = iter_num and (is_best or always_save_checkpoint or iter_num == max_iters)
            wish = runtime.agree(DATA_FAULT if fault else signals.wish)  # the same on all processes
            if (save or wish and iter_num > saved_at) and not eval_only:
                if runtime.is_main:
                    save_checkpoint(run_dir, model, tokenizer, optimizer, scaler, {
                        **row, "iter_num": iter_num, "best_val_loss": best_val_loss,
                        "bad_steps": bad.tolist(), "config": asked, "shards": train_data.shards},
                        is_best, keep_checkpoints)
                saved_at = iter_num
            if "val_loss" in row and runtime.is_main and iter_num and not eval_only:
                draw_loss(run_dir)
            if wish or "val_loss" in row:
                clock, since_clock = time.perf_counter(), 0
            if eval_only and not fault or iter_num >= max_iters:
                break
            if wish:
                obey(wish, fault, signals, run_dir, iter_num, runtime)

            share = lr_at(iter_num, 1.0, min_lr / learning_rate, warmup_iters, lr_decay_iters,
                          schedule, decay_share) if decay_lr and learning_rate else 1.0
            lr = learning_rate * share
            set_rates(optimizer, peaks, share, iter_num)
            torch.manual_seed(seed_for(seed, "dropout", iter_num, runtime.rank))
            began = began or time.perf_counter()
            batches = batches or load_batches(train_data, iter_num, micro_steps, config, model,
                                              runtime)
            try:
                loss, grad_norm = train_step(wrapped, optimizer, scaler, batches, grad_clip,
                                             runtime)
            except torch.OutOfMemoryError as error:
                micro_steps = smaller_batch(config, micro_steps, iter_num - first_iter, error,
                                            runtime)
                optimizer.zero_grad(set_to_none=True)
                batches = None
                continue
            bad = count_bad(bad, loss, grad_norm, scaler)
            # on a GPU the step is still under way while the next tokens are read
            batches, fault = read(False, load_batches, train_data, iter_num + 1, micro_steps,
                                  config, model, runtime) if iter_num + 1 < max_iters else (0, 0)
            since_clock += 1
            if iter_num % log_interval == 0:
                loss, norm, skipped, streak = torch.stack([loss, grad_norm, *bad]).tolist()  # waits
                now = time.perf_counter()
                seconds, clock, since_clock = (now - clock) / since_clock, now, 0
                row = {"iter": iter_num, "tokens": (iter_num + 1) * tokens_per_iter, "loss": loss,
                       "grad_norm": norm, "lr": lr, "ms": 1000 * seconds,
                       "tokens_per_s": tokens_per_iter / seconds,
                       **mfu(model, tokens_per_iter / seconds, runtime),
                       **({"bad_steps": int(skipped)} if skipped else {})}
                record(row)
                if math.isfinite(norm):
                    norm_mean = norm if norm_mean is None else 0.98 * norm_mean + 0.02 * norm
                left = (now - began) / (iter_num + 1 - first_iter) * (max_iters - iter_num - 1)
                runtime.say(log_line(row, norm_mean, max_iters, left))
                if streak >= max_bad_steps + (HALVINGS if scaler.is_enabled() else 0):
                    raise ValueError(stop_of_bad_steps(streak, iter_num, run_dir))
            iter_num, evaluated = iter_num + 1, False
    runtime.close()


# ---------------------------------------------------------------------- before the first iteration


def check(config):
    """Raise ValueError for a number that no run can have."""
    for key in ("max_bad_steps", "eval_interval", "eval_iters", "log_interval", "keep_checkpoints",
                "batch_size", "block_size", "gradient_accumulation_steps"):
        if config[key] < 1:
            raise ValueError(f"{key}={config[key]}: must be 1 or more")
    for key in ("max_iters", "total_batch_size", "learning_rate", "min_lr", "weight_decay",
                "grad_clip", "warmup_iters"):
        if config[key] < 0:
            raise ValueError(f"{key}={config[key]}: must be 0 or more")
    for key in ("muon_lr", "embed_lr"):
        if config[key] < 0:
            raise ValueError(f"{key}={config[key]}: must be 0 or more")
    if not 0 < config["decay_share"] <= 1:
        raise ValueError(f"decay_share={config['decay_share']}: must be above 0 and at most 1")
    for key, choices in (("optimizer", ("adamw", "muon")), ("schedule", ("cosine", "wsd"))):
        if config[key] not in choices:
            raise ValueError(f"{key}={config[key]!r}: choose {' or '.join(choices)}")
    for key in ("beta1", "beta2"):
        if not 0 <= config[key] < 1:
            raise ValueError(f"{key}={config[key]}: must be at least 0 and below 1")


def split_batch(config, world_size):
    """Return the micro-steps of one iteration on each device.

    total_batch_size gives the tokens of an iteration; where it is 0, gradient_accumulation_steps
    gives its micro-steps over all devices. Raises ValueError with the nearest that divides.
    """
    unit = config["batch_size"] * config["block_size"] * world_size
    total, steps = config["total_batch_size"], config["gradient_accumulation_steps"]
    if total and total % unit:
        near = max(1, round(total / unit)) * unit
        raise ValueError(
            f"total_batch_size={total:,} is not a multiple of batch_size * block_size * processes "
            f"= {config['batch_size']} * {config['block_size']} * {world_size} = {unit:,}; "
            f"the nearest is {near}")
    if not total and steps % world_size:
        near = max(1, round(steps / world_size)) * world_size
        raise ValueError(f"gradient_accumulation_steps={steps} is shared out over {world_size} "
                         f"processes and must be a multiple of them; the nearest is {near}")
    return total // unit if total else steps // world_size


def run_folder(config):
    names = [Path(name).name for name in parse_mix(config["mix"], config["dataset"])]
    return Path(config["out_dir"] or Path("out", "+".join(names)))


def names_gpt2(init_from):
    """Is it one of OpenAI's models, and not a folder with such a name?"""
    return init_from.startswith("gpt2") and not Path(init_from).is_dir()


def resolve(config):
    """Return the config with init_from='auto' as what it means: resume where there is something to
    resume, else scratch. So one command line begins a run and restarts it."""
    if config["init_from"] != "auto":
        return config
    run_dir = run_folder(config)
    begun = (run_dir / "latest").is_file() or bool(saved(run_dir))
    return {**config, "init_from": "resume" if begun else "scratch"}


def checkpoint_defaults(settings):
    """Return the settings that init_from brings: below the command line, above the defaults.

    A resumed run has its own settings, a checkpoint or GPT-2 its sizes.
    """
    init_from = resolve(settings)["init_from"]
    if init_from == "resume":
        place, _ = last_whole(run_folder(settings))
        return {key: as_type_of(settings[key], value, f"{place}: {key}={value}")
                for key, value in read_meta(place).get("config", {}).items()
                if key in settings and key not in NOT_RESUMED}
    if names_gpt2(init_from):
        from hf import gpt2_sizes

        return gpt2_sizes(init_from)
    if init_from != "scratch":
        place = find_checkpoint(init_from, "best")
        return {key: as_type_of(settings[key], value, f"{place}: {key}={value}")
                for key, value in read_meta(place)["model"].items()
                if key in MODEL_KEYS and key != "dropout"}
    return {}


def make_model(config, place):
    """Return (model on the CPU, its tokenizer, meta.json of the checkpoint that is resumed or {}).
    place: that checkpoint, or None.

    Raises ValueError where the checkpoint has another size or another vocabulary than the run.
    """
    tokenizer, before = load_tokenizer(*parse_mix(config["mix"], config["dataset"])), {}
    init_from, sizes = config["init_from"], {key: config[key] for key in MODEL_KEYS}
    if init_from == "scratch":
        with NoFirstWeights():  # torch's own are not drawn, ours replace them
            model = GPT(GPTConfig(vocab_size=padded(tokenizer.vocab_size), **sizes))
        model.init_weights(torch.Generator().manual_seed(seed_for(config["seed"], "init")))
        return model, tokenizer, before
    if names_gpt2(init_from):
        from hf import load_gpt2

        model, its_tokenizer, place = *load_gpt2(init_from, config["dropout"]), init_from
    else:
        before = read_meta(place) if place else {}
        place = place or verify(find_checkpoint(init_from, "best"))
        model, its_tokenizer = load_model(place, config["dropout"]), Tokenizer.load(place)
    if its_tokenizer.spec != tokenizer.spec:
        raise ValueError(
            f"{place} was trained with the tokenizer {its_tokenizer.kind} "
            f"({its_tokenizer.vocab_size:,} tokens), "
            f"{config['mix'] or config['dataset']} is prepared with another, "
            f"{tokenizer.kind} ({tokenizer.vocab_size:,}); prepare it with the same one")
    for key, value in sizes.items():
        has = getattr(model.config, key)
        crop = key == "block_size" and value < has and init_from != "resume"
        if value != has and key != "dropout" and not crop:
            raise ValueError(f"{key}={value}, but {place} has {key}={has}; leave {key} out, or "
                             "start from scratch")
    if config["block_size"] < model.config.block_size:
        model.crop_block_size(config["block_size"])
    return model, tokenizer, before


def memory_line(model, config, runtime):
    """Return what the run needs and what there is, in a line. An estimate refuses nothing."""
    state, kept = memory_needed(model, config["batch_size"], runtime.dtype,
                                config["activation_checkpointing"])
    there = memory_there(runtime.device)
    tight = there is not None and state + kept > there
    return (f"memory: about {(state + kept) / 1e9:.2f} GB ({state / 1e9:.2f} weights, gradients "
            f"and optimizer, {kept / 1e9:.2f} activations)"
            + (f" of {there / 1e9:.1f}" if there else "")
            + ("; that is too little: lower batch_size, block_size or the model" if tight else ""))


def make_optimizer(model, config, runtime):
    """Return the optimizer that the settings ask for."""
    common = (model, config["learning_rate"], config["weight_decay"],
              (config["beta1"], config["beta2"]))
    if config["optimizer"] == "adamw":
        return adamw(*common)
    return muon_and_adamw(*common, config["muon_lr"], config["embed_lr"], runtime.dtype)


def padded(vocab_size):
    """Round a large vocabulary up to a multiple of 128, which matrix units multiply faster."""
    return vocab_size if vocab_size < 1024 else -(-vocab_size // 128) * 128


# ---------------------------------------------------------------------- what stops a run


def read(at_once, function, *args):
    """Return (function(*args), None), or (None, its error) where the data cannot be read, so that a
    checkpoint can be saved first. at_once: raise it, because other processes wait in `function`."""
    try:
        return function(*args), None
    except (ValueError, OSError) as error:
        if at_once:
            raise
        return None, error


def obey(wish, fault, signals, run_dir, iter_num, runtime):
    """Do what a signal wishes, or end because of a fault of the data, once it is saved."""
    runtime.agree(0)  # no process leaves while the main one is still writing
    go_on = f"go on with --init_from=resume --out_dir={run_dir}" if iter_num else "nothing to save"
    if wish == DATA_FAULT:
        why = fault or "another process could not read its data"
        raise ValueError(f"{why} (stopped at iteration {iter_num}: {go_on})") from fault
    runtime.say(f"{signal.Signals(wish).name}: saved at iteration {iter_num}"
                + (f"; {go_on}" if wish in signals.STOP else ""))
    if wish in signals.STOP:
        runtime.close()
        sys.exit(128 + wish)
    signals.saved()


def smaller_batch(config, micro_steps, done, error, runtime):
    """Divide batch_size by its smallest factor, 2 where it is even; return so many times more
    micro-steps. Raises ValueError where that is no way out."""
    size = config["batch_size"]
    if done > 2 or size == 1 or runtime.world_size > 1:  # other processes wait for this one's sums
        raise ValueError(f"out of memory with batch_size={size}, "
                         f"block_size={config['block_size']}: lower "
                         "batch_size (total_batch_size keeps the tokens per iteration), "
                         "block_size, n_layer or n_embd") from error
    factor = next(n for n in range(2, size + 1) if size % n == 0)
    config["batch_size"] = size // factor
    runtime.say(f"out of memory with batch_size={size}: going on with {size // factor}, and "
                f"{micro_steps * factor} micro-steps instead of {micro_steps}: the same iterations")
    return micro_steps * factor


def count_bad(bad, loss, grad_norm, scaler):
    """Return (2,) on the device: updates skipped because they were not numbers, and those in a row.

    float16's scaler skips some to find its scale: those count in the row, and not in the sum.
    """
    of_loss = ~torch.isfinite(loss)
    skipped = of_loss | ~torch.isfinite(grad_norm)
    return torch.stack([bad[0] + (of_loss if scaler.is_enabled() else skipped),
                        (bad[1] + 1) * skipped])


def stop_of_bad_steps(streak, iter_num, run_dir):
    latest = run_dir / "latest"
    last = latest.read_text("utf-8").strip() if latest.is_file() else ""
    return (f"{streak:.0f} updates in a row up to iteration {iter_num} had a loss or a gradient "
            "that is not a number, and were skipped; "
            + (f"the last good checkpoint is {run_dir / last}" if last else "no checkpoint yet")
            + "; lower learning_rate, or raise max_bad_steps")


# ---------------------------------------------------------------------- the iteration


def load_batches(data, iter_num, micro_steps, config, model, runtime):
    """Return this process's micro-batches of an iteration: [(tokens, targets)], each (B, T) int64.

    Iteration s takes the sequences [s*N, (s+1)*N) of the run, whatever the number of processes.
    """
    B, T, world = config["batch_size"], config["block_size"], runtime.world_size
    steps = iter_num * micro_steps + np.arange(micro_steps)
    sequences = ((steps * world + runtime.rank) * B)[:, None] + np.arange(B)  # (micro_steps, B)
    rows, mask = data.sequences(sequences.ravel(), config["seed"])
    pair = to_device(data, rows, mask, model.config, runtime).view(2, micro_steps, B, T)
    return list(zip(*pair, strict=True))


def to_device(data, rows, mask, config, runtime):
    """Return (2, n, T) int64 on the device, tokens and targets, of rows (n, T + 1) and their mask:
    targets that it does not count are IGNORE."""
    if rows.max() >= config.vocab_size:
        raise ValueError(f"{data.folder} has token {rows.max()}, the model's vocabulary has "
                         f"{config.vocab_size}; prepare the dataset again")
    pair = np.stack([rows[:, :-1], rows[:, 1:]])
    if mask is not None:
        pair[1][~mask[:, 1:]] = IGNORE
    pair = torch.from_numpy(pair)
    if runtime.device.type == "cuda":
        return pair.pin_memory().to(runtime.device, non_blocking=True)
    return pair.to(runtime.device)


def train_step(model, optimizer, scaler, batches, grad_clip, runtime):
    """Do one optimizer update; return (loss, gradient norm) as tensors on the device.

    The loss is per target token: each micro-step's sum is divided by the number of targets over
    all micro-steps and processes, so that neither accumulation nor masks bias it; without any
    target it is 0. An update whose loss or gradient is not a number changes nothing.
    """
    count = runtime.sum(sum((targets != IGNORE).sum() for _, targets in batches)).clamp(min=1)
    loss = torch.zeros((), device=runtime.device)
    for micro_step, (tokens, targets) in enumerate(batches, 1):
        last = micro_step == len(batches)
        with nullcontext() if last or runtime.world_size == 1 else model.no_sync():
            with runtime.autocast():
                share = model(tokens, targets).sum() / count
            # DDP averages gradients over processes, and we want their sum
            scaler.scale(share * runtime.world_size).backward()
        loss += share.detach()
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    loss = runtime.sum(loss)  # so that all processes skip the same updates
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
    else:
        step_if(torch.isfinite(loss) & torch.isfinite(grad_norm), optimizer)
    optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm


def step_if(good, optimizer):
    """Do the update where `good`, a bool on the device, says so. A fused AdamW reads it there, as
    it reads the GradScaler's flag; another optimizer waits for the device."""
    if all(group.get("fused") for group in optimizer.param_groups):
        optimizer.found_inf = (~good).float()
        optimizer.step()
    elif good.item():
        optimizer.step()


def validate(model, config, data, sequences, batch_size, runtime):
    """Return {'val_loss': ...}, nats per token, over about so many sequences of a Mixture in its
    shares, with 'val_bpb' where the bytes of the text are known, and each dataset's own loss."""
    losses = {}
    for (name, reader), weight in zip(data.readers.items(), data.weights, strict=True):
        share = -(-sequences * weight // sum(data.weights))
        losses[f"val_loss_{Path(name).name}"] = evaluate(model, config, reader, share, batch_size,
                                                         runtime)
    row = {"val_loss": data.mean(losses.values())}
    if data.bytes_per_token:
        row["val_bpb"] = row["val_loss"] / math.log(2) / data.bytes_per_token
    return {**row, **losses} if len(losses) > 1 else row


@torch.no_grad()
def evaluate(model, config, data, sequences, batch_size, runtime):
    """Return the mean loss, nats per token, of that many sequences spread over a reader's split.

    The sequences are the same each time and for any number of processes, which share them. Raises
    ValueError where the mask leaves no target in them.
    """
    T, B = config.block_size, batch_size
    starts = data.spread(sequences, T)
    mine = starts[runtime.rank::runtime.world_size]
    rounds = -(-len(starts) // (runtime.world_size * B))
    total, count = 0.0, 0
    model.eval()
    for i in range(rounds):
        part = mine[i * B:(i + 1) * B]
        padding = np.zeros(B - len(part), np.int64)  # full batches: one shape, compiled once
        places = np.concatenate([part, padding])
        tokens, targets = to_device(data, data.rows(places, T + 1), data.masks(places, T + 1),
                                    config, runtime)
        targets[len(part):] = IGNORE
        with runtime.autocast():
            losses = model(tokens, targets)
        total, count = total + losses.sum().item(), count + (targets != IGNORE).sum().item()
    model.train()
    total, count = runtime.sum(torch.tensor([total, count], dtype=torch.float64, device=(
        runtime.device if runtime.world_size > 1 else "cpu"))).tolist()
    if not count:
        raise ValueError(f"{data.folder}: its mask leaves no target in the {len(starts)} sequences "
                         f"of an evaluation; raise --eval_iters, or prepare the dataset again")
    return total / count


# ---------------------------------------------------------------------- what a run leaves


def mfu(model, tokens_per_s, runtime):
    """Return {'mfu': share of the devices' peak FLOP/s}, or {} where the peak is not known."""
    peak = peak_flops(runtime)
    achieved = model.flops_per_token() * tokens_per_s / runtime.world_size
    return {"mfu": achieved / peak} if peak else {}


def log_line(row, norm_mean, max_iters, left):
    share = f" | mfu {row['mfu']:.1%}" if "mfu" in row else ""
    minutes, seconds = divmod(round(left), 60)
    return (f"iter {row['iter']:>{len(str(max_iters))}}/{max_iters} | loss {row['loss']:.4f} | "
            f"norm {row['grad_norm']:.3f} (mean {norm_mean or math.nan:.3f}) | "
            f"lr {row['lr']:.2e} | {row['ms']:.1f} ms | {row['tokens_per_s']:,.0f} tok/s{share} | "
            f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left")


if __name__ == "__main__":
    small, given = str(Path(__file__).parent / "config" / "train_stdlib.py"), sys.argv[1:]
    if all(arg.startswith("--") and arg != "--help" for arg in given) \
            and not {"--init_from=resume", "--init_from=auto"} & set(given) \
            and os.environ.get("RANK", "0") == "0":
        print(f"no config file given: GPT-2 124M's settings, as in nanoGPT; a small one is {small}"
              if given else f"no settings given: taking {small}")
    run(main, more_defaults=checkpoint_defaults, argv=given or [small])
