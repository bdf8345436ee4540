"""Filter and deduplicate corpora past one machine: filters.py's rules as a datatrove pipeline.

    python filter.py --input=s3://bucket/pages --output=clean --filters='gopher c4' --dedup=near
    python filter.py --input=pages --output=clean --filters=gopher --slurm_partition=cpu

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

from configurator import UserError
from text.dedup import BAND_HASHES, BANDS, SHINGLE
from text.filters import make_judge, need


def begin(input, output, work, settings):
    """Write down what is to be done, once; return the suffix of the input's files.

    Raises UserError if there is nothing to read or the output is of other settings.
    """
    from datatrove.io import get_datafolder

    files = get_datafolder(input).list_files()
    kinds = {match[0] for name in files if (match := re.search(r"\.(jsonl|parquet)\b.*$", name))}
    if len(kinds) != 1 or not kinds <= {".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"}:
        raise UserError(f"input={input!r}: has files of {', '.join(sorted(kinds)) or 'no'} kind; "
                         "give a folder of .jsonl, .jsonl.gz, .jsonl.zst or .parquet, of one kind")
    suffix = kinds.pop()
    need(*["zstandard"] * suffix.endswith(".zst"))
    wanted = settings | {"files": [name for name in files if name.endswith(suffix)]}
    folder = get_datafolder(work)
    if not folder.isfile("settings.json"):
        if get_datafolder(output).list_files():
            raise UserError(f"output={output!r}: has files already; choose another")
        with folder.open("settings.json", "w") as file:
            json.dump(wanted, file, indent=1)
    with folder.open("settings.json") as file:
        if json.load(file) != wanted:
            raise UserError(f"output={output!r}: was begun with other settings or files; choose "
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
    here, python = Path(__file__).resolve().parent.parent, Path(sys.executable).parent
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

