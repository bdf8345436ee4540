"""How many small tasks a finetuned model answers exactly, of tasks that it was not trained on.

    python experiments/answers.py --out_dir=out/stdlib    # a base model: none
    python experiments/answers.py --out_dir=out/sft

The tasks are those of documents/instructions.py beyond the ones in the training data: capital
letters, backwards, counting letters. An answer is right if the model, which always takes its most
probable token, writes it exactly and then ends its turn. Prints a line for each kind of task, and
one wrong answer.
"""

import re
import sys
from itertools import islice
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from configurator import run  # noqa: E402
from documents.instructions import TASKS, small_tasks  # noqa: E402
from inference.generate import generate  # noqa: E402
from inference.sampling import Sampling  # noqa: E402
from posttraining.vocabulary import grow_vocabulary  # noqa: E402
from runtime.processes import setup  # noqa: E402
from sample import load_model_and_tokenizer  # noqa: E402
from text.chat import SPECIAL, encode_question  # noqa: E402
from text.tokenizer import Tokenizer, add_special  # noqa: E402


def main(
    out_dir="out/sft",  # the run's folder
    questions=600,  # how many new tasks to ask, before those are left out whose word is known
    max_new_tokens=16,  # no answer is longer
):
    runtime = setup("cpu", "float32")
    model, tokenizer = load_model_and_tokenizer("resume", out_dir, "best")
    model.eval()
    # A base model has no special tokens: give it those that finetuning begins with.
    if not tokenizer.special:
        grown = Tokenizer(add_special(tokenizer.spec, SPECIAL))
        grow_vocabulary(model, tokenizer.vocab_size, grown.vocab_size)
        tokenizer = grown

    asked, right, example = {}, {}, {}
    for prompt, response in new_tasks(questions):
        # Ask, and read up to the end of the turn.
        question = encode_question(tokenizer, prompt)
        answer, has_ended = answer_to(model, question, tokenizer, max_new_tokens, runtime)
        is_right = has_ended and answer == response

        # Count by the kind of task: its words without the one that it is about.
        kind = re.sub('"[a-z]+"', "...", prompt)
        asked[kind] = asked.get(kind, 0) + 1
        right[kind] = right.get(kind, 0) + is_right
        if not is_right:
            example[kind] = f"for example {prompt} {answer!r}"
    for kind, count in asked.items():
        print(f"{kind:40} {right[kind]:4} of {count} right {example.get(kind, '')}")
    print(f"{'all':40} {sum(right.values()):4} of {sum(asked.values())} right")


def new_tasks(count):
    """Return (prompt, response) of tasks whose words are not in the training data."""
    word = re.compile('"([a-z]+)"')
    tasks = list(small_tasks(TASKS + count))
    known = {word.search(prompt)[1] for prompt, _ in tasks[:TASKS]}
    return [task for task in islice(tasks, TASKS, None) if word.search(task[0])[1] not in known]


def answer_to(model, question, tokenizer, max_new_tokens, runtime):
    """Return the text of the answer, and whether its turn ended."""
    prompt = [tokenizer.eot, *question, tokenizer.special["<|assistant|>"]]
    greedy = Sampling(temperature=0.0, top_k=0, top_p=1.0, vocab_size=tokenizer.vocab_size)
    steps = generate(model, [prompt], [torch.Generator()], max_new_tokens, greedy,
                     tokenizer.special["<|end|>"], runtime)
    answer = [new_id for [new_id] in steps if new_id is not None]
    return tokenizer.decode(answer), len(answer) < max_new_tokens


if __name__ == "__main__":
    run(main)
