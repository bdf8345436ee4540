"""The rules on a document's text: those of Gopher, C4 and FineWeb, and the masking of addresses.

Each is a function of the text that returns (reason, text): why the document is to be removed, or ''
to keep it, and its text, from which c4 and pii take something. A word is what stands between
blanks, so the rules fit languages that write blanks; gopher's stop words are English.
"""

import re
from collections import Counter
from ipaddress import ip_address
from itertools import cycle

from documents.dedup import WORD

# gopher and repetition: the values of Gopher's appendix A1.1 and table A1
STOP_WORDS = frozenset("the be to of and that have with".split())
TOP_NGRAMS = {2: 0.20, 3: 0.18, 4: 0.16}  # n: the largest share of characters in one n-gram
REPEATED_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # in all repeated ones

# c4 and fineweb
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies",
          "use cookies")
CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]*\s+(?=\S)|[。！？](?=.)")
END_OF_LINE = (".", "?", "!", '"', "'", "”", "’", "…", "。", "！", "？")

# pii. Each pattern takes linear time on any text, hence the limits; 64 is RFC 5321's. NUMBERS takes
# in more than four numbers, so that 1.2.3.4.5 is seen to be no address.
EMAIL = re.compile(r"\b[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+"
                   r"[A-Za-z0-9]{2,63}\b")
NUMBERS = re.compile(r"[0-9]{1,4}(?:\.[0-9]{1,4}){3,}")
EMAILS = ("email@example.com", "firstname.lastname@example.org")
IPS = ("22.214.171.124", "126.96.36.199", "188.8.131.52", "184.108.40.206", "220.127.116.11",
       "18.104.22.168")  # FineWeb's: nobody answered there


def gopher(text):
    """Words, symbols and lines of ordinary prose. Source: Gopher (Rae and others 2021,
    arXiv 2112.11446, appendix A1.1). A word has a letter or a digit; signs are in the shares."""
    # How many words there are, and how long. Nearly always the first character decides.
    tokens = text.split()
    words = [w for w in tokens if w[0].isalnum() or any(map(str.isalnum, w))]
    if len(words) < 50:
        return "fewer than 50 words", text
    if len(words) > 100_000:
        return "more than 100,000 words", text
    if not 3 <= sum(map(len, words)) / len(words) <= 10:
        return "mean length of words not 3 to 10", text

    # Symbols per word, and lines that are items of a list or are cut short.
    if text.count("#") > 0.1 * len(tokens):
        return "more than 0.1 # per word", text
    if text.count("...") + text.count("…") > 0.1 * len(tokens):
        return "more than 0.1 ellipses per word", text
    lines = text.splitlines()
    if sum(line.lstrip().startswith(("•", "-")) for line in lines) > 0.9 * len(lines):
        return "over 90% of lines begin with a bullet", text
    if sum(line.rstrip().endswith(("...", "…")) for line in lines) > 0.3 * len(lines):
        return "over 30% of lines end with an ellipsis", text

    # Words with letters, and English stop words: first among the tokens as they are, since to find
    # them in "that," and "The" too takes much longer.
    if sum(w[0].isalpha() or any(map(str.isalpha, w)) for w in words) < 0.8 * len(tokens):
        return "under 80% of words with a letter", text
    stop_words = STOP_WORDS.intersection(tokens)
    if len(stop_words) < 2:
        stop_words = STOP_WORDS.intersection(WORD.findall(text.lower()))
    if len(stop_words) < 2:
        return "fewer than 2 stop words", text
    return "", text


