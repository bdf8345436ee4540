"""filter.py: it keeps what documents/filters.py keeps, goes on, and runs as SLURM jobs."""

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from test_dedup import SPACELESS, edited, text_and_copy
from test_filters import ALL, NONE, ROOT, judge

import filter
from documents.rules import c4, pii


@pytest.fixture
def corpus(tmp_path, web):
    """Three files of 20 documents each, of which every tenth stands twice."""
    pytest.importorskip("datatrove")
    pytest.importorskip("orjson")
    texts = web[:54] + web[:54:10]
    for i in range(3):
        with gzip.open(tmp_path / f"in{i}.jsonl.gz", "wt", encoding="utf-8") as file:
            for k, text in enumerate(texts[i::3]):
                file.write(json.dumps({"body": text, "url": f"http://a{k}.org/"}) + "\n")
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / f"in{i}.jsonl.gz").rename(tmp_path / f"in/{i}.jsonl.gz")
    (tmp_path / "in/README.md").write_text("not a document")
    (tmp_path / "blocked").write_text("a7.org\n")
    return SimpleNamespace(texts=texts, folder=tmp_path, rows=[
        (text, {"url": f"http://a{k}.org/"}) for i in range(3) for k, text in
        enumerate(texts[i::3])])


def test_pipeline_removes_near_copies(corpus, capsys):
    texts = [text for text in corpus.texts[:54] if len(text.split()) > 200]
    with gzip.open(corpus.folder / "in/9.jsonl.gz", "wt", encoding="utf-8") as file:
        for text in texts:
            copy = edited(text, 0.01, random.Random(5))
            assert copy != text
            file.write(json.dumps({"body": copy}) + "\n")
    assert len(texts) > 20
    kept = int(do(corpus, capsys, dedup="near")[-1].split()[0])
    assert 54 <= kept <= 56


def test_pipeline_removes_near_copies_in_chinese(corpus, capsys):
    shutil.rmtree(corpus.folder / "in")
    (corpus.folder / "in").mkdir()
    with gzip.open(corpus.folder / "in/a.jsonl.gz", "wt", encoding="utf-8") as file:
        for pair in text_and_copy(SPACELESS["Chinese"], 20):
            file.writelines(json.dumps({"body": text}) + "\n" for text in pair)
    assert do(corpus, capsys, dedup="near")[-1] == "20 of 40 documents kept"


def do(corpus, capsys, output="out", **settings):
    settings = {"input": f"{corpus.folder}/in", "tasks": 2, "workers": 1, "text_column": "body",
                "output": f"{corpus.folder}/{output}"} | settings
    filter.main(**settings)
    return capsys.readouterr().out.splitlines()


def read(folder):
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl.gz"))
            for line in gzip.open(path, "rt", encoding="utf-8")]


def test_pipeline_keeps_what_the_judge_keeps(corpus, capsys):
    settings = {"filters": ALL, "url_blocklist": f"{corpus.folder}/blocked"}
    printed = do(corpus, capsys, **settings)
    own = [judge(text, row, **settings) for text, row in corpus.rows]
    rows = read(corpus.folder / "out")
    assert sorted(row["text"] for row in rows) == sorted(text for why, text in own if not why)
    assert all(row["url"].startswith("http://a") and "file_path" not in row for row in rows)
    removed = read(corpus.folder / "out.work/removed")
    assert sorted(row["filter_reason"] for row in removed) == sorted(why for why, _ in own if why)
    assert printed[-1] == f"{len(rows)} of 60 documents kept" and 20 < len(rows) < 60
    counts = {line.split("  ")[-1]: int(line.split()[0]) for line in printed[:-1]}
    assert counts == {why: [w for w, _ in own].count(why) for why, _ in own if why}

    times = {p: p.stat().st_mtime_ns for p in corpus.folder.rglob("*") if p.is_file()}
    assert do(corpus, capsys, **settings) == printed
    assert times == {p: p.stat().st_mtime_ns for p in corpus.folder.rglob("*") if p.is_file()}

    (corpus.folder / "out.work/logs/filters/completions/00001").unlink()  # as if it was stopped
    (corpus.folder / "out/00001.jsonl.gz").write_bytes(b"half")
    assert do(corpus, capsys, **settings) == printed and read(corpus.folder / "out") == rows
    with pytest.raises(ValueError, match="started with other settings or files"):
        do(corpus, capsys, filters="gopher")


@pytest.mark.parametrize("dedup", ["exact", "near"])
def test_pipeline_removes_copies(corpus, capsys, dedup):
    printed = do(corpus, capsys, dedup=dedup, filters="pii")
    texts = [row["text"] for row in read(corpus.folder / "out")]
    assert sorted(texts) == sorted({pii(text)[1] for text in corpus.texts}) and len(texts) == 54
    assert printed[-1] == "54 of 60 documents kept"
    assert printed[:-1] == ["           6  10.00%  a copy of another"]
    assert do(corpus, capsys, dedup=dedup, filters="pii") == printed


