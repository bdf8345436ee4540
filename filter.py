"""Filter and deduplicate corpora past one machine: documents/filters.py, run by datatrove.

    python filter.py --input=s3://bucket/pages --output=clean --filters='gopher c4' --dedup=near
    python filter.py --input=pages --output=clean --filters=gopher --slurm_partition=cpu

It runs on this machine's cores, or as SLURM jobs, and writes clean/*.jsonl.gz, which
`python prepare.py --input=clean --dataset=clean` reads. clean.work/ beside it has the removed
documents and why (removed/, removed_copies/), and which tasks are done (logs/).

The same command goes on where it was stopped, and does nothing when all is done. At the end it
prints how many documents each reason removed.
"""

import json
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

from configurator import UserError, check_settings, run
from documents.dedup import BAND_HASHES, BANDS, SHINGLE, split_words, text_of
from documents.filters import check_filter_settings, judge_document, require_packages

LIMITS = {"tasks": ">= 1", "workers": ">= 1"}
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


class Stage(NamedTuple):
    name: str
    tasks: int
    gigabytes: int  # of memory that a task may need
    steps: list  # datatrove's pipeline: a reader, steps on its documents, a writer


def main(
    input="",  # a folder or URL (s3://, hf://, ...) of .jsonl, .jsonl.gz, .jsonl.zst or .parquet
    output="",  # the folder or URL to write .jsonl.gz to; OUTPUT.work beside it has the rest
    filters="",  # any of: gopher repetition c4 fineweb pii
    url_blocklist="",  # a file of domains, one per line, or a hosts file, also .gz
    language="",  # keep this language, such as en: by the column language, else by py3langid
    language_score=0.65,  # the lowest score of that language, from 0 to 1
    dedup="",  # drop copies: exact, or near for MinHash
    text_column="text",  # the field that holds the text
    tasks=8,  # into how many pieces to cut the work; more than there are input files is no use
    workers=2,  # how many tasks to run at a time
    slurm_partition="",  # run as SLURM jobs in this partition; '': on this machine
    slurm_time="24:00:00",  # the time limit of each SLURM job
):
    # Check the settings before anything is read.
    settings = {"filters": filters, "url_blocklist": url_blocklist, "language": language,
                "language_score": language_score, "dedup": dedup}
    check_filter_settings(settings)
    check_settings({"tasks": tasks, "workers": workers}, LIMITS)
    require_packages(["datatrove", "orjson"])
    if not input or not output:
        raise UserError("say what to read and where to write: --input=FOLDER --output=FOLDER")

    # The tasks may run in another folder.
    input, output = absolute_path(input), absolute_path(output)
    settings["url_blocklist"] = absolute_path(url_blocklist)
    work = output.rstrip("/") + ".work"

    # Write down what is to be done: only the same command may go on with it.
    suffix, names = list_input_files(input)
    claim_output(output, work, settings | {
        "text_column": text_column, "tasks": tasks, "files": names})

    reader = make_reader(input, suffix, text_column)
    stages = make_stages(reader, output, work, settings, tasks)
    if slurm_partition:
        # Submit the jobs of the last stage, which submits those of the stages before it.
        slurm = {"partition": slurm_partition, "time": slurm_time}
        executors = make_executors(stages, work, workers, slurm)
        executors[-1].run()
        print("of the tasks that have ended so far; the same command prints it again:")
    else:
        # Run one stage after the other, as long as there is something for the next one to read.
        for executor in make_executors(stages, work, workers, slurm={}):
            executor.run()
            counts = count_outcomes(work)
            if not counts["filters", "total"]:
                raise UserError(f"input={input!r}: no text in a column {text_column!r}; name "
                                f"another with --text_column=NAME, and remove {work}")
            if not counts["filters", "forwarded"]:
                break
    print_report(count_outcomes(work), last_stage=stages[-1].name)


def absolute_path(path):
    """Return the path from the root; '' and URLs stay as they are."""
    if not path or "://" in path:
        return path
    return str(Path(path).expanduser().resolve())


def list_input_files(input):
    """Return (suffix, names) of the files to read. Raises UserError if they are not of one kind."""
    from datatrove.io import get_datafolder

    # Which kinds of files there are; others, such as a README, do not matter.
    names = get_datafolder(input).list_files()
    suffixes = set()
    for name in names:
        match = re.search(r"\.(jsonl|parquet)\b.*$", name)
        if match:
            suffixes.add(match[0])
    if len(suffixes) != 1 or not suffixes <= set(SUFFIXES):
        raise UserError(f"input={input!r}: has files of {', '.join(sorted(suffixes)) or 'no'} "
                        f"kind; give a folder of {', '.join(SUFFIXES)}, of one kind")

    # datatrove reads .zst files by this package.
    suffix = suffixes.pop()
    if suffix.endswith(".zst"):
        require_packages(["zstandard"])
    return suffix, [name for name in names if name.endswith(suffix)]


def claim_output(output, work, settings):
    """Write settings.json into the work folder, if it is a new one. Raises UserError if the output
    has other files, or was started with other settings."""
    from datatrove.io import get_datafolder

    # The first time, the output must be new.
    folder = get_datafolder(work)
    if not folder.isfile("settings.json"):
        if get_datafolder(output).list_files():
            raise UserError(f"output={output!r}: has files already; choose another")
        try:
            with folder.open("settings.json", "w") as file:
                json.dump(settings, file, indent=1)
        except OSError as error:
            raise UserError(f"output={output!r}: cannot be written ({error}); choose another"
                            ) from error

    # Later, the settings and the input's files must be the same.
    with folder.open("settings.json") as file:
        if json.load(file) != settings:
            raise UserError(f"output={output!r}: was started with other settings or files; choose "
                            f"another, or remove it and {work}")


