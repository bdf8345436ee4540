"""llama.cpp beside ours: does it read what `convert.py --to=gguf` writes as we mean it?

    python convert.py --source=out/mine --to=gguf
    python experiments/llama_cpp.py --source=out/mine --file=out/mine-gguf/model.gguf

llama.cpp is that of the package xllamacpp (102 MB on Linux; CPUs of Linux, macOS and Windows), as a
server in this process. Compared are the ids of texts, the greedy continuations of prompts, token by
token, and the log-probabilities of each token's five best candidates.
"""

import gzip
import json
import random
import sys
import urllib.request
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from configurator import run  # noqa: E402
from formats.checkpoint import open_checkpoint  # noqa: E402
from text.tokenizer import Tokenizer  # noqa: E402

WEB = Path(__file__).parent.parent.parent / "shared/data/web/c4_300.jsonl.gz"
# Parts of texts that tokenizers are known to cut in different ways.
PARTS = [*" \n\t\r\x0b\x1c\x85\xa0\u2003\u3000\u200b\u180e\ufeff\u0301'’_-", "'s", "'ll", "'LL",
         "I", "the", "é", "ß", "1", "234", "٣", "½", "Ⅷ", "中", "文字", "한",
         "ाी", "ก็", "𝔘", "😀", "🇩🇪", "👩\u200d👩\u200d👧",
         "...", "def ", "    ", "\n\n", "http://x.y/z?q=1", "\x00", "\x7f", "<|endoftext|>",
         "<|user|>", "<|"]
PROMPTS = ["ROMEO:\n", "The ", "I'll", "é", "\n\n", "First Citizen:\nBefore we proceed"]


def main(
    source="out/mine",  # the checkpoint
    file="out/mine-gguf/model.gguf",  # what was made of it
    texts=5000,  # random texts to encode
    web=str(WEB),  # a .jsonl.gz file of documents to encode; '': none
):
    checkpoint = open_checkpoint(source, "best")
    model, tokenizer = checkpoint.load_model().eval(), Tokenizer.load(checkpoint.folder)
    theirs = LlamaCpp(file, model.config.block_size)

    # The ids of texts: of every character, in five surroundings; random ones; documents.
    characters = [chr(i) for i in range(0x30000) if not 0xd800 <= i < 0xe000]
    for separator in (" ", " a", "a", "1", "!"):
        parts = [separator.join(characters[i:i + 4096]) for i in range(0, len(characters), 4096)]
        compare_ids(f"all characters, separated by {separator!r}", parts, tokenizer, theirs)
    rng = random.Random(1)
    mixed = ["".join(rng.choices(PARTS, k=rng.randint(1, 14))) for _ in range(texts)]
    compare_ids("random texts", mixed, tokenizer, theirs)
    if web:
        with gzip.open(web, "rt", encoding="utf-8") as lines:
            compare_ids(Path(web).name, [json.loads(line)["text"] for line in lines], tokenizer,
                        theirs)

    # The texts that follow prompts, as long as the context.
    equal, count, largest = 0, 0, 0.0
    for prompt in PROMPTS:
        ids = tokenizer.encode_prompt(prompt)
        drawn, best = theirs.greedy(ids, model.config.block_size - len(ids))
        ours, difference = read_along(model, tokenizer.vocab_size, ids, drawn, best)
        equal += sum(a == b for a, b in zip(ours, drawn, strict=True))
        count += len(drawn)
        largest = max(largest, difference)
    print(f"greedy: {equal} of {count} tokens are ours; log-probabilities differ by at most "
          f"{largest:.4f}")


def compare_ids(what, texts, tokenizer, theirs):
    """Print how many texts have the same ids in both."""
    different = [text for text in texts if theirs.encode(text) != tokenizer.encode(text).tolist()]
    print(f"{what}: {len(texts) - len(different)} of {len(texts)} have our ids")
    for text in different[:3]:
        print(f"    not so: {text[:60]!a}")


@torch.no_grad()
def read_along(model, vocab_size, prompt, drawn, best):
    """Return the most probable id at the place of each that llama.cpp drew after a prompt, a list,
    and the largest difference from its log-probabilities `best`, [{id: value} for each place]."""
    ids = torch.tensor([prompt + drawn])  # (1, T)
    logits = model.logits(ids)[0, len(prompt) - 1:-1, :vocab_size]  # (places, V)
    ours, largest = logits.log_softmax(-1), 0.0
    for place, values in enumerate(best):
        for i, value in values.items():
            largest = max(largest, abs(ours[place, i].item() - value))
    return ours.argmax(-1).tolist(), largest


class LlamaCpp:
    """A .gguf file in llama.cpp, asked by the HTTP of its server."""

    def __init__(self, path, context):
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path, parameters.n_ctx = str(path), context
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        parameters.n_parallel, parameters.port = 1, 0  # one answer at a time; a free port
        parameters.warmup = parameters.fit_params = False
        parameters.verbosity = 0
        self.server = xllamacpp.Server(parameters)

    def ask(self, path, **body):
        request = urllib.request.Request(self.server.listening_address + path,
                                         json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def encode(self, text, parse_special=False):
        """Return the ids of a text. parse_special: the names of special tokens become these."""
        return self.ask("/tokenize", content=text, add_special=False,
                        parse_special=parse_special)["tokens"]

    def greedy(self, ids, count):
        """Return the ids that follow, a list, and the log-probabilities of each place's best
        candidates, [{id: value}]."""
        answer = self.ask("/completion", prompt=ids, n_predict=count, n_probs=5, top_k=1,
                          samplers=["top_k"], return_tokens=True, ignore_eos=True)
        best = []
        for place in answer["completion_probabilities"]:
            best.append({each["id"]: each["logprob"] for each in place["top_logprobs"]})
        return answer["tokens"], best

    def conversation(self, messages):
        """Return the ids with which the answer to messages begins, by the file's chat template."""
        prompt = self.ask("/apply-template", messages=messages)["prompt"]
        return self.encode(prompt, parse_special=True)


if __name__ == "__main__":
    run(main)
