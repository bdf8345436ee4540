"""From settings to what trains: the batch sizes, and a model that is wrapped, compiled and given
its optimizers in the one order that works. train.py and bench.py both set up by it."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from configurator import UserError
from formats.checkpoint import Checkpoint, open_checkpoint
from formats.weights import empty_model
from model import GPT, GPTConfig
from posttraining.adapter import check_base, saved_base
from posttraining.lora import add_lora, describe_lora
from posttraining.objectives import LanguageModel, make_objective
from posttraining.reference import load_reference, losses_of_base
from posttraining.vocabulary import pad_vocab_size
from runtime.cpu import use_fast_dropout
from runtime.device import describe
from runtime.kernels import can_compile, compile_blocks, compile_model, should_compile, use_fp8
from runtime.memory import (
    available_memory,
    checkpoint_activations,
    estimate_memory,
    fits_in_memory,
)
from runtime.processes import Runtime
from runtime.seeds import seed_for
from training.loss import LOGITS_AT_ONCE, chunk_losses
from training.optim import adamw, muon_and_adamw
from training.resume import MODEL_KEYS, is_gpt2_name
from training.sequences import Mixture, evaluation_starts, parse_mix

# An estimate of the memory that is so many times what there is cannot be right by chance.
TOO_MANY_TIMES = 4
# From so many layers on, those of GPT-2 medium, blocks are compiled one by one: a single graph of
# all takes longer to compile with each layer.
MANY_LAYERS = 24
# A micro-step of so many tokens fills a GPU. With GPT-2's vocabulary it has fewer than 2**31
# logits, the most that kernels can number in 32 bits.
TOKENS_AT_ONCE = 2**15


class BatchSizes(NamedTuple):
    """How the sequences of an iteration are shared out."""
    batch_size: int  # sequences of a micro-step, on each device
    micro_steps: int  # of an iteration, on each device


class Training(NamedTuple):
    """What an update needs."""
    model: torch.nn.Module  # the GPT itself
    wrapped: torch.nn.Module  # the same, in DDP or FSDP2 and compiled, to be called
    objective: torch.nn.Module  # what it is trained for, around it (posttraining/objectives.py)
    optimizers: list
    peak_rates: list  # for each optimizer, the peak learning rate of each of its groups
    scaler: torch.amp.GradScaler  # of float16's gradients; else it does nothing


class Run(NamedTuple):
    """All that the loop needs."""
    c: SimpleNamespace  # the settings
    requested: dict  # the same, as they were given: a checkpoint keeps these
    runtime: Runtime
    sizes: BatchSizes
    tokens_per_iter: int
    train_data: Mixture
    val_data: Mixture
    run_dir: Path
    checkpoint: Checkpoint | None  # that the run resumes
    tokenizer: object  # of the data and the model
    training: Training
    suite: dict  # the tasks to score, see evaluation/suite.py


def split_batch(c, world_size):
    """Return the BatchSizes of one iteration.

    total_batch_size gives the tokens of an iteration; where it is 0, gradient_accumulation_steps
    gives its micro-steps over all devices. Raises UserError with the nearest number that divides.
    """
    unit = c.batch_size * c.block_size * world_size
    total, steps = c.total_batch_size, c.gradient_accumulation_steps
    # by tokens
    if total:
        if total % unit:
            nearest = max(1, round(total / unit)) * unit
            raise UserError(
                f"total_batch_size={total:,} is not a multiple of batch_size * block_size * "
                f"processes = {c.batch_size} * {c.block_size} * {world_size} = {unit:,}; the "
                f"nearest is {nearest}")
        return BatchSizes(c.batch_size, total // unit)
    # by micro-steps
    if steps % world_size:
        nearest = max(1, round(steps / world_size)) * world_size
        raise UserError(f"gradient_accumulation_steps={steps} is shared out over {world_size} "
                        f"processes and must be a multiple of them; the nearest is {nearest}")
    return BatchSizes(c.batch_size, steps // world_size)


def model_config(c, vocab_size):
    """Return the settings' GPTConfig. Raises UserError for sizes that do not fit together."""
    try:
        return GPTConfig(vocab_size=pad_vocab_size(vocab_size),
                         **{key: getattr(c, key) for key in MODEL_KEYS})
    except ValueError as error:
        raise UserError(str(error)) from error


