"""runtime/child.py: a Python process of its own, its lines and its failure."""

import pytest

from runtime.child import figures_of_python, run_python


def test_lines_have_the_time_at_which_they_came(tmp_path):
    (tmp_path / "says.py").write_text(
        "import os, sys, time\nprint(sys.argv[1])\ntime.sleep(0.3)\n"
        "print(os.environ['WORD'], file=sys.stderr)\n")
    first, second = run_python("says.py", "one", cwd=tmp_path, WORD="two")
    assert (first.text, second.text) == ("one", "two")
    assert 0 < first.seconds and first.seconds + 0.25 < second.seconds


def test_what_a_process_says_last_is_its_error(tmp_path):
    (tmp_path / "fails.py").write_text("print('{}')\nraise OSError('no disk')")
    with pytest.raises(ValueError, match="fails.py in .* exit code 1: OSError: no disk"):
        run_python("fails.py", cwd=tmp_path)
    (tmp_path / "mute.py").write_text("raise SystemExit(3)")
    with pytest.raises(ValueError, match="mute.py in .* exit code 3: $"):
        run_python("mute.py", cwd=tmp_path)


def test_figures_are_the_last_line_of_json(tmp_path):
    (tmp_path / "says.py").write_text("""print('{"a": 1}')\nprint('{"a": 2}')\nprint('end')""")
    assert figures_of_python("says.py", cwd=tmp_path) == {"a": 2}
