"""Which documents to keep: by a list of blocked domains, the language, and the rules of rules.py.

    python prepare.py --input=pages.jsonl.gz --dataset=pages --filters='gopher c4' --dedup=near

filter.py does the same for corpora past one machine. The order is: URL, language, gopher,
repetition, c4, fineweb, pii, in whatever order the setting names them.
"""

import difflib
import gzip
import json
import re
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from configurator import UserError, check_settings
from documents.dedup import contains_any, hash64
from documents.rules import c4, fineweb, gopher, pii, repetition

# In the order in which they run
RULES = {"gopher": gopher, "repetition": repetition, "c4": c4, "fineweb": fineweb, "pii": pii}
LIMITS = {"language_score": ">= 0, <= 1", "dedup": ("", "exact", "near")}
# How much of a document py3langid reads, for it is slow
LANGUAGE_CHARACTERS = 2000
# The host of a URL, with or without scheme, user and port
HOST = re.compile(r"(?:[a-z][a-z0-9+.-]*://|//)?(?:[^/?#@]*@)?([^/?#:@]+)")
# What a line of a hosts file begins with: an address of version 4 or 6
IP_ADDRESS = re.compile(r"[0-9.]+|[0-9a-f:]*:[0-9a-f:]*")


def check_filter_settings(settings):
    """Raise UserError for settings that cannot be used: names, ranges, files, packages."""
    # Ranges and choices, then names of rules, of a file and of a language.
    check_settings(settings, LIMITS)
    for name in settings["filters"].split():
        if name not in RULES:
            near = difflib.get_close_matches(name, RULES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose of {' '.join(RULES)}"
            raise UserError(f"filters: unknown name {name!r}; {hint}")
    path, language = settings["url_blocklist"], settings["language"]
    if path and not Path(path).is_file():
        raise UserError(f"url_blocklist={path!r}: no such file; give a list of domains")
    if language and not re.fullmatch(r"[a-z]{2,3}([_-][A-Za-z]{2,4})?", language):
        raise UserError(f"language={language!r}: give a code such as en")

    # What is installed is no setting, but is better found before hours of reading.
    packages = []
    if language:
        packages.append("py3langid")
    if settings["dedup"] == "near":
        packages.append("rensa")
    require_packages(packages)


def require_packages(names):
    """Raise UserError for Python packages that are not installed."""
    missing = [name for name in names if not find_spec(name)]
    if missing:
        raise UserError(f"this needs packages that are missing: pip install {' '.join(missing)}")


def needed_columns(settings):
    """Return the columns beside the text that the judge uses."""
    columns = []
    if settings["url_blocklist"]:
        columns.append("url")
    if settings["language"]:
        columns += ["language", "language_score"]
    return columns


def make_judge(settings):
    """Return judge(text, row) -> (reason, text), to be made in each process that judges.

    row: a dict with those of the `needed_columns` that the document has. reason: '' for a document
    to keep, else a fixed text to count by. The text that comes back was cleaned by c4 and pii.
    """
    # What reads the other columns comes first: it is quick, and needs no cleaned text.
    names = settings["filters"].split()
    rules = {name: rule for name, rule in RULES.items() if name in names}
    row_rules = []
    if settings["url_blocklist"]:
        row_rules.append(make_url_rule(settings["url_blocklist"]))
    if settings["language"]:
        row_rules.append(make_language_rule(settings["language"], settings["language_score"]))

    def judge(text, row):
        # Stop at the first reason to remove the document.
        for rule in row_rules:
            reason = rule(text, row)
            if reason:
                return reason, text
        for name, rule in rules.items():
            reason, text = rule(text)
            if reason:
                return f"{name}: {reason}", text
        return "", text

    return judge


# ---------------------------------------------------------------------- rules on columns


def make_url_rule(path):
    """Return rule(text, row) -> reason: is the URL's domain, or one that it is part of, blocked?

    path: a file of domains, one per line, or a hosts file; also .gz. Source: RefinedWeb
    (arXiv 2306.01116, section 3.1); FineWeb (arXiv 2406.17557, base filtering) with the UT1 lists.
    UT1 has millions of domains, so they are kept as sorted hashes, of 8 bytes each.
    """
    # As texts they would need ten times as much memory, in each process.
    blocked = np.fromiter(map(hash64, read_domains(path)), np.uint64)
    blocked.sort()

    def rule(text, row):
        # Without a URL nothing is known against the document.
        url = row.get("url")
        if not url:
            warn_of_missing_url()
            return ""

        # a.b.com is blocked by a.b.com, by b.com and by com.
        host = HOST.match(str(url).strip().lower())
        labels = host[1].strip(".").split(".") if host else []
        hashes = [hash64(".".join(labels[i:])) for i in range(len(labels))]
        if contains_any(blocked, np.array(hashes, np.uint64)):
            return "url: domain in the block list"
        return ""

    return rule


def read_domains(path):
    """Yield the domains of a file; a line of a hosts file is an address and then its domains."""
    opened = gzip.open if path.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8", errors="replace") as file:
        for line in file:
            # What follows a # is a comment; what follows a domain too.
            words = line.split("#")[0].lower().split()
            names = words[:1]
            if words and IP_ADDRESS.fullmatch(words[0]):
                names = words[1:]
            for name in names:
                yield name.strip(".")


@cache  # so that each process prints it once
def warn_of_missing_url():
    print("url_blocklist: a document without a url is kept, this one and others", file=sys.stderr)


def make_language_rule(language, lowest_score):
    """Return rule(text, row) -> reason: is the language the wanted one, with a score high enough?

    Source: FineWeb (arXiv 2406.17557, base filtering): fastText's score of at least 0.65, which its
    rows carry. py3langid judges the others; it is less sure of English than fastText is.
    """
    def rule(text, row):
        # Use the document's own columns if it has them.
        found, score = row.get("language"), row.get("language_score")
        if not found:
            found, score = language_identifier(language).classify(text[:LANGUAGE_CHARACTERS])
        if found != language:
            return "language: another one"
        if score is not None and float(score) < lowest_score:
            return "language: score too low"
        return ""

    return rule


@cache
def language_identifier(language):
    """Return py3langid's model, whose scores are from 0 to 1. Raises UserError if it does not know
    the language."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    # norm_probs: without it, scores are logarithms without a scale.
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    if language not in identifier.labels:
        raise UserError(f"language={language!r}: not known to py3langid, and a document has no "
                        f"column language; choose of {' '.join(sorted(identifier.labels))}")
    return identifier


# ---------------------------------------------------------------------- filter.py's tasks


def judge_document(settings, document):
    """Return True to keep one of datatrove's documents, or (False, reason); clean its text.

    settings: the filters' own as JSON, by which each process finds the judge that it made.
    """
    reason, document.text = judge_of(settings)(document.text, document.metadata)
    if reason:
        return False, reason
    return True


@cache
def judge_of(settings):
    return make_judge(json.loads(settings))
