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
from pathlib import Path

import numpy as np
import torch

from configurator import UserError, as_type_of, run
from formats.checkpoint import (
    Checkpoints,
    NoFirstWeights,
    find_checkpoint,
    list_checkpoints,
    load_model,
    load_trainer,
    newest_intact_checkpoint,
    read_meta,
    verify,
)
from model import GPT, IGNORE, GPTConfig
from runtime.cpu import tune_cpu
from runtime.device import describe
from runtime.kernels import compile_model, pick_attention, use_fp8
from runtime.memory import available_memory, checkpoint_activations, estimate_memory
from runtime.processes import full_tensor, setup
from runtime.seeds import seed_for
from runtime.signals import Signals
from text.tokenizer import Tokenizer, gpt2_spec, load_tokenizer
from training.log import Log, draw_loss, open_run
from training.optim import adamw, lr_at, muon_and_adamw, set_rates
from training.resume import check_resumed
from training.sequences import Mixture, evenly_spaced_starts, parse_mix

MODEL_KEYS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "dropout", "rope", "rmsnorm",
              "qk_norm", "mlp", "tied", "zero_init", "softcap", "n_kv_head", "value_embeds",
              "residual_scalars")
NOT_RESUMED = ("out_dir", "init_from", "eval_only")  # settings that a resumed run gives anew
DATA_FAULT = 99  # what processes agree on beside signals, whose numbers are smaller
OTHER_PROCESS = "another process could not read its data"