def make_model(c, vocab_size, checkpoint):
    """Return (the GPT that the run starts with, on the CPU; what its weights are from, or None).

    checkpoint: the one that the run resumes, or None. vocab_size: the dataset's. Raises UserError
    where the weights are of another size than the settings.
    """
    # a resumed LoRA run begins with its base too: load_trainer adds what it has trained
    init_from, resumed = c.init_from, checkpoint
    if c.lora_rank and resumed:
        init_from, checkpoint = saved_base(resumed), None
    if c.lora_rank and init_from == "scratch":
        raise UserError(f"lora_rank={c.lora_rank} with init_from='scratch': LoRA changes a trained "
                        "model; name one, --init_from=FOLDER of a checkpoint, or gpt2")
    # random weights
    if init_from == "scratch":
        generator = torch.Generator().manual_seed(seed_for(c.seed, "init"))
        return GPT(model_config(c, vocab_size), generator), None
    # OpenAI's weights, or a checkpoint's
    if is_gpt2_name(init_from):
        from exchange.huggingface import load_gpt2

        source, model = init_from, load_gpt2(init_from, c.dropout)
    else:
        if checkpoint is None:
            checkpoint = open_checkpoint(init_from, "best")
        source, model = checkpoint.folder, checkpoint.load_model(c.dropout)
    if c.lora_rank:
        model.base = check_base(model, source, resumed)
    # they must have the sizes of the settings, except that block_size may be cut
    for key in MODEL_KEYS:
        wanted, found = getattr(c, key), getattr(model.config, key)
        can_be_cut = key == "block_size" and wanted < found and init_from != "resume"
        if wanted != found and key != "dropout" and not can_be_cut:
            raise UserError(f"{key}={wanted}, but {source} has {key}={found}; leave {key} out, or "
                            "start from scratch")
    if c.block_size < model.config.block_size:
        crop_block_size(model, c.block_size)
    return model, source


def crop_block_size(model, block_size):
    """Make a GPT forget the positions from `block_size` on, to train it with shorter sequences."""
    model.config = replace(model.config, block_size=block_size)  # others may share the old one
    if not model.config.rope:
        weight = model.transformer.wpe.weight[:block_size].detach().clone()
        model.transformer.wpe = torch.nn.Embedding.from_pretrained(weight, freeze=False)


def build_training(c, model, runtime, new_ids=range(0)):
    """Return the Training of a GPT on the CPU. The order matters, and is this one: whatever changes
    modules; the compiler, where it compiles block by block; DDP or FSDP2, which register or shard
    the parameters as they are then; the compiler, where it traces all of that; last the optimizers,
    which need the final parameters. new_ids: those whose rows LoRA trains too."""
    # change modules
    if c.fp8:
        use_fp8(model, runtime)
    if c.lora_rank:
        generator = torch.Generator().manual_seed(seed_for(c.seed, "lora"))
        add_lora(model, c.lora_rank, c.lora_alpha, c.lora_targets, generator, new_ids)
    if c.activation_checkpointing:
        checkpoint_activations(model)
    chunk_losses(model)
    # wrap and compile: the blocks before, or all of it after
    compiles = can_compile(c.compile, runtime)
    by_block = c.fsdp or c.activation_checkpointing or c.n_layer >= MANY_LAYERS
    if compiles and by_block:
        compile_blocks(model)
    wrapped = runtime.wrap(model, c.fsdp)
    if compiles and not by_block:
        wrapped = compile_model(wrapped)
    # a compiled graph draws its dropout inside its kernels
    if not compiles:
        use_fast_dropout(model, runtime.device)
    # make the optimizers
    optimizers = make_optimizers(c, model, runtime.dtype)
    peak_rates = [rates_of(optimizer) for optimizer in optimizers]
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    return Training(model, wrapped, LanguageModel(wrapped), optimizers, peak_rates, scaler)


def add_objective(c, training, reference, vocab_size, runtime):
    """Return a Training for the objective of the settings c. reference: a Reference or None.
    vocab_size: the tokenizer's."""
    # a reference of its own, in the same chunks, so that what is equal is equal to the last bit; or
    # what LoRA has not changed
    frozen = partial(losses_of_base, training.model)
    if reference:
        frozen = load_reference(reference, training.model, vocab_size, runtime)
        chunk_losses(frozen)
    objective = make_objective(c, training.wrapped, training.model, frozen, vocab_size,
                               LOGITS_AT_ONCE)
    # a checkpoint keeps which one it was
    if reference:
        objective.reference_sha256 = reference.sha256
    return training._replace(objective=objective)


