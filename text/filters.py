"""Filter and deduplicate documents: the rules of Gopher, C4 and FineWeb.

    python prepare.py --input=pages.jsonl.gz --filters='gopher repetition c4 fineweb' --dedup=near

filter.py does the same for corpora past one machine. Rules run in this order, whatever the order
they are named in: URL, language, gopher, repetition, c4, fineweb, pii. A word is what stands
between blanks, so they fit languages that write blanks; gopher's stop words are English.
"""

import difflib
import gzip
import re
from collections import Counter
from functools import cache
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path

import numpy as np

from configurator import UserError
from text.corpus import warn_once
from text.dedup import WORD, hash64

STOP_WORDS = frozenset("the be to of and that have with".split())
TOP_NGRAMS = {2: 0.20, 3: 0.18, 4: 0.16}  # most of the characters one n-gram may take
REPEATED_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # and all repeated ones
END_OF_LINE = (".", "?", "!", '"', "'", "”", "’", "…", "。", "！", "？")
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies",
          "use cookies")
CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]*\s+(?=\S)|[。！？](?=.)")
HOST = re.compile(r"(?:[a-z][a-z0-9+.-]*://|//)?(?:[^/?#@]*@)?([^/?#:@]+)")
EMAIL = re.compile(r"\b[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+"
                   r"[A-Za-z0-9]{2,63}\b")  # no more than RFC 5321's 64, so that it stays linear
NUMBERS = re.compile(r"[0-9]{1,4}(?:\.[0-9]{1,4}){3,}")  # more than an address, to spare 1.2.3.4.5
EMAILS = ("email@example.com", "firstname.lastname@example.org")
IPS = ("22.214.171.124", "126.96.36.199", "188.8.131.52", "184.108.40.206", "220.127.116.11",
       "18.104.22.168")  # FineWeb's: nobody answered there
LANGUAGE_CHARACTERS = 2000  # of a document that py3langid reads, for it is slow


def check(settings):
    """Raise ValueError for settings that cannot be used: names, ranges, files, libraries."""
    known = [rule.__name__ for rule in RULES]
    for name in settings["filters"].split():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose of {' '.join(known)}"
            raise UserError(f"filters: unknown name {name!r}; {hint}")
    path, language = settings["url_blocklist"], settings["language"]
    if path and not Path(path).is_file():
        raise UserError(f"url_blocklist={path!r}: no such file; give a list of domains")
    if language and not re.fullmatch(r"[a-z]{2,3}([_-][A-Za-z]{2,4})?", language):
        raise UserError(f"language={language!r}: give a code such as en")
    if not 0 <= settings["language_score"] <= 1:
        raise UserError(f"language_score={settings['language_score']}: must be from 0 to 1")
    if settings["dedup"] not in ("", "exact", "near"):
        raise UserError(f"dedup={settings['dedup']!r}: choose exact, near or ''")
    need(*["py3langid"] * bool(language), *["rensa"] * (settings["dedup"] == "near"))


def need(*packages):
    if missing := [name for name in packages if not find_spec(name)]:
        raise UserError(f"this needs packages that are missing: pip install {' '.join(missing)}")


def columns(settings):
    """Return the columns beside the text that the judge can use."""
    return (("url",) if settings["url_blocklist"] else ()) + (
        ("language", "language_score") if settings["language"] else ())


def make_judge(settings):
    """Return judge(text, row) -> (reason, text), to be made in each process that judges.

    row: a dict with what `columns` names, where the document has it. reason: '' for a document to
    keep, else a fixed text to count by. The text that comes back was cleaned by c4 and pii.
    """
    names = settings["filters"].split()
    rules = [rule for rule in RULES if rule.__name__ in names]
    blocked = read_blocklist(settings["url_blocklist"]) if settings["url_blocklist"] else None
    speaks = language_rule(settings["language"], settings["language_score"])

    def judge(text, row):
        if blocked is not None and blocked(row.get("url")):
            return "url: domain in the block list", text
        if reason := speaks(text, row):
            return reason, text
        for rule in rules:
            reason, text = rule(text)
            if reason:
                return f"{rule.__name__}: {reason}", text
        return "", text

    return judge


# ---------------------------------------------------------------------- the rules