def main(
    # run
    out_dir="",  # where the run goes ('': out/<dataset>, or out/<a>+<b>)
    init_from="scratch",  # scratch, resume, auto (which of them), a checkpoint's folder, gpt2, ...
    max_iters=600000,  # iterations (optimizer updates) in all
    max_tokens=0,  # or tokens, of which iterations and schedule follow; 0: max_iters
    max_minutes=0.0,  # or minutes, which the schedule follows: another course each time; 0: any
    eval_interval=2000,  # iterations between evaluations, each with a checkpoint
    eval_iters=200,  # an evaluation reads eval_iters * batch_size sequences, the same each time
    eval_only=False,  # evaluate once and stop, writing nothing
    log_interval=1,  # iterations between log lines
    always_save_checkpoint=True,  # save also where the validation loss is not the best so far
    keep_checkpoints=2,  # the newest that are kept, beside the best
    async_checkpoint=False,  # write them in the background, from a copy in the host's memory
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
    align_documents=False,  # training's begin at a document, where one begins in their block
    mask_documents=False,  # attention does not look into the documents before
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
    fp8=False,  # the blocks' matrix products in 8-bit floats: Ada, H100 and later, with torchao
    activation_checkpointing=False,  # compute blocks twice instead of keeping what is in them
    fsdp=False,  # with several processes, each holds a part of the weights and of AdamW's state
):
    config = resolve(dict(locals()))
    asked, resumes = dict(config), config["init_from"] == "resume"
    check(config)
    runtime = setup(device, dtype, backend)
    tune_cpu(runtime.device)
    micro_steps = split_batch(config, runtime.world_size)
    tokens_per_iter = micro_steps * runtime.world_size * batch_size * block_size
    if max_tokens:
        max_iters = lr_decay_iters = config["max_iters"] = -(-max_tokens // tokens_per_iter)
    train_data, val_data = (Mixture(parse_mix(mix, dataset), split, block_size)
                            for split in ("train", "val"))
    for reader in (*train_data.readers.values(), *val_data.readers.values()):
        reader.verify()
    run_dir = run_folder(config)
    place, news = newest_intact_checkpoint(run_dir) if resumes else (None, [])
    model, tokenizer, before = make_model(config, place)
    follow_documents(config, train_data, model, tokenizer)
    if before and not eval_only:
        news += check_resumed(before, config, tokens_per_iter, train_data.shards, place)
    if fp8:
        use_fp8(model, runtime)
    if activation_checkpointing:
        checkpoint_activations(model)
    wrapped = compile_model(runtime.wrap(model, fsdp), compile, runtime)
    optimizer = make_optimizer(model, config, runtime)
    peaks = [group["lr"] for group in optimizer.param_groups]
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    if before:
        load_trainer(place, optimizer, scaler)
    kernels = [pick_attention(model.config, batch_size, runtime)] if (
        runtime.device.type == "cuda" and not eval_only) else []
    if runtime.device.type == "cuda" and not (eval_only or fsdp):
        micro_steps = fit_memory(wrapped, optimizer, config, micro_steps, runtime)
    record = open_run(run_dir, config, before, runtime)
    checkpoints = Checkpoints(run_dir, model, tokenizer, optimizer, scaler, keep_checkpoints,
                              async_checkpoint, runtime)
    runtime.print_main("\n".join([
        describe(runtime), *kernels, f"model: {model.parameter_count():,} parameters, vocabulary "
        f"{model.config.vocab_size:,}", memory_line(model, config, runtime),
        f"data: {train_data.folder}, {train_data.tokens:,} tokens, {tokens_per_iter:,} per "
        "iteration", f"run: {run_dir}", *news]))

    iter_num, best_val_loss = before.get("iter_num", 0), before.get("best_val_loss", math.inf)
    saved_at, evaluated, batches, fault = iter_num, "val_loss" in before, None, None
    log = Log(record, model, config, tokens_per_iter, before, run_dir, runtime)
    if before and (iter_num >= max_iters or log.used() >= 1) and not eval_only:
        runtime.print_main(f"{run_dir} is already at its end, iteration {iter_num}; raise "
                    "--max_iters, --max_tokens or --max_minutes, which it has, to go on")
    with Signals() as signals, checkpoints, runtime:
        while True:
            # the same on all processes: what stops the run, and how much of its minutes is used
            wish, used = runtime.all_max(DATA_FAULT if fault else signals.pending, log.used())
            last, row = iter_num >= max_iters or used >= 1, None
            if eval_only or not evaluated and wish != DATA_FAULT and (
                    last or iter_num % eval_interval == 0):
                row, fault = read(validate, wrapped, model.config, val_data,
                                  eval_iters * batch_size, config["batch_size"], runtime)
                evaluated, wish = True, DATA_FAULT if fault else wish
            is_best = bool(row) and 0 < iter_num and row["val_loss"] < best_val_loss
            best_val_loss = row["val_loss"] if is_best else best_val_loss
            due = row and iter_num > 0 and (is_best or last or always_save_checkpoint)
            if row:
                log.evaluation(iter_num, row)
            if (due or wish and iter_num > saved_at) and not eval_only:
                checkpoints.save({
                    "iter_num": iter_num, "tokens": iter_num * tokens_per_iter, **(row or {}),
                    "best_val_loss": best_val_loss, "bad_steps": log.bad.tolist(),
                    "minutes": log.minutes(),
                    "config": asked, "shards": train_data.shards}, is_best)
                saved_at = iter_num
            if row and runtime.is_main and iter_num and not eval_only:
                draw_loss(run_dir)
            if (eval_only or last) and wish != DATA_FAULT:
                break
            if wish:
                checkpoints.wait()
                obey(int(wish), fault, signals, run_dir, iter_num, runtime)
            if row or wish:
                log.restart_clock()

            share = lr_at(iter_num, 1.0, min_lr / learning_rate, warmup_iters, lr_decay_iters,
                          schedule, decay_share, used if max_minutes else None
                          ) if decay_lr and learning_rate else 1.0
            set_rates(optimizer, peaks, share, iter_num)
            torch.manual_seed(seed_for(seed, "dropout", iter_num, runtime.rank))
            batches = batches or load_batches(train_data, iter_num, micro_steps, config, model,
                                              runtime)
            loss, grad_norm = train_step(wrapped, optimizer, scaler, batches, grad_clip, runtime)
            if iter_num + 1 < max_iters:  # a GPU is still at work while the next tokens are read
                batches, fault = read(load_batches, train_data, iter_num + 1, micro_steps, config,
                                      model, runtime)
            log.iteration(iter_num, learning_rate * share, loss, grad_norm, scaler)
            iter_num, evaluated = iter_num + 1, False


# ---------------------------------------------------------------------- before the first iteration


def check(config):
    """Raise ValueError for a number that no run can have."""
    for key in ("max_bad_steps", "eval_interval", "eval_iters", "log_interval", "keep_checkpoints",
                "batch_size", "block_size", "gradient_accumulation_steps"):
        if config[key] < 1:
            raise UserError(f"{key}={config[key]}: must be 1 or more")
    for key in ("max_iters", "max_tokens", "max_minutes", "total_batch_size", "learning_rate",
                "min_lr", "weight_decay", "grad_clip", "warmup_iters", "muon_lr", "embed_lr"):
        if config[key] < 0:
            raise UserError(f"{key}={config[key]}: must be 0 or more")
    if not 0 < config["decay_share"] <= 1:
        raise UserError(f"decay_share={config['decay_share']}: must be above 0 and at most 1")
    for key, choices in (("optimizer", ("adamw", "muon")), ("schedule", ("cosine", "wsd"))):
        if config[key] not in choices:
            raise UserError(f"{key}={config[key]!r}: choose {' or '.join(choices)}")
    if config["fsdp"] and config["dtype"] == "float16":
        raise UserError("fsdp=True with dtype='float16': the scaler of gradients works on whole "
                         "ones only; use --dtype=bfloat16 or float32")
    if config["fsdp"] and config["fp8"]:
        raise UserError("fsdp=True with fp8=True: not written yet; leave one of them out")
    for key in ("beta1", "beta2"):
        if not 0 <= config[key] < 1:
            raise UserError(f"{key}={config[key]}: must be at least 0 and below 1")


def split_batch(config, world_size):
    """Return the micro-steps of one iteration on each device.

    total_batch_size gives the tokens of an iteration; where it is 0, gradient_accumulation_steps
    gives its micro-steps over all devices. Raises UserError with the nearest that divides.
    """
    unit = config["batch_size"] * config["block_size"] * world_size
    total, steps = config["total_batch_size"], config["gradient_accumulation_steps"]
    if total and total % unit:
        near = max(1, round(total / unit)) * unit
        raise UserError(
            f"total_batch_size={total:,} is not a multiple of batch_size * block_size * processes "
            f"= {config['batch_size']} * {config['block_size']} * {world_size} = {unit:,}; "
            f"the nearest is {near}")
    if not total and steps % world_size:
        near = max(1, round(steps / world_size)) * world_size
        raise UserError(f"gradient_accumulation_steps={steps} is shared out over {world_size} "
                         f"processes and must be a multiple of them; the nearest is {near}")
    return total // unit if total else steps // world_size


def run_folder(config):
    names = [Path(name).name for name in parse_mix(config["mix"], config["dataset"])]
    return Path(config["out_dir"] or Path("out", "+".join(names)))


def is_gpt2_name(init_from):
    """Is it one of OpenAI's models, and not a folder with such a name?"""
    return init_from.startswith("gpt2") and not Path(init_from).is_dir()


def resolve(config):
    """Return the config with init_from='auto' as what it means: resume where there is something to
    resume, else scratch. So one command line begins a run and restarts it."""
    if config["init_from"] != "auto":
        return config
    run_dir = run_folder(config)
    begun = (run_dir / "latest").is_file() or bool(list_checkpoints(run_dir))
    return {**config, "init_from": "resume" if begun else "scratch"}


def checkpoint_defaults(settings):
    """Return the settings that init_from brings: below the command line, above the defaults.

    A resumed run has its own settings, a checkpoint or GPT-2 its sizes.
    """
    init_from = resolve(settings)["init_from"]
    if init_from == "resume":
        place, _ = newest_intact_checkpoint(run_folder(settings))
        return {key: as_type_of(settings[key], value, f"{place}: {key}={value}")
                for key, value in read_meta(place).get("config", {}).items()
                if key in settings and key not in NOT_RESUMED}
    if is_gpt2_name(init_from):
        from formats.huggingface import gpt2_sizes

        return gpt2_sizes(init_from)
    if init_from != "scratch":
        place = find_checkpoint(init_from, "best")
        return {key: as_type_of(settings[key], value, f"{place}: {key}={value}")
                for key, value in read_meta(place)["model"].items()
                if key in MODEL_KEYS and key != "dropout"}
    return {}


def model_config(vocab_size, sizes):
    """Return the GPTConfig; sizes that do not fit together are the user's mistake."""
    try:
        return GPTConfig(vocab_size=vocab_size, **sizes)
    except ValueError as error:
        raise UserError(str(error)) from error


def make_model(config, place):
    """Return (model on the CPU, its tokenizer, meta.json of the checkpoint that is resumed or {}).
    place: that checkpoint, or None.

    Raises UserError where the checkpoint has another size or another vocabulary than the run.
    """
    tokenizer, before = load_tokenizer(*parse_mix(config["mix"], config["dataset"])), {}
    init_from, sizes = config["init_from"], {key: config[key] for key in MODEL_KEYS}
    if init_from == "scratch":
        with NoFirstWeights():  # torch's own are not drawn, ours replace them
            model = GPT(model_config(pad_vocab_size(tokenizer.vocab_size), sizes))
        model.init_weights(torch.Generator().manual_seed(seed_for(config["seed"], "init")))
        return model, tokenizer, before
    if is_gpt2_name(init_from):
        from formats.huggingface import load_gpt2

        model, its_tokenizer = load_gpt2(init_from, config["dropout"]), Tokenizer(gpt2_spec())
        place = init_from
    else:
        before = read_meta(place) if place else {}
        place = place or verify(find_checkpoint(init_from, "best"))
        model, its_tokenizer = load_model(place, config["dropout"]), Tokenizer.load(place)
    if its_tokenizer.spec != tokenizer.spec:
        raise UserError(
            f"{place} was trained with the tokenizer {its_tokenizer.kind} "
            f"({its_tokenizer.vocab_size:,} tokens), "
            f"{config['mix'] or config['dataset']} is prepared with another, "
            f"{tokenizer.kind} ({tokenizer.vocab_size:,}); prepare it with the same one")
    for key, value in sizes.items():
        has = getattr(model.config, key)
        crop = key == "block_size" and value < has and init_from != "resume"
        if value != has and key != "dropout" and not crop:
            raise UserError(f"{key}={value}, but {place} has {key}={has}; leave {key} out, or "
                             "start from scratch")
    if config["block_size"] < model.config.block_size:
        model.crop_block_size(config["block_size"])
    return model, tokenizer, before


def follow_documents(config, data, model, tokenizer):
    """Tell the training data and the model by which token documents begin, where the settings want
    that. Raises UserError where the tokenizer has none."""
    for key, part in (("align_documents", data), ("mask_documents", model)):
        if config[key] and tokenizer.eot is None:
            raise UserError(f"{key}=True: {config['mix'] or config['dataset']} has no end-of-text "
                             f"token, its text is one document; leave {key} out, or prepare "
                             "several documents, or with --tokenizer=bytes")
        part.document_start = tokenizer.eot if config[key] else None


def memory_line(model, config, runtime):
    """Return what the run needs and what there is, in a line. An estimate refuses nothing."""
    state, kept = estimate_memory(model, config["batch_size"], runtime.dtype,
                                config["activation_checkpointing"], model.chunk)
    state /= runtime.world_size if config["fsdp"] else 1
    there = available_memory(runtime.device)
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


def pad_vocab_size(vocab_size):
    """Round a large vocabulary up to a multiple of 128, which matrix units multiply faster."""
    return vocab_size if vocab_size < 1024 else -(-vocab_size // 128) * 128


# ---------------------------------------------------------------------- what stops a run


def read(function, *args):
    """Return (function(*args), None), or (None, its error) where the data cannot be read, so that a
    checkpoint can be saved first."""
    try:
        return function(*args), None
    except (ValueError, OSError) as error:
        return None, error


def obey(wish, fault, signals, run_dir, iter_num, runtime):
    """Do what a signal wishes, or end because of a fault of the data, once it is saved."""
    runtime.all_max(0)  # no process leaves while the main one is still writing
    go_on = f"go on with --init_from=resume --out_dir={run_dir}" if iter_num else "nothing to save"
    if wish == DATA_FAULT:
        why = fault or OTHER_PROCESS
        raise UserError(f"{why} (stopped at iteration {iter_num}: {go_on})") from fault
    runtime.print_main(f"{signal.Signals(wish).name}: saved at iteration {iter_num}"
                + (f"; {go_on}" if wish in signals.STOP else ""))
    if wish in signals.STOP:
        sys.exit(128 + wish)
    signals.saved()


def fit_memory(model, optimizer, config, micro_steps, runtime):
    """Try a micro-step beside room for the optimizer's state; while it is too large for a process's
    device, divide batch_size by its smallest factor, 2 where it is even. Return so many times more
    micro-steps: the iterations stay the same. Raises UserError where one sequence is too much."""
    state = 0 if optimizer.state else 8 * sum(p.numel() for p in model.parameters())
    while True:
        size, full, room = config["batch_size"], False, None
        try:
            room = torch.empty(state, dtype=torch.uint8, device=runtime.device)
            tokens = torch.zeros(size, config["block_size"], dtype=torch.int64,
                                 device=runtime.device)
            with runtime.accumulate(model, last=False), runtime.autocast():
                model(tokens, tokens).sum().backward()
        except torch.OutOfMemoryError:
            full = True
        del room
        optimizer.zero_grad()
        torch.cuda.empty_cache()
        if not runtime.all_max(full)[0]:
            return micro_steps
        if size == 1:
            raise UserError(f"out of memory with batch_size=1, block_size={config['block_size']}: "
                             "lower block_size, n_layer or n_embd")
        factor = next(n for n in range(2, size + 1) if size % n == 0)
        config["batch_size"] = size // factor
        runtime.print_main(f"out of memory with batch_size={size}: going on with {size // factor}, and "
                    f"{micro_steps * factor} micro-steps instead of {micro_steps}: the same "
                    "iterations")
        micro_steps *= factor


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
        raise UserError(f"{data.folder} has token {rows.max()}, the model's vocabulary has "
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
        with runtime.accumulate(model, last):
            with runtime.autocast():
                share = model(tokens, targets).sum() / count
            # DDP and FSDP average gradients over processes, and we want their sum
            scaler.scale(share * runtime.world_size).backward()
        loss += share.detach()
    scaler.unscale_(optimizer)
    grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf))
    loss = runtime.sum(loss)  # so that all processes skip the same updates
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.found_inf = (~(torch.isfinite(loss) & torch.isfinite(grad_norm))).float()
        optimizer.step()
    optimizer.zero_grad()
    return loss, grad_norm


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
    starts = evenly_spaced_starts(data, sequences, T)
    mine = starts[runtime.rank::runtime.world_size]
    rounds = -(-len(starts) // (runtime.world_size * B))
    sums, fault = [], None
    model.eval()
    for i in range(rounds):
        part = mine[i * B:(i + 1) * B]
        padding = np.zeros(B - len(part), np.int64)  # full batches: one shape, compiled once
        places = np.concatenate([part, padding])
        pair, error = read(lambda places=places: to_device(
            data, data.rows(places, T + 1), data.masks(places, T + 1), config, runtime))
        if fault := fault or error:  # told once all processes know: they share the forward passes
            pair = torch.full((2, B, T), 0, device=runtime.device)
        tokens, targets = pair
        targets[len(part):] = IGNORE
        with runtime.autocast():
            losses = model(tokens, targets)
        sums.append(torch.stack([losses.sum(), (targets != IGNORE).sum()]))
    model.train()
    if runtime.all_max(bool(fault))[0]:
        raise fault or UserError(OTHER_PROCESS)
    sums = torch.stack(sums).cpu().double().sum(0)  # waits for the device, once
    total, count = runtime.sum(sums.to(runtime.device) if runtime.world_size > 1 else sums).tolist()
    if not count:
        raise UserError(f"{data.folder}: its mask leaves no target in the {len(starts)} sequences "
                         f"of an evaluation; raise --eval_iters, or prepare the dataset again")
    return total / count


if __name__ == "__main__":
    small, given = str(Path(__file__).parent / "config" / "train_stdlib.py"), sys.argv[1:]
    if all(arg.startswith("--") and arg != "--help" for arg in given) \
            and not {"--init_from=resume", "--init_from=auto"} & set(given) \
            and os.environ.get("RANK", "0") == "0":
        print(f"no config file given: GPT-2 124M's settings, as in nanoGPT; a small one is {small}"
              if given else f"no settings given: taking {small}")
    run(main, more_defaults=checkpoint_defaults, argv=given or [small])
