"""inference/text_stream.py: stops, also of several tokens, and what is held back."""

import pytest
from test_sample import BYTES

from inference.text_stream import TextStream, read_stops, text_pieces


def pieces_of(text, stops, prompt=""):
    stream = TextStream(BYTES, stops)
    stream.prompt(list(prompt.encode()))
    pieces = [stream.add(i) for i in text.encode()]
    return [*pieces, stream.end()], stream


@pytest.mark.parametrize(("text", "stops", "expected"), [
    ("abc", [], "abc"), ("abXYc", ["XY"], "ab"), ("XYab", ["XY"], ""), ("abX", ["XY"], "abX"),
    ("aXXYb", ["XY"], "aX"), ("abcde", ["cd", "bc"], "a"), ("aé€b", ["€"], "aé"),
    ("ababac", ["abac"], "ab")])
def test_the_text_ends_before_the_first_stop(text, stops, expected):
    pieces, stream = pieces_of(text, stops)
    assert "".join(pieces) == expected
    assert stream.has_stopped == (expected != text)


def test_only_what_may_begin_a_stop_is_held_back():
    pieces, _ = pieces_of("a\nb\n\nc", ["\n\n"])
    assert pieces == ["a", "", "\nb", "", "", "", ""]
    pieces, _ = pieces_of("bc", ["ab", "c"], prompt="a")  # the prompt's a begins no stop
    assert pieces == ["b", "", ""]


def test_a_batch_is_over_when_all_its_samples_are():
    steps = iter([[97, 97], [88, 98], [99, None], [99, None], [99, None]])
    streams = [TextStream(BYTES, ["X"]) for _ in range(2)]
    assert list(text_pieces(steps, streams)) == [["a", "a"], ["", "b"], ["", ""], ["", ""]]
    assert [stream.count for stream in streams] == [2, 2]
    assert len(list(steps)) == 2


def test_stops_are_a_text_or_a_list():
    assert [read_stops(stop) for stop in ("", "Q:", '["\\n", "[x"]')] == [[], ["Q:"], ["\n", "[x"]]
    for stop in ('["a"', "[1]", '[""]'):
        with pytest.raises(ValueError, match=r"stop='\[.*: a text, or a JSON list of texts"):
            read_stops(stop)