def repetition(text):
    """Lines, paragraphs and n-grams that come again. Source: Gopher (arXiv 2112.11446, table A1).
    An n-gram that stands once is not repeated, however short the text."""
    # Paragraphs and lines that stood before.
    for name, separator in (("paragraphs", r"\n{2,}"), ("lines", r"\n+")):
        parts = re.split(separator, text.strip())
        copies, characters = count_repeats(parts)
        if copies > 0.3 * len(parts):
            return f"over 30% of {name} duplicated", text
        if characters > 0.2 * len(text):
            return f"over 20% of characters in duplicated {name}", text

    # The most frequent n-gram. It comes no more often than the most frequent one of fewer words,
    # which shows for most texts without counting that its share is small enough.
    words = text.split()
    longest_word = max(map(len, words), default=0)
    times = len(words)
    for n, largest_share in TOP_NGRAMS.items():
        if times * n * (longest_word + 1) <= largest_share * len(text):
            continue
        counts = Counter(ngrams(words, n))
        if not counts:
            continue
        top = max(counts, key=counts.get)
        times = counts[top]
        if times > 1 and times * len(" ".join(top)) > largest_share * len(text):
            return f"over {largest_share:.0%} of characters in one {n}-gram", text

    # All n-grams that come again. Longer ones cover no more than those of 5 words that overlap, so
    # most texts need no further look.
    if repeated_characters(words, 5, overlapping=True) > 0.10 * len(text):
        for n, largest_share in REPEATED_NGRAMS.items():
            if repeated_characters(words, n) > largest_share * len(text):
                return f"over {largest_share:.0%} of characters in repeated {n}-grams", text
    return "", text


def count_repeats(parts):
    """Return (how many parts are equal to an earlier one, the number of their characters)."""
    counts = Counter(parts)
    characters = sum((times - 1) * len(part) for part, times in counts.items())
    return len(parts) - len(counts), characters


def ngrams(words, n):
    """Return an iterator of the tuples of n neighbouring words."""
    return zip(*(words[i:] for i in range(n)), strict=False)


def repeated_characters(words, n, overlapping=False):
    """Return the number of characters in n-grams that came before. Each is taken where the one
    before it ends, or overlapping=True: the characters that any of them covers, never fewer."""
    grams = list(ngrams(words, n))
    if len(set(grams)) == len(grams):
        return 0
    seen, covered, i = set(), set(), 0
    while i < len(grams):
        step = 1
        if grams[i] in seen:
            covered.update(range(i, i + n))
            if not overlapping:
                step = n
        seen.add(grams[i])
        i += step
    return sum(len(words[i]) for i in covered)


def c4(text):
    """Drop lines that are not sentences of the page, then pages with little left. Source: C4
    (Raffel and others 2020, arXiv 1910.10683, section 2.2) as FineWeb has it: no rule about the
    punctuation that ends a line, 3 words per line and 5 sentences (C4's own code: 5 and 3)."""
    kept, sentences = [], 0
    for line in text.splitlines():
        line = line.strip()
        words = line.split()
        if "[" in line:
            line = CITATION.sub("", line)
        lower = line.lower()

        # Lines of a menu, or without blanks.
        if len(words) < 3 or (len(line) > 1000 and max(map(len, words)) > 1000):
            continue
        # A line that condemns the page, or only itself.
        if "lorem ipsum" in lower:
            return "lorem ipsum", text
        if "javascript" in lower:
            continue
        if "{" in line:
            return "curly bracket", text
        if any(phrase in lower for phrase in POLICY):
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
    _, characters = count_repeats(lines)
    if characters >= 0.1 * sum(map(len, lines)):
        return "10% of characters or more in duplicated lines", text
    if sum(len(line) < 30 for line in lines) >= 0.67 * len(lines):
        return "67% of lines or more under 30 characters", text
    return "", text


def pii(text):
    """Replace e-mail addresses and public IPv4 addresses by FineWeb's placeholders, in turn from
    the first in each document. Source: FineWeb (arXiv 2406.17557, its final set)."""
    emails, addresses = cycle(EMAILS), cycle(IPS)

    def replace_address(match):
        try:
            public = ip_address(match[0]).is_global
        except ValueError:  # 300.1.1.1, 1.02.3.4, 1.2.3.4.5
            return match[0]
        return next(addresses) if public else match[0]

    if "@" in text:
        text = EMAIL.sub(lambda match: next(emails), text)
    return "", NUMBERS.sub(replace_address, text)
