"""What a resumed run may change."""

from itertools import zip_longest

from configurator import UserError
from training.sequences import parse_mix

KEEPS_THE_RUN = {  # settings that a resumed run may change and compute the same
    "max_iters", "eval_interval", "log_interval", "always_save_checkpoint", "keep_checkpoints",
    "max_bad_steps", "wandb_log", "wandb_project", "wandb_run_name", "async_checkpoint"}
ROUNDS_ANEW = {  # and the same but for the order of floating-point sums
    "batch_size", "gradient_accumulation_steps", "total_batch_size", "device", "dtype", "compile",
    "backend", "fsdp", "fp8", "activation_checkpointing"}


def check_resumed(before, config, tokens_per_iter, shards, place):
    """Return one line per setting that a resumed run changes. Raises UserError where the run's
    place in its data would be lost, or the data are not the checkpoint's."""
    new_run = "or begin a new run with these weights: --init_from=" + str(place)
    old = before.get("config", {})
    done = before.get("iter_num", 0)
    had = before.get("tokens", 0) // done if done else tokens_per_iter
    if had != tokens_per_iter:
        raise UserError(f"the run had {had:,} tokens per iteration and has {tokens_per_iter:,} "
                         f"now, so its place in the data is lost; give --total_batch_size={had}, "
                         + new_run)
    if old.get("seed", config["seed"]) != config["seed"]:
        raise UserError(f"seed={config['seed']}, but the run has seed={old['seed']}, which is its "
                         f"order of the data; leave seed out, {new_run}")
    shares = [list(parse_mix(c["mix"], c["dataset"]).values()) for c in ({**config, **old}, config)]
    if shares[0] != shares[1]:
        raise UserError(f"mix={config['mix']!r}, but the run has mix={old['mix']!r}; leave mix "
                         f"out, {new_run}")
    facts = [[[shard.get(key) for key in ("file", "tokens", "sha256")] for shard in some]
             for some in (before.get("shards", []), shards)]
    if facts[0] != facts[1]:
        name = next((now or was)[0] for was, now in zip_longest(*facts) if was != now)
        raise UserError(f"{name} of {config['mix'] or config['dataset']} has changed since the "
                         f"checkpoint {place} was written; prepare the dataset as it was, "
                         + new_run)
    lines = []
    for key, value in config.items():
        if key in old and old[key] != value and key not in ("out_dir", "init_from", "eval_only"):
            means = ("safe" if key in KEEPS_THE_RUN else "the same up to rounding"
                     if key in ROUNDS_ANEW else "another course from here on")
            lines.append(f"changed since {place.name}: {key}={old[key]} is now {value} ({means})")
    return lines
