"""filters.py: settings, block lists, languages, and the order of the rules."""

import gzip
import subprocess
import sys
from pathlib import Path

import pytest

from documents import filters
from documents.dedup import exact_keys, key_function, near_keys

ROOT = Path(__file__).parent.parent
NONE = {"filters": "", "url_blocklist": "", "language": "", "language_score": 0.65, "dedup": ""}
ALL = "gopher repetition c4 fineweb pii"


def judge(text="", row=None, **settings):
    filters.check_filter_settings(NONE | settings)
    return filters.make_judge(NONE | settings)(text, row or {})


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize("settings, says", [
    ({"filters": "gofer"}, "unknown name 'gofer'; did you mean 'gopher'?"),
    ({"filters": "c4 zzz"}, "unknown name 'zzz'; choose of gopher repetition c4 fineweb pii"),
    ({"url_blocklist": "/no/such"}, "no such file"),
    ({"language": "English"}, "code such as en"),
    ({"language_score": 1.5}, "language_score=1.5: must be at least 0 and at most 1"),
    ({"dedup": "fuzzy"}, "dedup='fuzzy': choose '', 'exact', 'near'"),
])
def test_wrong_settings(settings, says):
    with pytest.raises(ValueError) as error:
        filters.check_filter_settings(NONE | settings)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(filters, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install py3langid rensa"):
        filters.check_filter_settings(NONE | {"language": "en", "dedup": "near"})
    filters.check_filter_settings(NONE | {"filters": ALL, "dedup": "exact"})


def test_columns_and_key_function():
    assert filters.needed_columns(NONE) == []
    assert filters.needed_columns(NONE | {"url_blocklist": "x"}) == ["url"]
    assert filters.needed_columns(NONE | {"url_blocklist": "x", "language": "en"}) == [
        "url", "language", "language_score"]
    for dedup, function in (("", None), ("exact", exact_keys), ("near", near_keys)):
        assert key_function(NONE | {"dedup": dedup}) is function


def test_import_needs_numpy_alone():
    code = ("import sys; from documents import filters; "
            "print(sorted({'datatrove', 'rensa', 'py3langid', 'datasets', 'torch', 'pyarrow'} "
            "& set(sys.modules)))")
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT).strip() == b"[]"


# ---------------------------------------------------------------------- URL and language


@pytest.mark.parametrize("packed", [False, True])
def test_url_blocklist(tmp_path, packed):
    path = tmp_path / ("list.txt.gz" if packed else "list.txt")
    text = ("# mine\nbad.com\n0.0.0.0 ads.net more.ads.org # two\nWWW.Caps.de.\n\n"
            "::1 six.net\nold.com since 2020.com\nb\u00fccher.example\n")
    with (gzip.open if packed else open)(path, "wt", encoding="utf-8") as file:
        file.write(text)

    def removed(url):
        return judge("text", {"url": url}, url_blocklist=str(path))[0]

    for url in ("http://bad.com", "https://sub.BAD.com/page?q=1", "bad.com:80/x", "//a.b.bad.com",
                "http://user:pw@bad.com/", "http://bad.com./", "http://ads.net", "more.ads.org",
                "six.net", "old.com",
                "https://www.caps.de", "http://b\u00fccher.example/"):
        assert removed(url) == "url: domain in the block list", url
    for url in ("http://notbad.com", "http://bad.com.au/bad.com", "http://com", "http://ads.org",
                "http://good.org/?u=http://bad.com", "http://[::1", "caps.de", "", None,
                "2020.com", 7, "\ud800.com",
                "http://0.0.0.0/", "not a url"):
        assert removed(url) == "", url


def test_an_empty_blocklist_blocks_nothing_and_a_missing_url_is_printed_once(tmp_path, capsys):
    path = tmp_path / "list.txt"
    path.write_text("# nothing yet\n")
    filters.warn_of_missing_url.cache_clear()
    rule = filters.make_judge(NONE | {"url_blocklist": str(path)})
    assert [rule("a", row)[0] for row in ({"url": "http://a.com"}, {}, {})] == ["", "", ""]
    assert capsys.readouterr().err.count("without a url") == 1


def test_language_by_column():
    for row, expected in [
            ({"language": "en", "language_score": 0.65}, ""),
            ({"language": "en", "language_score": "0.9"}, ""),
            ({"language": "en", "language_score": None}, ""),
            ({"language": "en", "language_score": 0.649}, "language: score too low"),
            ({"language": "de", "language_score": 0.99}, "language: another one")]:
        assert judge("Das ist kein Englisch.", row, language="en")[0] == expected


def test_language_by_py3langid():
    pytest.importorskip("py3langid")
    english = "The weather was fine this morning, so we walked along the river until noon."
    german = "Das Wetter war heute morgen gut, also gingen wir bis zum Mittag am Fluss entlang."
    assert judge(english, language="en")[0] == "" == judge(german, language="de")[0]
    assert judge(german, language="en")[0] == "language: another one"
    assert judge(english, language="en", language_score=1)[0] == "language: score too low"
    with pytest.raises(ValueError, match="not known to py3langid"):
        judge(english, language="xq")


# ---------------------------------------------------------------------- the rules together


def test_rules_run_in_their_own_order_and_clean_for_the_next():
    dirty = "Ask a@b.cc for help. " * 20 + "the cat and the dog of that house\nmenu item\n"
    kept, text = judge(dirty, filters="pii c4")
    assert kept == "" and "menu item" not in text and "a@b.cc" not in text
    assert judge("{" * 5, filters="pii c4 repetition gopher")[0] == "gopher: fewer than 50 words"
    assert judge("anything", filters="") == ("", "anything")
