"""What word vectors know: nearest words, analogies, people's judgements, a picture.

Analogies are word2vec's questions-words.txt: lines of four words, "Athens Greece Oslo Norway", in
sections that begin with ":". Judgements are WordSim-353's or SimLex-999's: two words and a score
in each line, with tabs between them.
"""

from pathlib import Path

import numpy as np

from configurator import UserError
from formats.files import naming_write_errors

SHOWN, NEIGHBOURS = 6, 5  # words whose neighbours are shown, where none are asked for


def describe(vectors, words, analogies="", judgements=""):
    """Return as text the neighbours of some words ('': the most common long ones), and the scores
    of two files, where they are named. Raises UserError for a word that has no vector."""
    lines = []
    # the neighbours
    for word in chosen_words(vectors, words):
        found = [f"{other} {cosine:.2f}" for other, cosine in vectors.neighbours(word, NEIGHBOURS)]
        lines.append(f"{word}: {', '.join(found)}")
    # the analogies, by section and in all
    if analogies:
        sections = read_analogies(analogies)
        asked = sum(len(questions) for questions in sections.values())
        scores = {name: analogy_score(vectors, sections[name]) for name in sections}
        right, known = np.sum(list(scores.values()), axis=0).tolist()
        for name, (section_right, section_known) in scores.items():
            lines.append(f"{name}: {percent(section_right, section_known)} of {section_known:,}")
        lines.append(f"analogies: {percent(right, known)} of {known:,} questions; {asked:,} were "
                     "asked, the others have words without a vector")
    # people's judgements
    if judgements:
        pairs = read_judgements(judgements)
        correlation, known = similarity_score(vectors, pairs)
        lines.append(f"judgements: Spearman's correlation {correlation:.3f} over {known} of "
                     f"{len(pairs)} pairs")
    return "\n".join(lines)


def percent(part, whole):
    return f"{part / max(1, whole):.1%}"


def chosen_words(vectors, words):
    """Return the words of a setting; '': the most common ones of five letters or more."""
    if words:
        chosen = words.split()
        vectors.ids(*chosen)
        return chosen
    return [word for word in vectors.words if len(word) >= 5][:SHOWN]


def draw_words(path, vectors, words):
    """Draw words and their neighbours in the two dimensions in which they differ most."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # Each word, and its neighbours.
    figure, axes = plt.subplots(figsize=(8, 6))
    groups = {}
    for word in chosen_words(vectors, words):
        groups[word] = [word] + [other for other, _ in vectors.neighbours(word, NEIGHBOURS)]
    points = vectors.flat([word for group in groups.values() for word in group])
    # Write each at its point: a colour for each group.
    number = 0
    for colour, group in enumerate(groups.values()):
        for word in group:
            axes.annotate(word, points[number], color=f"C{colour % 10}")
            number += 1
    axes.scatter(*points.T, s=1)
    axes.set_title("words and their nearest neighbours: the first two principal components")
    figure.tight_layout()
    with naming_write_errors(path, "run the same command again"):
        figure.savefig(path)
    plt.close(figure)


# ---------------------------------------------------------------------- scores


def analogy_score(vectors, questions):
    """Return (right answers, questions whose words all have vectors) of [(a, b, c, d)]: is d the
    word nearest to b - a + c, other than a, b and c?"""
    asked = [question for question in questions if vectors.id_of.keys() >= set(question)]
    right, unit = 0, vectors.unit()
    # Some hundred questions at a time: the cosines of each with all words.
    for first in range(0, len(asked), 500):
        a, b, c, d = np.array([vectors.ids(*q) for q in asked[first:first + 500]]).T
        cosines = (unit[b] - unit[a] + unit[c]) @ unit.T  # (questions, W), but for the length
        for excluded in (a, b, c):
            cosines[np.arange(len(a)), excluded] = -np.inf
        right += int((cosines.argmax(axis=1) == d).sum())
    return right, len(asked)


def similarity_score(vectors, pairs):
    """Return (Spearman's correlation of cosines with people's scores, pairs whose words have
    vectors) of [(word, word, score)]."""
    known = [p for p in pairs if p[0] in vectors.id_of and p[1] in vectors.id_of]
    if len(known) < 2:
        return float("nan"), len(known)
    # compare the ranks: cosines and people's scores have different scales
    unit = vectors.unit()
    cosines = [float(unit[vectors.id_of[a]] @ unit[vectors.id_of[b]]) for a, b, _ in known]
    people = [score for _, _, score in known]
    return float(np.corrcoef(ranks(cosines), ranks(people))[0, 1]), len(known)


def ranks(values):
    """Return the rank of each value; equal ones share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


# ---------------------------------------------------------------------- files


def read_analogies(path):
    """Return {section: [(a, b, c, d)]}, in small letters."""
    sections, name = {}, "questions"
    for line in read_lines(path):
        words = line.lower().split()
        if line.startswith(":"):
            name = line[1:].strip()
        elif len(words) == 4:
            sections.setdefault(name, []).append(tuple(words))
        else:
            raise UserError(f"analogies={path!r}: {line[:60]!r} is not four words")
    return sections


def read_judgements(path):
    """Return [(word, word, score)], in small letters."""
    pairs = []
    for line in read_lines(path):
        try:
            first, second, score = line.lower().split("\t")
            pairs.append((first, second, float(score)))
        except ValueError as error:
            raise UserError(f"judgements={path!r}: {line[:60]!r} is not two words and a number "
                            "with tabs between them") from error
    return pairs


def read_lines(path):
    """Return the lines of a text file that are not empty."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from error
    return [line for line in text.splitlines() if line.strip()]
