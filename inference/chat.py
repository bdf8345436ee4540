"""A conversation with a model in the terminal. text/chat.py describes its tokens.

The cache keeps the keys and values of all turns, so that for each answer only what is new is read.
When the context is full, the oldest turns are forgotten, and what is left is read again.
"""

import codecs
import sys

from configurator import UserError
from inference.generate import Batch


def talk(conversation, encode_question, tokenizer):
    """Answer each line of standard input until it ends. encode_question: gives a question's ids."""
    if sys.stdin is None:
        raise UserError("--chat=True: standard input is closed, so nobody can ask anything")
    sys.stdin.reconfigure(errors="replace")
    is_terminal = sys.stdin.isatty()
    while True:
        # The next question. Input that is not typed gets no prompt.
        try:
            text = input("> " if is_terminal else "")
        except EOFError:
            if is_terminal:
                print()
            return
        if not text.strip():
            continue

        # A question that cannot be answered does not end the conversation.
        try:
            forgotten = conversation.ask(encode_question(text))
        except UserError as error:
            print(error, file=sys.stderr, flush=True)
            continue
        if forgotten:
            print(f"(the context is full; questions forgotten with their answers: {forgotten})",
                  file=sys.stderr, flush=True)

        # Print the answer as it comes.
        printer = TokenPrinter(tokenizer)
        for new_id in conversation.answer():
            printer.print([new_id])
        printer.end()


class Conversation:
    """A conversation with a model, in token ids."""

    def __init__(self, model, tokenizer, max_new_tokens, sampling, generator, runtime, compiled):
        """generator: the random generator of all answers. Raises UserError for a tokenizer without
        the tokens of conversations."""
        special = tokenizer.special
        if not {"<|assistant|>", "<|end|>"} <= special.keys():
            raise UserError("--chat=True: this model was not trained on conversations (there is no "
                            "<|assistant|> among its tokens); finetune it on a dataset of "
                            "python prepare.py --format=chat")
        self.sampling, self.generator = sampling, generator
        self.block_size = model.config.block_size
        self.end_of_text = tokenizer.eot
        self.assistant, self.end = special["<|assistant|>"], special["<|end|>"]
        # How long an answer may be, for which half of the context is kept free at most.
        self.max_new_tokens = min(max_new_tokens, self.block_size // 2)

        # Questions and answers in turn, each the ids of a whole message; and their one sequence.
        self.turns = []
        self.batch = Batch(model, 1, runtime, compiled)

    def prompt(self):
        """Return the ids that the model continues with its answer."""
        ids = [self.end_of_text]
        for turn in self.turns:
            ids += turn
        return [*ids, self.assistant]

    def ask(self, question):
        """Add a question, the ids of its message; return how many turns are forgotten for it, each
        a question with its answer. Raises UserError for a question that is too long."""
        longest = self.block_size - self.max_new_tokens - 2
        if len(question) > longest:
            raise UserError(f"this message has {len(question):,} tokens, and the model can read "
                            f"{longest:,}; shorten it")
        self.turns.append(question)

        # Forget the oldest turns where there is no room for an answer.
        forgotten = 0
        while len(self.prompt()) + self.max_new_tokens > self.block_size:
            del self.turns[:2]
            forgotten += 1
            self.batch.remove(0)
        return forgotten

    def answer(self):
        """Yield the ids of the answer to the last question, as they are drawn."""
        # What the sequence lacks of the conversation: where nothing was forgotten, its end.
        prompt, answer = self.prompt(), []
        if self.batch.sequences[0] is None:
            self.batch.add(prompt, self.sampling, self.generator)
        else:
            read = len(self.batch.sequences[0].ids)
            self.batch.extend(0, prompt[read:])

        # The answer; <|end|> follows where the model did not come to it.
        for _ in range(self.max_new_tokens):
            new_id, = self.batch.step()
            if new_id == self.end:
                break
            answer.append(new_id)
            yield new_id
        self.turns.append([self.assistant, *answer, self.end])


class TokenPrinter:
    """Prints the text of one sample as its tokens come."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        # A character may consist of several tokens: its first bytes wait here for the last one.
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def print(self, ids):
        text = self.decoder.decode(self.tokenizer.decode_bytes(ids))
        print(text, end="", flush=True)

    def end(self):
        print(self.decoder.decode(b"", final=True), flush=True)