def make_stages(reader, output, work, settings, tasks):
    """Return the Stages, to be run one after the other: filters, then those that drop copies.

    reader: of the input. output, work: folders or URLs. settings: the filters'.
    """
    from datatrove.pipeline.filters import LambdaFilter

    # Without deduplication the first stage writes the output.
    filtered, dedup_stages = output, []
    if settings["dedup"]:
        filtered = f"{work}/filtered"
        dedup_stages = make_dedup_stages(settings["dedup"], filtered, output, work, tasks)

    # The tasks get the settings as text and make the judge themselves.
    judge = partial(judge_document, json.dumps(settings))
    steps = [reader, LambdaFilter(judge, make_writer(f"{work}/removed")), make_writer(filtered)]
    return [Stage("filters", tasks, 4, steps), *dedup_stages]


def make_dedup_stages(method, filtered, output, work, tasks):
    """Return the stages that sign documents, find copies by the signatures, and drop them.

    "near": MinHash has the 5-grams and bands of `near_keys`, but datatrove's hashes, and one
    document is kept of each group of copies, in which a third one may connect two that differ.
    """
    from datatrove.pipeline import dedup
    from datatrove.utils.hashing import HashConfig
    from datatrove.utils.word_tokenizers import WhitespaceTokenizer

    signatures, copies, drop = f"{work}/signatures", f"{work}/copies", f"{work}/drop"
    removed = make_writer(f"{work}/removed_copies")
    # The default, xxhash, fails with version 4 of its package.
    hashes = HashConfig(hash_fc="sha1")

    if method == "exact":
        # One task compares all signatures.
        config = dedup.ExactDedupConfig(text_of, hash_config=hashes)
        sign = dedup.ExactDedupSignature(signatures, config)
        find = [Stage("copies", 1, 8, [dedup.ExactFindDedups(signatures, drop, config)])]
        remove = dedup.ExactDedupFilter(drop, config, removed)
    else:
        # A task for each band compares that band's; one more connects what they found.
        config = dedup.MinhashConfig(SHINGLE, BANDS, BAND_HASHES, hash_config=hashes)
        words = WhitespaceTokenizer()
        # datatrove's own way to split the text needs spacy.
        words.word_tokenize = split_words
        sign = dedup.MinhashDedupSignature(signatures, config, words)
        buckets = dedup.MinhashDedupBuckets(signatures, copies, config=config)
        find = [Stage("copies", BANDS, 4, [buckets]),
                Stage("groups", 1, 32, [dedup.MinhashDedupCluster(copies, drop, config)])]
        remove = dedup.MinhashDedupFilter(drop, removed)
    return [Stage("signatures", tasks, 4, [make_reader(filtered), sign]), *find,
            Stage("dedup", tasks, 4, [make_reader(filtered), remove, make_writer(output)])]


def make_reader(folder, suffix=".jsonl.gz", text_column="text"):
    from datatrove.pipeline.readers import JsonlReader, ParquetReader

    reader_class = ParquetReader if suffix == ".parquet" else JsonlReader
    reader = reader_class(folder, text_key=text_column, glob_pattern=f"**/*{suffix}")
    reader.add_file_path = False
    return reader


def make_writer(folder):
    from datatrove.pipeline.writers import JsonlWriter

    return JsonlWriter(folder, expand_metadata=True)


def make_executors(stages, work, workers, slurm):
    """Return datatrove's executor for each stage; each waits for the one before it.

    slurm: the partition and the time of the jobs; {} to run the stages on this machine.
    """
    from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor

    # A job knows neither our Python nor our folder.
    root, python = Path(__file__).resolve().parent, Path(sys.executable).parent
    environment = f"export PATH={python}:$PATH PYTHONPATH={root}:$PYTHONPATH"

    # A stage starts when all tasks of the one before it are done.
    executors, previous = [], None
    for stage in stages:
        common = {"pipeline": stage.steps, "tasks": stage.tasks, "depends": previous,
                  "workers": min(workers, stage.tasks), "logging_dir": f"{work}/logs/{stage.name}"}
        if slurm:
            previous = SlurmPipelineExecutor(
                **common, **slurm, job_name=f"flatgpt_{stage.name}", qos="",
                mem_per_cpu_gb=stage.gigabytes, env_command=environment)
        else:
            previous = LocalPipelineExecutor(**common)
        executors.append(previous)
    return executors


def count_outcomes(work):
    """Return a Counter of (stage, outcome) over the documents of the tasks that are done."""
    from datatrove.io import get_datafolder

    counts = Counter()
    for stage in ("filters", "dedup"):
        folder = get_datafolder(f"{work}/logs/{stage}")
        for path in folder.list_files("stats"):
            with folder.open(path) as file:
                statistics = json.load(file)
            # One entry for each step: the reader, what removes documents, and the writer.
            _, remover, _ = statistics
            for outcome, value in remover["stats"].items():
                if isinstance(value, dict):
                    value = value["total"]
                counts[stage, outcome] += value
    return counts


def print_report(counts, last_stage):
    """Print how many documents each reason removed, and how many the last stage kept."""
    # The reasons, the most frequent first; copies, which are found later, come last.
    total = counts["filters", "total"]
    removed = {}
    for (stage, outcome), count in counts.most_common():
        if stage == "filters" and outcome.startswith("dropped_"):
            removed[outcome.removeprefix("dropped_")] = count
    removed["a copy of another"] = counts["dedup", "dropped"]

    for reason, count in removed.items():
        if count:
            print(f"{count:>12,}  {count / total:6.2%}  {reason}")
    print(f"{counts[last_stage, 'forwarded']:,} of {total:,} documents kept")


if __name__ == "__main__":
    run(main)
