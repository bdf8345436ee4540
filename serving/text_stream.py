"""From token ids to text that can be sent: no broken characters, no stop strings.

    stream = TextStream(tokenizer, stop=["\n\n"])
    for drawn in ...:                # what the engine draws
        send(stream.add(drawn))      # the tokens whose text is certain by now
        if stream.has_stopped: break
    send(stream.end())               # the others
"""

import codecs
from typing import NamedTuple


class Token(NamedTuple):
    """A token of an answer. The texts of an answer's tokens, joined, are the answer."""
    text: str  # '' where a character has begun and not ended
    data: bytes  # the bytes that it stands for
    log_probability: float  # of the model's own distribution, before temperature and the rest
    runners_up: list  # the most probable tokens, each (bytes, log-probability), itself among them


class TextStream:
    """The text of one answer, as its tokens come."""

    def __init__(self, tokenizer, stop=()):
        self.tokenizer, self.stop = tokenizer, stop
        self.is_new = True  # nothing of it was sent
        self.has_stopped = False  # at a stop string
        # A character may consist of several tokens: its first bytes wait here for the last one.
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # Tokens that wait with it, or because their text may turn out to be part of a stop string.
        self.held = []

    def add(self, drawn):
        """Take what the engine drew; return the Tokens that can be sent."""
        data = self.tokenizer.decode_bytes([drawn.id])
        runners_up = [(self.tokenizer.decode_bytes([i]), log_probability)
                      for i, log_probability in drawn.runners_up]
        self.held.append(Token(self.decoder.decode(data), data, drawn.log_probability, runners_up))

        # A stop string ends the text before it.
        text = "".join(token.text for token in self.held)
        found = [text.find(stop) for stop in self.stop if stop in text]
        if found:
            self.has_stopped = True
            return self.take(min(found))

        # A character that has begun waits for its end, and so does what may be the beginning of a
        # stop string.
        unfinished, _ = self.decoder.getstate()
        if unfinished:
            return []
        return self.take(len(text) - longest_overlap(text, self.stop), whole_tokens=True)

    def end(self):
        """Return the Tokens that are still held, at the end of the answer."""
        rest = self.decoder.decode(b"", final=True)
        if self.held and rest:
            last = self.held[-1]
            self.held[-1] = last._replace(text=last.text + rest)
        tokens, self.held = self.held, []
        return tokens

    def take(self, length, whole_tokens=False):
        """Return the held Tokens of the next `length` characters. The last of them is cut, or
        stays held where only whole tokens are wanted."""
        taken = []
        while self.held and length >= len(self.held[0].text):
            token = self.held.pop(0)
            length -= len(token.text)
            taken.append(token)
        if self.held and length > 0 and not whole_tokens:
            token = self.held.pop(0)
            taken.append(token._replace(text=token.text[:length]))
        return taken


def longest_overlap(text, stops):
    """Return how many characters at the end of a text begin one of the stop strings."""
    # A whole stop string was looked for before.
    longest = 0
    for stop in stops:
        for length in range(1, min(len(text), len(stop) - 1) + 1):
            if text.endswith(stop[:length]):
                longest = max(longest, length)
    return longest
