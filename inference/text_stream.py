"""The text of a sample while its tokens come: whole characters, up to a stop."""

import codecs
import json

from configurator import UserError


def read_stops(stop):
    """Return the stops that the setting `stop` names: none where it is empty, one text, or those of
    a JSON list. Raises UserError for a list that is damaged."""
    if not stop.startswith("["):
        return [stop] if stop else []
    try:
        stops = json.loads(stop)
    except ValueError:
        stops = None
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise UserError(f"stop={stop!r:.60}: a text, or a JSON list of texts such as "
                        '["Q:", "\\n\\n"]')
    return stops


class TextStream:
    """Gives the text of a sample piece by piece, as far as it is certain.

    Held back are the first bytes of a character whose other bytes are tokens to come, and what may
    be the beginning of a stop. The text ends before the first stop, and has_stopped is then True.
    """

    def __init__(self, tokenizer, stops=()):
        self.tokenizer, self.stops = tokenizer, stops
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held, self.has_stopped = "", False
        self.count = 0  # of the tokens that were added before the text stopped

    def prompt(self, ids):
        """Return the text of the prompt, in which stops do not count."""
        return self.decoder.decode(self.tokenizer.decode_bytes(ids))

    def add(self, new_id):
        """Return the text that one more id makes certain."""
        self.count += not self.has_stopped
        return self.up_to_a_stop(self.decoder.decode(self.tokenizer.decode_bytes([new_id])))

    def end(self):
        """Return the rest: what was held back."""
        text = self.up_to_a_stop(self.decoder.decode(b"", final=True)) + self.held
        self.held = ""
        return text

    def up_to_a_stop(self, text):
        if self.has_stopped:
            return ""
        text = self.held + text
        # A stop: the text ends before it.
        places = [text.find(stop) for stop in self.stops if stop in text]
        if places:
            self.held, self.has_stopped = "", True
            return text[:min(places)]

        # Hold back the longest end that a stop begins with.
        longest = max(map(len, self.stops), default=0)
        length = min(longest, len(text))
        while length > 0 and not any(stop.startswith(text[-length:]) for stop in self.stops):
            length -= 1
        self.held = text[len(text) - length:]
        return text[:len(text) - length]


def text_pieces(steps, streams):
    """Yield, for each token that `generate` draws, what it adds to the text of each sample, until
    all have ended; at last what was held back."""
    for new_ids in steps:
        is_over, pieces = True, []
        for stream, new_id in zip(streams, new_ids, strict=True):
            if new_id is None:
                pieces.append("")
            else:
                pieces.append(stream.add(new_id))
                is_over = is_over and stream.has_stopped
        yield pieces
        if is_over:
            break
    yield [stream.end() for stream in streams]
