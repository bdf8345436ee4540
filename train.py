"""Train a GPT on token files that prepare.py wrote.

    python train.py                                          # config/train_stdlib.py, 3 minutes
    python train.py config/train_shakespeare_char.py --max_iters=500
    python train.py config/train_gpt2.py config/modern.py    # configs stack, from left to right
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    python train.py --init_from=resume --out_dir=out/stdlib  # go on, with that run's own settings

Writes out/<run>/: metrics.jsonl, loss.png, checkpoints iter_000250/, and `latest` and `best`, which
name one of them. A run is the same on one process or eight, in one go or resumed.
"""

import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import configurator
from configurator import check_settings

# Those come before torch: they set how long its threads spin (runtime/__init__.py).
# isort: split
import numpy as np
import torch

from evaluation.suite import load_suite
from evaluation.validation import task_scores, validate
from formats.checkpoint import CheckpointWriter, open_newest
from formats.run_folder import RunFolder
from posttraining.objectives import OBJECTIVES, check_objective
from posttraining.reference import open_reference
from posttraining.vocabulary import grow_vocabulary
from runtime.cpu import tune_cpu
from runtime.kernels import pick_attention
from runtime.processes import full_tensor, is_main_process, setup
from runtime.seeds import seed_for
from runtime.signals import Signals
from runtime.terminal import say
from text.tokenizer import check_same_tokenizer, load_tokenizer
from training.batches import OTHER_PROCESS, BatchSource, DataError, tokens_and_targets
from training.log import Log, scores_text
from training.optim import learning_rate_share, set_learning_rates
from training.progress import Progress, handle_signal, load_trainer, save, stop_for_data_error
from training.resume import check_resumed, checkpoint_settings, resolve_init_from, run_folder
from training.sequences import parse_mix
from training.setup import (
    Run,
    add_objective,
    build_training,
    check_combinations,
    check_memory,
    describe_run,
    fit_memory,
    follow_documents,
    make_model,
    open_data,
    split_batch,
)

SMALL_CONFIG = str(Path(__file__).parent / "config" / "train_stdlib.py")
LIMITS = {
    **dict.fromkeys(("max_bad_steps", "eval_interval", "eval_iters", "log_interval", "batch_size",
                     "keep_checkpoints", "block_size", "gradient_accumulation_steps"), ">= 1"),
    **dict.fromkeys(("max_iters", "max_tokens", "max_minutes", "eval_tokens",
                     "eval_tasks_interval", "total_batch_size", "learning_rate", "min_lr",
                     "weight_decay", "grad_clip", "warmup_iters", "muon_lr", "embed_lr",
                     "lr_decay_iters", "lora_rank", "lora_alpha"), ">= 0"),
    **dict.fromkeys(("n_layer", "n_head", "n_embd", "n_kv_head"), "<= 1000000"),
    "decay_share": "> 0, <= 1", "beta1": ">= 0, < 1", "beta2": ">= 0, < 1",
    "beta": "> 0", "temperature": "> 0", "label_smoothing": ">= 0, < 0.5",
    "distill_weight": ">= 0, <= 1", "objective": OBJECTIVES,
    "optimizer": ("adamw", "muon"), "schedule": ("cosine", "wsd"),
    "async_checkpoint": ("auto", "True", "true", "1", "False", "false", "0"),
}