def rates_of(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


def make_optimizers(c, model, dtype):
    """Return the optimizers that the settings ask for; dtype: of matrix products."""
    betas, weight_decay = (c.beta1, c.beta2), c.weight_decay
    if c.lora_rank:
        weight_decay = 0.0  # it would pull towards the base
    if c.optimizer == "adamw":
        return [adamw(model, c.learning_rate, weight_decay, betas)]
    return muon_and_adamw(model, c.learning_rate, c.weight_decay, betas, c.muon_lr, c.embed_lr,
                          dtype)


def fit_memory(training, sizes, c, runtime):
    """Return BatchSizes that fit the memory of each process's device and use it, for the same
    iterations: at first as many sequences as TOKENS_AT_ONCE, unless raise_batch_size is off; while
    a trial of a micro-step runs out of memory, at most half as many, and so on.

    With FSDP2 the estimate of the memory decides and not a trial, in which a process that runs out
    of memory would leave the others waiting for it. Raises UserError where one sequence is too
    much.
    """
    sequences, given = sizes.batch_size * sizes.micro_steps, sizes.batch_size
    divisor = partial(largest_divisor, sequences, unit=training.objective.group)
    is_sharded = c.fsdp and runtime.world_size > 1
    largest = given
    if c.raise_batch_size:
        largest = max(given, TOKENS_AT_ONCE // c.block_size)
    batch_size = divisor(largest)

    # Begin where the estimate fits; where it is all there is, leave room for its error.
    least_available = -runtime.all_max(-available_memory(runtime.device))[0]
    smallest = given
    if is_sharded:
        smallest, least_available = training.objective.group, 0.8 * least_available
    while batch_size > smallest and (
            sum(memory_needed(c, training.model, batch_size, runtime)) > least_available):
        batch_size = divisor(batch_size - 1)

    # The trial, with room for AdamW's state, which is made in the first update.
    state_bytes = 8 * sum(p.numel() for p in training.model.parameters() if p.requires_grad)
    if any(optimizer.state for optimizer in training.optimizers):
        state_bytes = 0
    while not is_sharded and not fits_in_memory(
            runtime, partial(try_micro_step, training, batch_size, c.block_size, runtime),
            state_bytes):
        if batch_size == training.objective.group:
            raise UserError(f"out of memory with batch_size={batch_size}, block_size="
                            f"{c.block_size}: lower block_size, n_layer or n_embd")
        batch_size = divisor(max(batch_size // 2, training.objective.group))
        torch.compiler.reset()  # the graphs of a size that does not come again
    return report_sizes(sizes, BatchSizes(batch_size, sequences // batch_size), runtime)


def largest_divisor(number, limit, unit=1):
    """Return the largest divisor of a number that is at most `limit` and a multiple of `unit`."""
    return next(n for n in range(min(number, limit), 0, -1) if number % n == 0 and n % unit == 0)


def report_sizes(given, found, runtime):
    """Return the BatchSizes that fit_memory found; say so where they are others than the given."""
    change = (f"{found.batch_size}, with {found.micro_steps} micro-steps instead of "
              f"{given.micro_steps}: the same iterations")
    if found.batch_size > given.batch_size:
        runtime.print_main(f"batch_size={given.batch_size} is raised to {change}; "
                           f"--raise_batch_size=False keeps {given.batch_size}")
    elif found.batch_size < given.batch_size:
        runtime.print_main(f"batch_size={given.batch_size} does not fit into memory: going on with "
                           f"{change}")
    return found


def try_micro_step(training, batch_size, block_size, runtime):
    """Do a forward and a backward pass, and forget the gradients."""
    try:
        # two tensors, as in an iteration: of one that is given twice torch compiles another graph
        shape = (2, batch_size, block_size)
        tokens, targets = torch.zeros(shape, dtype=torch.int64, device=runtime.device)
        with runtime.accumulate(training.wrapped, last=False), runtime.autocast():
            training.objective(tokens, targets).sum().backward()
    finally:
        training.model.zero_grad()


def describe_run(c, model, batch_size, train_data, val_data, tokens_per_iter, run_dir, runtime):
    """Return the lines that say what will run."""
    sequences = sum(len(starts) for starts in evaluation_starts(val_data, c))
    given_by = "eval_tokens" if c.eval_tokens else "eval_iters * batch_size"
    return [describe(runtime),
            f"model: {model.parameter_count():,} parameters, vocabulary "
            f"{model.config.vocab_size:,}",
            describe_lora(model),
            memory_line(c, model, batch_size, runtime),
            f"data: {train_data.name}, {train_data.tokens:,} tokens, {tokens_per_iter:,} per "
            "iteration",
            f"evaluation: {sequences * c.block_size:,} validation tokens, by {given_by}",
            f"run: {run_dir}"]


def memory_line(c, model, batch_size, runtime):
    """Return one line with an estimate of what the run needs, and what there is."""
    state, activations = memory_needed(c, model, batch_size, runtime)
    needed, available = state + activations, available_memory(runtime.device)
    line = (f"memory: about {needed / 1e9:.2f} GB ({state / 1e9:.2f} weights, gradients and "
            f"optimizer, {activations / 1e9:.2f} activations)")
    if available:
        line += f" of {available / 1e9:.1f}"
        if needed > available:
            line += "; that is too little: lower batch_size, block_size or the model"
    return line


def memory_needed(c, model, batch_size, runtime):
    """Return the MemoryEstimate of one process."""
    estimate = estimate_memory(model, batch_size, runtime.dtype, c.activation_checkpointing,
                               LOGITS_AT_ONCE, should_compile(c.compile, runtime.device))
    if c.fsdp:
        return estimate._replace(state=estimate.state / runtime.world_size)
    return estimate


def check_memory(c, vocab_size, batch_size, runtime):
    """Raise UserError, before a model is made, where training needs so many times the memory that
    there is that no error of the estimate explains it: the system would end it without a word."""
    available = available_memory(runtime.device)
    if c.eval_only or not available:
        return
    if runtime.is_cuda:
        batch_size = 1  # fit_memory finds another
    model = empty_model(model_config(c, vocab_size))
    needed = sum(memory_needed(c, model, batch_size, runtime))
    if needed > TOO_MANY_TIMES * available:
        raise UserError(
            f"training needs about {needed / 1e9:,.0f} GB of memory, and {runtime.device} has "
            f"{available / 1e9:,.1f}: lower batch_size={batch_size}, block_size={c.block_size}, "
            f"n_layer={c.n_layer} or n_embd={c.n_embd}")


def check_combinations(c):
    """Raise UserError for settings that do not work together."""
    if c.fsdp and c.dtype == "float16":
        raise UserError("fsdp=True with dtype='float16': the scaler of float16's gradients needs "
                        "them whole; use --dtype=bfloat16 or float32")
    if c.fsdp and "gsm8k" in c.eval_tasks:
        raise UserError("fsdp=True with eval_tasks='gsm8k': writing solutions needs the whole "
                        "model on each process; use evaluate.py for it")
    if c.eval_tasks_interval % c.eval_interval:
        raise UserError(f"eval_tasks_interval={c.eval_tasks_interval}: tasks are scored at "
                        f"evaluations, so give a multiple of eval_interval={c.eval_interval}")
    if c.fsdp and c.fp8:
        raise UserError("fsdp=True with fp8=True: not written yet; leave one of them out")
    if c.lora_rank and c.optimizer == "muon":
        raise UserError(f"lora_rank={c.lora_rank} with optimizer='muon': its updates are for whole "
                        "matrices, not for their factors; use --optimizer=adamw")


def open_data(c):
    """Return the training and the validation split of the dataset, or of the mix, verified."""
    mix = parse_mix(c.mix, c.dataset)
    splits = [Mixture(mix, split, c.block_size) for split in ("train", "val")]
    for data in splits:
        for reader in data.readers.values():
            reader.verify()
    return splits


def follow_documents(c, train_data, model, tokenizer):
    """Tell the training data and the model which token starts a document, where the settings want
    it. Raises UserError where the tokenizer has none."""
    if c.align_documents and train_data.row:
        raise UserError(f"align_documents=True: {train_data.name} has rows, which begin with a "
                        "document as they are; leave align_documents out")
    for key, part in (("align_documents", train_data), ("mask_documents", model)):
        if not getattr(c, key):
            continue
        if tokenizer.eot is None:
            raise UserError(f"{key}=True: {c.mix or c.dataset} has no end-of-text token, its text "
                            f"is one document; leave {key} out, or prepare several documents, or "
                            "with --tokenizer=bytes")
        part.document_start = tokenizer.eot
