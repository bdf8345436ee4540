"""Answers in the words of OpenAI's API: whole ones, and the chunks of streams.

github.com/openai/openai-openapi describes these objects.
"""

import secrets
import time
from collections.abc import Callable
from typing import NamedTuple


class Part(NamedTuple):
    """A piece of an answer, or all of it."""
    index: int  # of the answer in its request
    tokens: list  # Tokens (token_stream.py)
    offset: int  # characters of the answer before them
    finish_reason: str | None  # of the last part: stop or length
    is_first: bool  # of this answer

    @property
    def text(self):
        return "".join(token.text for token in self.tokens)


class Wording(NamedTuple):
    """What differs between the two endpoints."""
    prefix: str  # of ids
    whole: str  # the kind of object that a whole answer is
    chunk: str  # and a part of a stream
    choice: Callable  # puts a Part into words


def new_header(wording, kind, model_name):
    """Return what a whole answer, or each chunk of a stream, begins with. kind: wording.whole or
    wording.chunk."""
    return {"id": wording.prefix + secrets.token_hex(12), "object": kind,
            "created": int(time.time()), "model": model_name}


def usage(prompt_tokens, completion_tokens):
    """Return the numbers of tokens of a request."""
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens}


def completion_choice(part, has_probabilities, is_chunk):
    """Return a Part as a choice of /v1/completions, where chunks look like whole answers."""
    # The text alone.
    choice = {"index": part.index, "text": part.text, "logprobs": None,
              "finish_reason": part.finish_reason}
    if not has_probabilities:
        return choice

    # One entry for each token in each of four lists.
    tokens, log_probabilities, runners_up, offsets = [], [], [], []
    offset = part.offset
    for token in part.tokens:
        tokens.append(token.text)
        log_probabilities.append(token.log_probability)
        runners_up.append({readable(data): value for data, value in token.runners_up})
        offsets.append(offset)
        offset += len(token.text)
    choice["logprobs"] = {"tokens": tokens, "token_logprobs": log_probabilities,
                          "top_logprobs": runners_up, "text_offset": offsets}
    return choice


def chat_choice(part, has_probabilities, is_chunk):
    """Return a Part as a choice of /v1/chat/completions."""
    # The text. A client joins the chunks of a stream, so the role comes once.
    message = {"content": part.text}
    if part.is_first:
        message["role"] = "assistant"
    key = "delta" if is_chunk else "message"
    choice = {"index": part.index, key: message, "logprobs": None,
              "finish_reason": part.finish_reason}
    # And its tokens.
    if has_probabilities:
        choice["logprobs"] = {"content": [token_object(token) for token in part.tokens],
                              "refusal": None}
    return choice


def token_object(token):
    # The chosen token is one of them where it was probable enough.
    runners_up = [{"token": readable(data), "logprob": value, "bytes": list(data)}
                  for data, value in token.runners_up]
    return {"token": token.text, "logprob": token.log_probability, "bytes": list(token.data),
            "top_logprobs": runners_up}


def readable(data):
    """Return a token's bytes as text; those that are no whole character as \\xe2."""
    return data.decode(errors="backslashreplace")


COMPLETION = Wording("cmpl-", "text_completion", "text_completion", completion_choice)
CHAT = Wording("chatcmpl-", "chat.completion", "chat.completion.chunk", chat_choice)