def main(
    # run
    out_dir="",  # the run's folder ('': out/<dataset>, or out/<a>+<b>)
    init_from="scratch",  # scratch, resume, auto (one of these two), a checkpoint's folder, gpt2
    max_iters=600000,  # iterations (optimizer updates) in all
    max_tokens=0,  # stop after this many tokens instead (sets max_iters, lr_decay_iters); 0: off
    max_minutes=0.0,  # stop after so many minutes; the schedule follows the clock; 0: no limit
    eval_interval=2000,  # iterations between evaluations, each of which saves a checkpoint
    eval_tokens=0,  # validation tokens that an evaluation reads, the same each time; 0: eval_iters
    eval_iters=200,  # an evaluation reads eval_iters * batch_size sequences, as in nanoGPT
    eval_tasks="",  # also score tasks, such as 'blimp:1000 hellaswag:500' (see docs/evaluation.md)
    eval_tasks_interval=0,  # iterations between them, a multiple of eval_interval; 0: that itself
    eval_only=False,  # evaluate once and stop, writing nothing
    log_interval=1,  # iterations between log lines
    always_save_checkpoint=True,  # save also where the validation loss is not the best so far
    keep_checkpoints=2,  # how many of the newest to keep, beside the best
    async_checkpoint="auto",  # write them in the background: True, False; auto: on CUDA
    max_bad_steps=10,  # stop after this many NaN or inf updates in a row (each is skipped)
    seed=1337,  # of the first weights, the data order and dropout
    # weights and biases
    wandb_log=False,  # log to Weights & Biases too
    wandb_project="owt",  # the project there
    wandb_run_name="",  # the run's name there ('': the run's folder)
    # data
    dataset="openwebtext",  # data/<dataset>, made by prepare.py; or a folder's path
    mix="",  # several datasets and their shares instead of one: fineweb:0.7,mytext:0.3
    total_batch_size=0,  # tokens per iteration over all devices; 0: the next settings give them
    gradient_accumulation_steps=40,  # micro-steps per iteration over all devices
    batch_size=12,  # sequences per micro-step and device
    raise_batch_size=True,  # on CUDA: to as many as fit, in fewer micro-steps; the same iterations
    block_size=1024,  # tokens per sequence
    align_documents=False,  # start each sequence at a document boundary if its block has one
    mask_documents=False,  # attention does not look into earlier documents
    # model
    n_layer=12,  # blocks
    n_head=12,  # attention heads
    n_embd=768,  # channels
    dropout=0.0,  # 0 is good for pretraining, 0.1 and more for finetuning
    bias=False,  # biases in Linear and LayerNorm; GPT-2 has them
    rope=False,  # rotary positions instead of learned ones
    rmsnorm=False,  # RMSNorm without weights instead of LayerNorm
    qk_norm=False,  # RMSNorm of queries and keys
    mlp="gelu",  # gelu, relu2, swiglu; or gelu_exact, as nanoGPT has it
    tied=True,  # the head's matrix is the token embedding
    zero_init=False,  # each block starts as the identity
    softcap=0.0,  # logits stay within +-softcap; 0: no limit
    n_kv_head=0,  # heads of keys and values, shared by groups of heads; 0: n_head
    value_embeds=False,  # a token table added to the values of every other layer
    residual_scalars=False,  # each block reads a x + b x0, x0 the embedding
    # LoRA
    lora_rank=0,  # train a change of this rank of some matrices, freeze the rest; 0: train all
    lora_alpha=0.0,  # lora_alpha / lora_rank scales the change; 0: 2 * lora_rank
    lora_targets="c_attn",  # which matrices: c_attn c_proj c_fc, or "attn.c_proj c_fc"
    # objective
    objective="lm",  # lm: the next token; of pairs of answers dpo, ipo, reward; distill
    reference="",  # dpo, ipo: the checkpoint they start from; distill: the teacher
    beta=0.1,  # dpo, ipo: how far the model may go from the reference; less is further
    label_smoothing=0.0,  # dpo: the share of pairs that may be labelled the wrong way round
    temperature=1.0,  # distill: of both models' probabilities
    distill_weight=0.9,  # distill: of the teacher's probabilities, beside the targets
    # optimizer
    optimizer="adamw",  # adamw; or muon for the blocks' matrices, beside AdamW
    learning_rate=6e-4,  # at the peak; with muon that of the head
    muon_lr=0.025,  # of the blocks' matrices, with muon
    embed_lr=0.3,  # of the token embedding, with muon
    weight_decay=1e-1,  # of matrices and embeddings; with muon of the blocks' matrices
    beta1=0.9,  # AdamW
    beta2=0.95,  # AdamW
    grad_clip=1.0,  # the largest norm of the gradient; 0: no limit
    decay_lr=True,  # follow the schedule; False: the peak learning rate throughout
    schedule="cosine",  # cosine; or wsd: the peak, then linearly down over the last decay_share
    decay_share=0.5,  # the share of lr_decay_iters over which wsd decays
    warmup_iters=2000,  # iterations of linear warm-up
    lr_decay_iters=600000,  # the iteration where the decay ends; usually max_iters
    min_lr=6e-5,  # the learning rate there; usually learning_rate / 10
    # system
    backend="auto",  # between processes: nccl on CUDA, else gloo
    device="auto",  # cuda, mps, cpu, cuda:1
    dtype="auto",  # of matrix products: bfloat16 where the hardware has it, else float32; float16
    compile="auto",  # torch.compile: True, False; auto: on CUDA, where it works
    fp8=False,  # 8-bit matrix products in the blocks: Ada, H100 and later, with torchao
    activation_checkpointing=False,  # compute blocks twice instead of keeping their activations
    fsdp=False,  # with several processes, each holds a shard of the weights and optimizer state
):
    c = SimpleNamespace(**locals())
    run = set_up(c)
    if c.eval_only:
        with run.runtime:
            scores = validate(run.training, run.val_data, c, run.sizes.batch_size, run.runtime)
            scores |= task_scores(run)
        run.runtime.print_main(scores_text(scores))
    else:
        train(run)


