"""Filter and deduplicate corpora past one machine: filters.py's rules as a datatrove pipeline.

    python pipeline.py --input=s3://bucket/pages --output=clean --filters='gopher c4' --dedup=near
    python pipeline.py --input=pages --output=clean --filters=gopher --slurm_partition=cpu

On this machine's cores, or as SLURM jobs. Writes clean/*.jsonl.gz, which `prepare.py --input=clean`
reads, and clean.work/: removed/ has what was removed and why, logs/ which tasks are done. The same
command goes on where it was stopped, does nothing when all is done, and prints how many documents
each reason removed.
"""

import json
import re
import sys
from collections import Counter
from functools import cache, partial
from pathlib import Path

from configurator import run
from filters import BAND_HASHES, BANDS, SHINGLE, check, make_judge, need


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
        raise ValueError("say what to read and where to write: --input=FOLDER --output=FOLDER")
    if tasks < 1 or workers < 1:
        raise ValueError(f"tasks={tasks}, workers={workers}: must be at least 1")
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
            raise ValueError(f"input={input!r}: no text in a column {text_column!r}; name another "
                             f"with --text_column=NAME, and remove {work}")
        if not slurm and not counts["filters", "forwarded"]:
            break  # there is nothing for the next stages to read
    if slurm:
        print("of the tasks that have ended so far; the same command prints it again:")
    report(counts, "dedup" if dedup else "filters")


def absolute(path):
    """Return the path from the root, since jobs may run in another folder; URLs stay."""
    return path if not path or "://" in path else str(Path(path).expanduser().resolve())


def begin(input, output, work, settings):
    """Write down what is to be done, once; return the suffix of the input's files.

    Raises ValueError if there is nothing to read or the output is of other settings.
    """
    from datatrove.io import get_datafolder

    files = get_datafolder(input).list_files()
    kinds = {match[0] for name in files if (match := re.search(r"\.(jsonl|parquet)\b.*$", name))}
    if len(kinds) != 1 or not kinds <= {".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"}:
        raise ValueError(f"input={input!r}: has files of {', '.join(sorted(kinds)) or 'no'} kind; "
                         "give a folder of .jsonl, .jsonl.gz, .jsonl.zst or .parquet, of one kind")
    suffix = kinds.pop()
    need(*["zstandard"] * suffix.endswith(".zst"))
    wanted = settings | {"files": [name for name in files if name.endswith(suffix)]}
    folder = get_datafolder(work)
    if not folder.isfile("settings.json"):
        if get_datafolder(output).list_files():
            raise ValueError(f"output={output!r}: has files already; choose another")
        with folder.open("settings.json", "w") as file:
            json.dump(wanted, file, indent=1)
    with folder.open("settings.json") as file:
        if json.load(file) != wanted:
            raise ValueError(f"output={output!r}: was begun with other settings or files; choose "
                             f"another, or remove it and {work}")
    return suffix


def pipelines(input, suffix, output, work, settings, text_column, tasks):
    """Return [(name, tasks, gigabytes, steps)], one after the other: filters, then copies.

    Copies are found by datatrove's own stages. MinHash has the 5-grams and bands of `near_keys`,
    but its own hashes, and keeps one document of each group of copies that hang together.
    """
    from datatrove.pipeline import dedup
    from datatrove.pipeline.filters import LambdaFilter
    from datatrove.pipeline.readers import JsonlReader, ParquetReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.hashing import HashConfig
    from datatrove.utils.word_tokenizers import WhitespaceTokenizer

    def write(folder):
        return JsonlWriter(folder, expand_metadata=True)

    def read(folder, suffix=".jsonl.gz", text_column="text"):
        kind = ParquetReader if suffix == ".parquet" else JsonlReader
        reader = kind(folder, text_key=text_column, glob_pattern=f"**/*{suffix}")
        reader.add_file_path = False
        return reader

    judged = LambdaFilter(partial(judge_document, settings), write(f"{work}/removed"))
    filtered = f"{work}/filtered" if settings["dedup"] else output
    stages = [("filters", tasks, 4, [read(input, suffix, text_column), judged, write(filtered)])]
    sha1 = HashConfig(hash_fc="sha1")  # its xxhash needs xxhash before version 4
    signs, copies, drop = (f"{work}/{name}" for name in ("signatures", "copies", "drop"))
    if settings["dedup"] == "exact":
        config = dedup.ExactDedupConfig(content_getter=plain_text, hash_config=sha1)
        stages += [
            ("signatures", tasks, 4, [read(filtered), dedup.ExactDedupSignature(signs, config)]),
            ("copies", 1, 8, [dedup.ExactFindDedups(signs, drop, config)])]
        dropped = dedup.ExactDedupFilter(drop, config, write(f"{work}/removed_copies"))
    elif settings["dedup"] == "near":
        config = dedup.MinhashConfig(SHINGLE, BANDS, BAND_HASHES, hash_config=sha1)
        words = WhitespaceTokenizer()
        words.word_tokenize = str.split  # of simplified text; its own way needs spacy
        stages += [
            ("signatures", tasks, 4,
             [read(filtered), dedup.MinhashDedupSignature(signs, config, words)]),
            ("copies", BANDS, 4, [dedup.MinhashDedupBuckets(signs, copies, config=config)]),
            ("groups", 1, 32, [dedup.MinhashDedupCluster(copies, drop, config)])]
        dropped = dedup.MinhashDedupFilter(drop, write(f"{work}/removed_copies"))
    if settings["dedup"]:
        stages.append(("dedup", tasks, 4, [read(filtered), dropped, write(output)]))
    return stages


def plain_text(document) -> str:
    return " ".join(document.text.split())


def judge_document(settings, document):
    """datatrove's view of the judge: True to keep, or (False, reason)."""
    judge = judge_of(json.dumps(settings))
    reason, document.text = judge(document.text, document.metadata)
    return (False, reason) if reason else True


@cache
def judge_of(settings):
    return make_judge(json.loads(settings))


def executors(stages, work, workers, slurm):
    """Return datatrove's executors, each of which waits for the one before it; the last one's
    run() runs all. slurm: {} or its partition and time."""
    from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor

    made = []
    here, python = Path(__file__).resolve().parent, Path(sys.executable).parent
    for name, tasks, gigabytes, steps in stages:
        common = {"pipeline": steps, "tasks": tasks, "logging_dir": f"{work}/logs/{name}",
                  "depends": made[-1] if made else None, "workers": min(workers, tasks)}
        made.append(SlurmPipelineExecutor(
            **common, **slurm, job_name=f"flatgpt_{name}", mem_per_cpu_gb=gigabytes, qos="",
            env_command=f"export PATH={python}:$PATH PYTHONPATH={here}:$PYTHONPATH",
        ) if slurm else LocalPipelineExecutor(**common))
    return made


def tally(work):
    """Return a Counter of (stage, what happened) over the tasks that are done."""
    from datatrove.io import get_datafolder

    counts = Counter()
    for stage in ("filters", "dedup"):
        folder = get_datafolder(f"{work}/logs/{stage}")
        for path in folder.list_files("stats"):
            with folder.open(path) as file:
                _, step, _ = json.load(file)  # the reader, what removes, the writer
            for key, value in step["stats"].items():
                counts[stage, key] += value["total"] if isinstance(value, dict) else value
    return counts


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
    import pipeline  # under its own name, which the processes of the pipeline know it by

    run(pipeline.main)