def read_blocklist(path):
    """Return blocked(url) for a file of domains: each of them and what ends in '.' + it.

    Source: RefinedWeb (arXiv 2306.01116, section 3.1); FineWeb (arXiv 2406.17557, base filtering)
    with the UT1 lists. Domains are held as 64-bit hashes: 8 bytes each, and UT1 has millions.
    """
    opened = gzip.open if path.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8", errors="replace") as file:
        lines = (line.split("#")[0].lower().split() for line in file)
        names = (name for line in lines if line  # a hosts file begins its lines with an address
                 for name in (line[1:] if re.fullmatch(r"[0-9.]+|[0-9a-f:]*:[0-9a-f:]*", line[0])
                              else line[:1]))
        hashes = np.fromiter((hash64(name.strip(".")) for name in names), np.uint64)
    hashes.sort()

    def blocked(url):
        if not url:
            warn_once("url_blocklist: a document without a url is kept, this one and others")
            return False
        match = HOST.match(str(url).strip().lower())
        parts = match[1].strip(".").split(".") if match else []
        own = np.array([hash64(".".join(parts[i:])) for i in range(len(parts))], np.uint64)
        places = np.minimum(np.searchsorted(hashes, own), len(hashes) - 1)
        return bool(len(hashes)) and bool((hashes[places] == own).any())

    return blocked


def language_rule(language, least):
    """Return rule(text, row) -> reason: is the language the one that is wanted, surely enough?

    Source: FineWeb (arXiv 2406.17557, base filtering): fastText's score of at least 0.65, which its
    rows carry. py3langid judges the others; it is less sure of English than fastText is.
    """
    @cache
    def identifier():
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        found = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        if language not in found.labels:
            raise UserError(f"language={language!r}: not known to py3langid, and a document has "
                             "no column language; choose of " + " ".join(sorted(found.labels)))
        return found

    def rule(text, row):
        if not language:
            return ""
        name, score = row.get("language"), row.get("language_score")
        if not name:
            name, score = identifier().classify(text[:LANGUAGE_CHARACTERS])
        if name != language:
            return "language: another one"
        return "language: score too low" if score is not None and float(score) < least else ""

    return rule


def gopher(text):
    """Words, symbols and lines of ordinary prose. Source: Gopher (Rae and others 2021,
    arXiv 2112.11446, appendix A1.1). A word has a letter or a digit; signs are in the shares."""
    tokens = text.split()
    words = [w for w in tokens if w[0].isalnum() or any(map(str.isalnum, w))]
    if len(words) < 50:
        return "fewer than 50 words", text
    if len(words) > 100_000:
        return "more than 100,000 words", text
    if not 3 <= sum(map(len, words)) / len(words) <= 10:
        return "mean length of words not 3 to 10", text
    if text.count("#") > 0.1 * len(tokens):
        return "more than 0.1 # per word", text
    if text.count("...") + text.count("…") > 0.1 * len(tokens):
        return "more than 0.1 ellipses per word", text
    lines = text.splitlines()
    if sum(line.lstrip().startswith(("•", "-")) for line in lines) > 0.9 * len(lines):
        return "over 90% of lines begin with a bullet", text
    if sum(line.rstrip().endswith(("...", "…")) for line in lines) > 0.3 * len(lines):
        return "over 30% of lines end with an ellipsis", text
    if sum(w[0].isalpha() or any(map(str.isalpha, w)) for w in words) < 0.8 * len(tokens):
        return "under 80% of words with a letter", text
    if (len(STOP_WORDS.intersection(tokens)) < 2  # first without "that," and "The": much quicker
            and len(STOP_WORDS.intersection(WORD.findall(text.lower()))) < 2):
        return "fewer than 2 stop words", text
    return "", text