# ---------------------------------------------------------------------- set-up


def set_up(c):
    """Return the Run of the settings c. What is derived from a setting has a name of its own; but
    max_tokens sets max_iters and lr_decay_iters."""
    c.init_from = resolve_init_from(vars(c))
    check_settings(vars(c), LIMITS)
    check_combinations(c)
    requested = dict(vars(c))
    runtime = setup(c.device, c.dtype, c.backend)

    # How an iteration is shared out, and the token files.
    sizes = split_batch(c, runtime.world_size)
    tokens_per_iter = sizes.batch_size * sizes.micro_steps * runtime.world_size * c.block_size
    if c.max_tokens:
        c.max_iters = c.lr_decay_iters = math.ceil(c.max_tokens / tokens_per_iter)
    train_data, val_data = open_data(c)
    check_objective(c, train_data)
    suite = load_suite(c.eval_tasks)

    # The model: this run's own, from other weights, or from scratch.
    run_dir, checkpoint, notices = run_folder(vars(c)), None, []
    if c.init_from == "resume":
        checkpoint, notices = open_newest(run_dir)
        if not c.eval_only:
            notices += check_resumed(checkpoint, c, tokens_per_iter, train_data.shards)
    tokenizer = load_tokenizer(*parse_mix(c.mix, c.dataset))
    reference = open_reference(c, checkpoint)
    if reference:
        own = check_same_tokenizer(tokenizer, reference.folder, c.mix or c.dataset,
                                   may_add=c.objective != "distill")
        reference = reference._replace(vocab_size=own.vocab_size)
    check_memory(c, tokenizer.vocab_size, sizes.batch_size, runtime)
    model, source = make_model(c, tokenizer.vocab_size, checkpoint)
    new_ids = range(0)
    if source:
        own = check_same_tokenizer(tokenizer, source, c.mix or c.dataset, may_add=True)
        new_ids = grow_vocabulary(model, own.vocab_size, tokenizer.vocab_size)
    follow_documents(c, train_data, model, tokenizer)

    # What trains it.
    notices.append(tune_cpu(runtime.device))
    training = build_training(c, model, runtime, new_ids)
    training = add_objective(c, training, reference, tokenizer.vocab_size, runtime)
    if checkpoint:
        load_trainer(checkpoint, training)
    if runtime.is_cuda and not c.eval_only:
        notices.append(pick_attention(model, runtime))
        sizes = fit_memory(training, sizes, c, runtime)

    lines = describe_run(c, model, sizes.batch_size, train_data, val_data, tokens_per_iter, run_dir,
                         runtime)
    runtime.print_main("\n".join(line for line in (*lines, *notices) if line))
    return Run(c, requested, runtime, sizes, tokens_per_iter, train_data, val_data, run_dir,
               checkpoint, tokenizer, training, suite)


# ---------------------------------------------------------------------- the loop


def train(run):
    """Train until the end, a signal, or data that cannot be read."""
    c, runtime, progress = run.c, run.runtime, Progress.of(run.checkpoint)
    with (RunFolder(run.run_dir, c, run.checkpoint, runtime) as folder,
          Signals() as signals,
          CheckpointWriter(run.run_dir, run.tokenizer, run.training.model.config,
                           c.keep_checkpoints, c.async_checkpoint, runtime) as writer,
          runtime):
        log = Log(folder, run.training.model, c, run.tokens_per_iter, run.checkpoint, runtime)
        if run.checkpoint and (progress.iter_num >= c.max_iters or log.time_used() >= 1):
            runtime.print_main(f"{run.run_dir} is already at its end, iteration "
                               f"{progress.iter_num}; raise --max_iters, --max_tokens or "
                               "--max_minutes to go on")
        try:
            train_loop(run, progress, log, signals, writer)
        except DataError as error:
            stop_for_data_error(error, run, progress, log, writer)


