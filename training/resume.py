"""Where a run starts from, and what a resumed run may change."""

from itertools import zip_longest
from pathlib import Path

from configurator import UserError, as_type_of
from formats.checkpoint import list_checkpoints, open_checkpoint, open_newest, refuse_quantized
from model import GPTConfig
from training.sequences import parse_mix

# The model's settings are GPTConfig's fields; the vocabulary is the dataset's.
MODEL_KEYS = tuple(key for key in GPTConfig.__dataclass_fields__ if key != "vocab_size")
NOT_RESUMED = ("out_dir", "init_from", "eval_only")  # settings that a resumed run gives anew
SAME_RUN = {  # settings that a resumed run may change and still compute the same
    "max_iters", "eval_interval", "eval_tokens", "eval_iters", "eval_tasks",
    "eval_tasks_interval", "log_interval", "always_save_checkpoint", "keep_checkpoints",
    "max_bad_steps", "wandb_log", "wandb_project", "wandb_run_name", "async_checkpoint",
    "reference"}  # whose weights must be the same
SAME_UP_TO_ROUNDING = {  # and the same but for the order of floating-point sums
    "batch_size", "raise_batch_size", "gradient_accumulation_steps", "total_batch_size", "device",
    "dtype", "compile", "backend", "fsdp", "fp8", "activation_checkpointing"}


def run_folder(settings):
    """Return the folder of a run: out_dir, or out/<dataset>, or out/<a>+<b> for a mix."""
    if settings["out_dir"]:
        return Path(settings["out_dir"])
    names = [Path(name).name for name in parse_mix(settings["mix"], settings["dataset"])]
    return Path("out", "+".join(names))


def is_gpt2_name(init_from):
    """Return whether it is meant as one of OpenAI's models, and is no folder of such a name."""
    return init_from.startswith("gpt") and not Path(init_from).is_dir()


def resolve_init_from(settings):
    """Return init_from; for 'auto' what it means: resume where the run's folder has a checkpoint,
    else scratch. So one command line starts a run and restarts it."""
    if settings["init_from"] != "auto":
        return settings["init_from"]
    run_dir = run_folder(settings)
    if (run_dir / "latest").is_file() or list_checkpoints(run_dir):
        return "resume"
    return "scratch"


def checkpoint_settings(settings):
    """Return the settings that init_from brings: below those of the command line, above the
    defaults. A resumed run brings its own settings, another checkpoint or GPT-2 its sizes."""
    init_from = resolve_init_from(settings)
    if init_from == "scratch":
        return {}
    if is_gpt2_name(init_from):
        from exchange.huggingface import gpt2_sizes

        return gpt2_sizes(init_from)
    if init_from == "resume":
        checkpoint, _ = open_newest(run_folder(settings))
        found = {"eval_tokens": 0, **checkpoint.meta["config"]}  # older runs do not say it
        wanted = [key for key in settings if key not in NOT_RESUMED]
    else:
        checkpoint = open_checkpoint(init_from, "best")
        refuse_quantized(checkpoint, "trained")
        found = checkpoint.meta["model"]
        wanted = [key for key in MODEL_KEYS if key != "dropout"]
    return {key: as_type_of(settings[key], found[key], f"{checkpoint.folder}: {key}={found[key]}")
            for key in wanted if key in found}


def check_resumed(checkpoint, c, tokens_per_iter, shards):
    """Return one line for each setting that a resumed run changes. Raises UserError where the run
    would lose its position in its data, or where the data are not the checkpoint's."""
    meta, old = checkpoint.meta, checkpoint.meta["config"]
    new_run = f"or start a new run with these weights: --init_from={checkpoint.folder}"
    # the tokens per iteration, the seed and the mix say which sequences come next
    old_tokens = tokens_per_iter
    if meta["iter_num"]:
        old_tokens = meta["tokens"] // meta["iter_num"]
    if old_tokens != tokens_per_iter:
        raise UserError(f"the run had {old_tokens:,} tokens per iteration and now has "
                        f"{tokens_per_iter:,}, so it would lose its position in the data; give "
                        f"--total_batch_size={old_tokens}, {new_run}")
    if old.get("seed", c.seed) != c.seed:
        raise UserError(f"seed={c.seed}, but the run has seed={old['seed']}, which gives its order "
                        f"of the data; leave seed out, {new_run}")
    old_mix = parse_mix(old.get("mix", c.mix), old.get("dataset", c.dataset))
    if list(old_mix.values()) != list(parse_mix(c.mix, c.dataset).values()):
        raise UserError(f"mix={c.mix!r}, but the run has mix={old['mix']!r}; leave mix out, "
                        f"{new_run}")
    # the checkpoint has the state of its own optimizer, and of what the objective and LoRA trained
    is_saved_as = {"optimizer": c.optimizer, "objective": "lm", "lora_rank": 0,
                   "lora_alpha": c.lora_alpha, "lora_targets": c.lora_targets}
    for key, if_unknown in is_saved_as.items():
        before, now = old.get(key, if_unknown), getattr(c, key)
        if before != now:
            raise UserError(f"{key}={now!r}, but the run has {key}={before!r}, whose state the "
                            f"checkpoint has; leave {key} out, {new_run}")
    # the data themselves
    changed = first_changed_shard(meta["shards"], shards)
    if changed:
        raise UserError(f"{changed} of {c.mix or c.dataset} has changed since the checkpoint "
                        f"{checkpoint.folder} was written; prepare the dataset as it was, "
                        f"{new_run}")
    return [f"changed since {checkpoint.folder.name}: {key}={old[key]} is now {value} "
            f"({effect_of_changing(key)})"
            for key, value in vars(c).items()
            if key in old and str(old[key]) != str(value) and key not in NOT_RESUMED]


def first_changed_shard(old_shards, shards):
    """Return the name of the first token file that is not the one of before, or None."""
    for old, new in zip_longest(old_shards, shards, fillvalue={}):
        if any(old.get(key) != new.get(key) for key in ("file", "tokens", "sha256")):
            return new.get("file") or old.get("file")
    return None


def effect_of_changing(key):
    """Return what changing this setting does to a run from here on."""
    if key in SAME_RUN:
        return "the same run"
    if key in SAME_UP_TO_ROUNDING:
        return "the same up to rounding"
    return "another course from here on"
