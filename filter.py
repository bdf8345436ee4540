"""Filter and deduplicate corpora past one machine."""

from pathlib import Path

from configurator import UserError, run
from text.filters import check, need
from text.pipeline import begin, executors, pipelines, tally


def main(
    input="",  # a folder or URL (s3://, hf://, ...) of .jsonl, .jsonl.gz, .jsonl.zst or .parquet
    output="",  # the folder or URL to write .jsonl.gz to; OUTPUT.work beside it has the rest
    filters="",  # any of: gopher repetition c4 fineweb pii
    url_blocklist="",  # a file of domains, one per line, or a hosts file, also .gz
    language="",  # keep this language, such as en: by the column language, else by py3langid
    language_score=0.65,  # and be so sure of it
    dedup="",  # drop copies: exact, or near for MinHash
    text_column="text",  # the field that holds the text
    tasks=8,  # pieces of the work, each of whole files: at most one per input file is of use
    workers=2,  # how many of them at a time
    slurm_partition="",  # run as SLURM jobs in this partition; '' on this machine
    slurm_time="24:00:00",  # the limit of each job
):
    settings = {"filters": filters, "url_blocklist": url_blocklist, "language": language,
                "language_score": language_score, "dedup": dedup}
    check(settings)
    need("datatrove", "orjson")
    if not input or not output:
        raise UserError("say what to read and where to write: --input=FOLDER --output=FOLDER")
    if tasks < 1 or workers < 1:
        raise UserError(f"tasks={tasks}, workers={workers}: must be at least 1")
    input, output, settings["url_blocklist"] = map(absolute, (input, output, url_blocklist))
    work = output.rstrip("/") + ".work"
    suffix = begin(input, output, work, settings | {"text_column": text_column, "tasks": tasks})
    slurm = {"partition": slurm_partition, "time": slurm_time} if slurm_partition else {}
    stages = pipelines(input, suffix, output, work, settings, text_column, tasks)
    made = executors(stages, work, workers, slurm)
    for executor in made[-1:] if slurm else made:  # SLURM's last one submits those before it
        executor.run()
        counts = tally(work)
        if not slurm and not counts["filters", "total"]:
            raise UserError(f"input={input!r}: no text in a column {text_column!r}; name another "
                             f"with --text_column=NAME, and remove {work}")
        if not slurm and not counts["filters", "forwarded"]:
            break  # there is nothing for the next stages to read
    if slurm:
        print("of the tasks that have ended so far; the same command prints it again:")
    report(counts, "dedup" if dedup else "filters")


def absolute(path):
    """Return the path from the root, since jobs may run in another folder; URLs stay."""
    return path if not path or "://" in path else str(Path(path).expanduser().resolve())


def report(counts, last):
    """Print how many documents each reason removed."""
    total = counts["filters", "total"]
    lines = {key.removeprefix("dropped_"): count for (stage, key), count in counts.most_common()
             if stage == "filters" and key.startswith("dropped_")}
    lines["a copy of another"] = counts["dedup", "dropped"]
    for reason, count in lines.items():
        if count:
            print(f"{count:>12,}  {count / total:6.2%}  {reason}")
    print(f"{counts[last, 'forwarded']:,} of {total:,} documents kept")


if __name__ == "__main__":
    run(main)
