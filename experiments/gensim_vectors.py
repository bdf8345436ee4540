"""Word vectors of ladder/word_vectors.py beside gensim's, of the same words with the same settings.

    pip install gensim==4.4.0
    python experiments/gensim_vectors.py --by=ours --input=gutenberg/train.jsonl.gz --megabytes=7 \
        --epochs=3 --analogies=questions-words.txt --judgements=EN-WS-353-ALL.txt
    python experiments/gensim_vectors.py --by=gensim ...

Prints the processor's seconds, neighbours, the share of right analogies by section with how many of
them have words in the vocabulary, and Spearman's correlation with people's judgements.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configurator import run
from documents.corpus import Files
from ladder.word_scores import describe
from ladder.word_vectors import CHUNK, WordVectors, words_of
from text.tokenizer import Tokenizer


def main(
    by="ours",  # ours, or gensim
    input="",  # a file of text, or a .jsonl, also packed
    megabytes=7.0,  # of text, at most
    epochs=1,  # passes over it
    analogies="",  # questions-words.txt
    judgements="",  # EN-WS-353-ALL.txt, or another such file
    words="king woman london",  # whose neighbours are shown
):
    # The text as words, the same for both.
    pieces, size = [], 0
    for _, text, _ in Files([Path(input)]):
        pieces.append(text)
        size += len(text)
        if size > 1e6 * megabytes:
            break
    tokenizer = Tokenizer({"kind": "bytes"})
    ids, vocabulary = words_of(tokenizer.encode("\n".join(pieces)), tokenizer)
    print(f"{by}: {len(ids):,} words, {len(vocabulary):,} different, {epochs} epochs")

    vectors, started = WordVectors(), time.process_time()
    if by == "gensim":
        vectors = train_by_gensim(ids, vocabulary, epochs)
    else:
        vectors.fit(ids, vocabulary, epochs)
    print(f"{time.process_time() - started:.1f} seconds of one processor core")
    print(describe(vectors, words, analogies, judgements))


def train_by_gensim(ids, vocabulary, epochs):
    """Return gensim's vectors, as WordVectors. Its sentences are our chunks."""
    import gensim

    names = np.array(list(vocabulary))
    sentences = [names[ids[i:i + CHUNK]].tolist() for i in range(0, len(ids), CHUNK)]
    model = gensim.models.Word2Vec(
        sentences, vector_size=100, window=5, sg=1, negative=5, sample=1e-3, alpha=0.025,
        min_alpha=0.025e-4, epochs=epochs, min_count=1, workers=1, seed=1337)
    vectors = WordVectors()
    text = "\n".join(model.wv.index_to_key).encode()
    vectors.load_state_dict({
        "v": torch.tensor(model.wv.vectors), "u": torch.tensor(model.syn1neg),
        "words": torch.frombuffer(bytearray(text), dtype=torch.uint8)})
    return vectors


if __name__ == "__main__":
    run(main)