def repetition(text):
    """Lines, paragraphs and n-grams that come again. Source: Gopher (arXiv 2112.11446, table A1).
    An n-gram that stands once is not repeated, however short the text."""
    for name, pattern in (("paragraphs", r"\n{2,}"), ("lines", r"\n+")):
        copies, parts, characters = repeats(re.split(pattern, text.strip()))
        if copies > 0.3 * parts:
            return f"over 30% of {name} duplicated", text
        if characters > 0.2 * len(text):
            return f"over 20% of characters in duplicated {name}", text
    words = text.split()
    times, longest = len(words), max(map(len, words), default=0)
    for n, most in TOP_NGRAMS.items():
        if times * n * (longest + 1) <= most * len(text):
            continue  # no n-gram comes more often than its parts
        if counts := Counter(zip(*(words[i:] for i in range(n)), strict=False)):
            top = max(counts, key=counts.get)
            times = counts[top]
            if times > 1 and times * (sum(map(len, top)) + n - 1) > most * len(text):
                return f"over {most:.0%} of characters in one {n}-gram", text
    if repeated_characters(words, 5, every=True) > 0.10 * len(text):  # else all are below
        for n, most in REPEATED_NGRAMS.items():
            if repeated_characters(words, n) > most * len(text):
                return f"over {most:.0%} of characters in repeated {n}-grams", text
    return "", text


def repeats(parts):
    """Return how many parts came before, how many there are, and the former's characters."""
    copies = Counter(parts)
    return (len(parts) - len(copies), len(parts),
            sum((times - 1) * len(part) for part, times in copies.items()))


def repeated_characters(words, n, every=False):
    """Return the characters in n-grams that came before. They do not overlap, each being taken
    where the one before ends (or every=True: what any of them covers, which is never less)."""
    grams = list(zip(*(words[i:] for i in range(n)), strict=False))
    seen, covered, i = set(), set(), 0
    if len(set(grams)) == len(grams):
        return 0
    while i < len(grams):
        if grams[i] in seen:
            covered.update(range(i, i + n))
            i += 1 if every else n
        else:
            seen.add(grams[i])
            i += 1
    return sum(len(words[i]) for i in covered)


def c4(text):
    """Drop lines that are not sentences of the page, then pages with little left. Source: C4
    (Raffel and others 2020, arXiv 1910.10683, section 2.2) as FineWeb has it: no rule about the
    punctuation that ends a line, 3 words per line and 5 sentences (C4's own code: 5 and 3)."""
    kept, sentences = [], 0
    for line in map(str.strip, text.splitlines()):
        words = line.split()
        line = CITATION.sub("", line) if "[" in line else line
        small = line.lower()
        if len(words) < 3 or (len(line) > 1000 and max(map(len, words)) > 1000):
            continue
        if "lorem ipsum" in small:
            return "lorem ipsum", text
        if "javascript" in small:
            continue
        if "{" in line:
            return "curly bracket", text
        if any(phrase in small for phrase in POLICY):
            continue
        sentences += 1 + len(SENTENCE_END.findall(line))
        kept.append(line)
    if sentences < 5:
        return "fewer than 5 sentences", text
    return "", "\n".join(kept).strip()


def fineweb(text):
    """Lists, menus and pages of copies. Source: FineWeb (Penedo and others 2024,
    arXiv 2406.17557, section 3.6), with the paper's thresholds (datatrove's differ)."""
    lines = [line.rstrip() for line in text.split("\n") if line.strip()]
    if sum(line.endswith(END_OF_LINE) for line in lines) <= 0.12 * len(lines):
        return "12% of lines or fewer end with punctuation", text
    if repeats(lines)[2] >= 0.1 * sum(map(len, lines)):
        return "10% of characters or more in duplicated lines", text
    if sum(len(line) < 30 for line in lines) >= 0.67 * len(lines):
        return "67% of lines or more under 30 characters", text
    return "", text


def pii(text):
    """Replace e-mail addresses and public IPv4 addresses by FineWeb's placeholders, in turn from
    the first in each document. Source: FineWeb (arXiv 2406.17557, its final set)."""
    if "@" in text:
        found = iter(range(len(text)))
        text = EMAIL.sub(lambda match: EMAILS[next(found) % len(EMAILS)], text)
    places = iter(range(len(text)))

    def replace(match):
        try:
            public = ip_address(match[0]).is_global
        except ValueError:  # 300.1.1.1, 1.02.3.4, 1.2.3.4.5
            return match[0]
        return IPS[next(places) % len(IPS)] if public else match[0]

    return "", NUMBERS.sub(replace, text)


RULES = (gopher, repetition, c4, fineweb, pii)
