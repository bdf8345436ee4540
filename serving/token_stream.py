"""The tokens of an answer that can be sent, each with its text: whole characters, up to a stop.

    stream = TokenStream(tokenizer, stop=["###"])
    for drawn in ...:                # what the engine draws
        send(stream.add(drawn))      # the tokens whose text is certain by now
        if stream.has_stopped: break
    send(stream.end())               # the others
"""

from typing import NamedTuple

from inference.text_stream import TextStream


class Token(NamedTuple):
    """A token of an answer. The texts of an answer's tokens, joined, are the answer."""
    text: str  # '' where a character has begun and not ended
    data: bytes  # the bytes that it stands for
    log_probability: float | None  # of the model's own distribution, where it was asked for
    runners_up: list  # the most probable tokens, each (bytes, log-probability)


class TokenStream:
    """The tokens of one answer."""

    def __init__(self, tokenizer, stop=()):
        self.tokenizer = tokenizer
        self.is_new = True  # nothing of it was sent
        self.answer = TextStream(tokenizer, stop)  # says how much of the text is certain
        self.each = TextStream(tokenizer)  # says what each token adds to it
        self.held = []  # tokens that were not sent
        self.certain = 0  # characters of their text

    @property
    def has_stopped(self):
        return self.answer.has_stopped

    def add(self, drawn):
        """Take what the engine drew; return the Tokens that can be sent."""
        # The token, with the text that it adds.
        data = self.tokenizer.decode_bytes([drawn.id])
        runners_up = [(self.tokenizer.decode_bytes([i]), log_probability)
                      for i, log_probability in drawn.runners_up]
        self.held.append(Token(self.each.add(drawn.id), data, drawn.log_probability, runners_up))
        self.certain += len(self.answer.add(drawn.id))

        # A character that has begun waits for its end.
        unfinished, _ = self.each.decoder.getstate()
        if unfinished and not self.has_stopped:
            return []
        return self.take()

    def end(self):
        """Return the Tokens that are still held, at the end of the answer."""
        # A character that was cut short becomes the replacement character.
        self.certain += len(self.answer.end())
        rest = self.each.end()
        if self.held:
            last = self.held[-1]
            self.held[-1] = last._replace(text=last.text + rest)
        return self.take()

    def take(self):
        """Return the held Tokens whose text is certain; that of the last is cut at a stop."""
        # Whole tokens.
        taken = []
        while self.held and len(self.held[0].text) <= self.certain:
            token = self.held.pop(0)
            self.certain -= len(token.text)
            taken.append(token)
        # The part of the last one that is before the stop.
        if self.has_stopped and self.certain > 0:
            token = self.held.pop(0)
            taken.append(token._replace(text=token.text[:self.certain]))
        return taken