def test_pipeline_of_parquet_and_with_processes(corpus, tmp_path):
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    (tmp_path / "tables").mkdir()
    for i in range(2):
        pq.write_table(pa.table({"text": corpus.texts[i::2]}), tmp_path / f"tables/{i}.parquet")
    done = subprocess.run(
        [sys.executable, ROOT / "filter.py", "--input=tables", "--output=out", "--filters=c4",
         "--tasks=2", "--workers=2"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept = [text for why, text in (c4(text) for text in corpus.texts) if not why]
    assert sorted(row["text"] for row in read(tmp_path / "out")) == sorted(kept)
    assert done.stdout.endswith(f"{len(kept)} of 60 documents kept\n")


def test_pipeline_with_nothing_left(corpus, capsys):
    with pytest.raises(ValueError, match="no text in a column 'nobody'"):
        do(corpus, capsys, text_column="nobody", dedup="exact")
    (corpus.folder / "blocked").write_text("org\n")
    printed = do(corpus, capsys, "b", dedup="near", url_blocklist=f"{corpus.folder}/blocked")
    assert printed[-1] == "0 of 60 documents kept"


def test_pipeline_wrong_input(corpus, capsys):
    (corpus.folder / "mixed").mkdir()
    (corpus.folder / "mixed/a.jsonl").write_text("")
    (corpus.folder / "mixed/b.parquet").write_text("")
    (corpus.folder / "full").mkdir()
    (corpus.folder / "full/x").write_text("")
    for settings, says in (({"input": ""}, "--input=FOLDER"), ({"tasks": 0}, "at least 1"),
                           ({"input": f"{corpus.folder}/mixed"}, "of one kind"),
                           ({"input": f"{corpus.folder}/none"}, "has files of no kind"),
                           ({"output": "full"}, "has files already"),
                           ({"dedup": "x"}, "choose '', 'exact'")):
        with pytest.raises(ValueError, match=says):
            do(corpus, capsys, **settings)


def test_executors_get_what_was_asked_for(tmp_path):
    pytest.importorskip("datatrove")
    pytest.importorskip("orjson")
    work = f"{tmp_path}/out.work"
    reader = filter.make_reader(f"{tmp_path}", ".jsonl")
    stages = filter.make_stages(reader, f"{tmp_path}/out", work, NONE | {"dedup": "near"},
                                tasks=100)
    made = filter.make_executors(stages, work, 40, {"partition": "cpu", "time": "3:00:00"})
    assert [(e.job_name, e.tasks, e.workers, e.mem_per_cpu_gb) for e in made] == [
        ("flatgpt_filters", 100, 40, 4), ("flatgpt_signatures", 100, 40, 4),
        ("flatgpt_copies", 14, 14, 4), ("flatgpt_groups", 1, 1, 32), ("flatgpt_dedup", 100, 40, 4)]
    assert all((e.partition, e.time, e.qos) == ("cpu", "3:00:00", "") for e in made)
    assert [e.depends for e in made] == [None, *made[:-1]]
    signature = made[1].pipeline[1].config
    assert (signature.n_grams, signature.num_buckets, signature.hashes_per_bucket) == (5, 14, 8)
    local = filter.make_executors(stages, work, 40, {})
    assert [type(e).__name__ for e in local] == ["LocalPipelineExecutor"] * 5
    assert [(e.tasks, e.workers) for e in local] == [(100, 40), (100, 40), (14, 14), (1, 1),
                                                     (100, 40)]


SBATCH = """#!/bin/sh
for script in "$@"; do :; done
cp "$script" "$JOBS/$(ls $JOBS | wc -l).sh"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
for i in $(seq 0 ${last:-0}); do
  cd / && SLURM_ARRAY_TASK_ID=$i SLURM_NODELIST=n1 sh "$script" >> "$JOBS.log" 2>&1 || exit 1
done
echo Submitted batch job 7
"""


def test_slurm_jobs_run_on_a_node_that_knows_nothing(corpus, tmp_path):
    """sbatch is played by a script that runs each task of the array at once, elsewhere."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "jobs").mkdir()
    for name, text in (("sbatch", SBATCH), ("scontrol", "#!/bin/sh\necho $3\n"),
                       ("srun", '#!/bin/sh\nshift 3; exec "$@"\n')):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "JOBS": f"{tmp_path}/jobs"}
    done = subprocess.run(
        [sys.executable, ROOT / "filter.py", "--input=in", "--output=out", "--filters=c4",
         "--url_blocklist=blocked", "--tasks=2", "--text_column=body", "--slurm_partition=cpu"],
        cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + (tmp_path / "jobs.log").read_text()
    script = (tmp_path / "jobs/0.sh").read_text()
    assert "#SBATCH --partition=cpu" in script and "#SBATCH --time=24:00:00" in script
    assert "#SBATCH --array=0-1%2" in script and "--qos" not in script
    own = [judge(*document, filters="c4", url_blocklist=f"{tmp_path}/blocked")
           for document in corpus.rows]
    kept = [text for why, text in own if not why]
    assert sorted(row["text"] for row in read(tmp_path / "out")) == sorted(kept)
    assert f"{len(kept)} of 60 documents kept" in done.stdout