def train_loop(run, progress, log, signals, writer):
    """Evaluate, save, stop, update: the four steps of each iteration."""
    c, runtime, training = run.c, run.runtime, run.training
    batches = BatchSource(partial(
        load_batches, run.train_data, sizes=run.sizes, c=c,
        vocab_size=training.model.config.vocab_size, runtime=runtime))
    while True:
        # Every process must take the same branches below, so they agree here, once.
        signal_number, time_used, data_failed = runtime.all_max(
            signals.pending, log.time_used(), batches.error is not None)
        if data_failed:
            raise DataError(batches.error or OTHER_PROCESS)
        iter_num = progress.iter_num
        is_last = iter_num >= c.max_iters or time_used >= 1

        # 1. Evaluate: every eval_interval iterations, and at the end.
        scores, is_best = {}, False
        if progress.evaluated_at != iter_num and (is_last or iter_num % c.eval_interval == 0):
            scores = validate(training, run.val_data, c, run.sizes.batch_size, runtime)
            if is_last or iter_num % (c.eval_tasks_interval or c.eval_interval) == 0:
                scores |= task_scores(run)
            progress.evaluated_at = iter_num
            if iter_num > 0 and scores["val_loss"] < progress.best_val_loss:
                progress.best_val_loss, is_best = scores["val_loss"], True
            log.evaluation(iter_num, scores)

        # 2. Save: after an evaluation, or because a signal asks for it.
        worth_saving = is_best or is_last or c.always_save_checkpoint
        after_evaluation = scores and iter_num > 0 and worth_saving
        for_signal = signal_number and iter_num > progress.saved_at
        if after_evaluation or for_signal:
            save(run, progress, log, writer, scores, is_best)

        # 3. Stop: at the end, or because a signal asks for it.
        if is_last:
            break
        if signal_number:
            handle_signal(int(signal_number), run, progress, signals, writer)
        if scores or signal_number:
            log.restart_clock()  # it times updates alone

        # 4. Update the weights once.
        share = learning_rate_share(c, iter_num, time_used)
        set_learning_rates(training.optimizers, training.peak_rates, share, iter_num)
        torch.manual_seed(seed_for(c.seed, "dropout", iter_num, runtime.rank))
        loss, grad_norm = train_step(training, batches.take(iter_num), c.grad_clip, runtime)
        if iter_num + 1 < c.max_iters:
            batches.prefetch(iter_num + 1)  # while a GPU is still at work on this iteration
        log.iteration(iter_num, c.learning_rate * share, loss, grad_norm)
        progress.iter_num += 1


# ---------------------------------------------------------------------- one iteration


def load_batches(data, iter_num, sizes, c, vocab_size, runtime):
    """Return this process's micro-batches of an iteration: [(tokens, targets)], each (B, T) int64
    on the device.

    Iteration i takes the sequences [i*N, (i+1)*N) of the run, whatever the number of processes.
    """
    B, world_size = sizes.batch_size, runtime.world_size
    steps = iter_num * sizes.micro_steps + np.arange(sizes.micro_steps)  # (micro_steps,)
    firsts = (steps * world_size + runtime.rank) * B  # (micro_steps,)
    numbers = firsts[:, None] + np.arange(B)  # (micro_steps, B)
    rows, mask = data.sequences(numbers.ravel(), c.seed)
    pair = tokens_and_targets(rows, mask, vocab_size, data.name, runtime)
    tokens, targets = pair.view(2, sizes.micro_steps, B, c.block_size)
    return list(zip(tokens, targets, strict=True))


def train_step(training, batches, grad_clip, runtime):
    """Do one optimizer update; return (loss, gradient norm) as tensors on the device.

    The loss is per target token, or per pair of answers: each micro-step's sum is divided by their
    number over all micro-steps and processes, so that neither accumulation nor masks bias it.
    Without any it is 0. An update whose loss or gradient is not finite changes nothing.
    """
    # forward and backward: gradients add up over the micro-steps
    count = sum(training.objective.count(targets) for _, targets in batches)
    count = runtime.sum(count).clamp(min=1)
    loss = torch.zeros((), device=runtime.device)
    for micro_step, (tokens, targets) in enumerate(batches, 1):
        is_last = micro_step == len(batches)
        with runtime.accumulate(training.wrapped, is_last):
            with runtime.autocast():
                share = training.objective(tokens, targets).sum() / count
            # DDP and FSDP average gradients over processes; their sum is what is needed
            training.scaler.scale(share * runtime.world_size).backward()
        loss += share.detach()
    # clip the gradient
    for optimizer in training.optimizers:
        training.scaler.unscale_(optimizer)
    parameters = [p for p in training.model.parameters() if p.grad is not None]
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if grad_clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, grad_clip, grad_norm)
    grad_norm = full_tensor(grad_norm)
    # update, unless something is not finite; on the device, so that the program does not wait
    loss = runtime.sum(loss)
    is_bad = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
    for optimizer in training.optimizers:
        optimizer.found_inf = is_bad.float()
        optimizer.step()
        optimizer.zero_grad()
    training.scaler.update()
    return loss, grad_norm


if __name__ == "__main__":
    if not configurator.has_config(sys.argv[1:]) and is_main_process():
        say(f"no config file given: {SMALL_CONFIG}, below a resumed run's settings and your flags")
    configurator.run(main, more_defaults=checkpoint_settings, default_config=SMALL_CONFIG)
