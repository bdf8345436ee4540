"""A conversation with a model in the terminal, whose tokens text/chat.py describes; or, where a
model was not trained on conversations, a text that a person and the model write by turns.

The cache keeps the keys and values of all turns, so that for each answer only what is new is read.
When the context is full, the oldest turns are forgotten, and what is left is read again.
"""

import contextlib
import sys

from configurator import UserError, as_type_of, check_settings
from inference.generate import Batch
from inference.text_stream import TextStream
from runtime.terminal import say

HELP = """/new             forget everything
/history         print what the model remembers
/set top_k 50    change temperature, top_k, top_p, min_p, repetition_penalty or max_new_tokens
/exit            end (or Ctrl-D); Ctrl-C ends an answer"""


def talk(writing, encode_question, limits):
    """Answer each line of standard input until it ends. encode_question: gives a message's ids.
    limits: of the settings that /set may change, as check_settings takes them."""
    if sys.stdin is None:
        raise UserError("--interactive=True: standard input is closed, so nobody can ask anything")
    sys.stdin.reconfigure(errors="replace")
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        # Lines can be edited, and the arrow keys bring back earlier ones.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
        print("/help lists the commands", file=sys.stderr)
    conversation = Conversation(writing)
    if not conversation.assistant:
        encode_question = writing.tokenizer.encode_prompt
    while True:
        # The next line. Input that is not typed gets no prompt.
        try:
            text = input("> " if is_terminal else "")
        except EOFError:
            if is_terminal:
                print()
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print("\nCtrl-D ends", file=sys.stderr)
            continue
        if text.strip() == "/exit":
            return

        # What cannot be answered does not end the conversation.
        try:
            if text.startswith("/"):
                obey(text.split(), conversation, limits)
            elif text.strip():
                answer(text, conversation, encode_question)
        except UserError as error:
            print(error, file=sys.stderr, flush=True)


def obey(words, conversation, limits):
    """Do what a command says, which is given as its words."""
    match words:
        case ["/help"]:
            say(HELP)
        case ["/new"]:
            conversation.turns = []
        case ["/history"]:
            say(conversation.tokenizer.decode(conversation.prompt()))
        case ["/set", key, value]:
            conversation.change(key, value, limits)
        case ["/set", *_]:
            raise UserError("/set: give a setting and its value, as in /set top_k 50")
        case _:
            raise UserError(f"{' '.join(words):.60}: no such command; /help lists them")


def answer(text, conversation, encode_question):
    """Print the answer to a line as it comes."""
    forgotten = conversation.ask(encode_question(text))
    if forgotten:
        print(f"(the context is full; questions forgotten with their answers: {forgotten})",
              file=sys.stderr, flush=True)
    stream = TextStream(conversation.tokenizer, conversation.stops)
    # Ctrl-C ends the answer, and what there is of it stays.
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(conversation.answer()) as ids:
        for new_id in ids:
            say(stream.add(new_id), end="")
            if stream.has_stopped:
                break
    say(stream.end())


class Conversation:
    """A conversation with a model, in token ids."""

    def __init__(self, writing):
        """writing: a Writing; the first of its generators is that of all answers."""
        self.tokenizer, self.stops = writing.tokenizer, writing.stops
        # How to draw: one generator for all answers.
        self.sampling, self.generator = writing.sampling, writing.generator(0)
        self.block_size = writing.model.config.block_size
        self.max_new_tokens = writing.max_new_tokens
        # What stands before all turns, and before and after an answer.
        self.begin, self.assistant, self.end = [], [], []
        if self.tokenizer.eot is not None:
            self.begin = [self.tokenizer.eot]
        if {"<|assistant|>", "<|end|>"} <= self.tokenizer.special.keys():
            self.assistant = [self.tokenizer.special["<|assistant|>"]]
            self.end = [self.tokenizer.special["<|end|>"]]

        # Questions and answers in turn, the ids of each; and the sequence that they are.
        self.turns = []
        self.batch = Batch(writing.model, 1, writing.runtime, writing.compiled)

    def prompt(self):
        """Return the ids that the model continues with its answer."""
        ids = list(self.begin)
        for turn in self.turns:
            ids += turn
        return ids + self.assistant

    def room(self):
        """Return how long an answer may be: at most half of the context."""
        return min(self.max_new_tokens, self.block_size // 2)

    def ask(self, question):
        """Add a question, the ids of its turn; return how many turns are forgotten for it, each a
        question with its answer. Raises UserError for a question that is too long."""
        longest = self.block_size - self.room() - len(self.begin) - len(self.assistant)
        if len(question) > longest:
            raise UserError(f"this message has {len(question):,} tokens, and the model can read "
                            f"{longest:,}; shorten it")
        self.turns.append(question)

        # Forget the oldest turns where there is no room for an answer.
        forgotten = 0
        while len(self.prompt()) + self.room() > self.block_size:
            del self.turns[:2]
            forgotten += 1
        return forgotten

    def answer(self):
        """Yield the ids of the answer to the last question, as they are drawn."""
        # Continue the sequence of the answers before, unless turns of it were forgotten.
        prompt, answer = self.prompt(), []
        sequence, = self.batch.sequences
        if sequence is not None and sequence.ids == prompt[:len(sequence.ids)]:
            self.batch.extend(0, prompt[len(sequence.ids):])
        else:
            self.batch.remove(0)
            self.batch.add(prompt, self.sampling, self.generator)

        # The answer ends with <|end|> or end-of-text; <|end|> follows one that was cut short.
        try:
            for _ in range(self.room()):
                new_id, = self.batch.step()
                # what ends an answer is no part of it
                if new_id in (*self.end, self.tokenizer.eot):
                    self.batch.sequences[0].ids.pop()
                    break
                answer.append(new_id)
                yield new_id
        finally:
            self.turns.append([*self.assistant, *answer, *self.end])

    def change(self, key, value, limits):
        """Change a setting of the sampler. Raises UserError for one that is unknown or impossible.
        """
        # The settings that there are.
        settings = {**self.sampling._asdict(), "max_new_tokens": self.max_new_tokens}
        del settings["vocab_size"]
        if key not in settings:
            raise UserError(f"/set {key:.60}: choose {', '.join(settings)}")
        # The new value.
        value = as_type_of(settings[key], value, f"/set {key} {value:.60}")
        check_settings({key: value}, limits)
        if key == "max_new_tokens":
            self.max_new_tokens = value
        else:
            self.sampling = self.sampling._replace(**{key: value})
            self.batch.remove(0)  # so the next answer begins with the new settings
