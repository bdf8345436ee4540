"""What a client may ask for: the bodies of OpenAI's completions and chat/completions, checked.

    wanted = read_completion(body, model_name, tokenizer, limits)
    wanted = read_chat(body, model_name, tokenizer, limits)

Each returns a GenerationRequest or raises Refusal, which says what is wrong with which key. Beside
OpenAI's keys there are top_k, min_p and repetition_penalty, as in inference/sampling.py. Keys that
this server cannot honour are accepted with the value that changes nothing, and refused with any
other.
"""

import json
from typing import NamedTuple

from starlette.responses import JSONResponse

from configurator import UserError
from inference.sampling import Sampling
from text.chat import encode_messages, knows_conversations

# What every request may have; the keys that change nothing with these values; and those of one
# endpoint alone.
KEYS = {"model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "n",
        "stream", "stream_options", "stop", "seed", "logprobs", "user", "metadata", "store"}
NEUTRAL = {"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "best_of": 1,
           "echo": False, "suffix": "", "tools": [], "tool_choice": "none",
           "response_format": {"type": "text"}}
COMPLETION_KEYS = {"prompt"}
CHAT_KEYS = {"messages", "top_logprobs", "max_completion_tokens"}


class Refusal(Exception):
    """A request that is answered with an error, in the words of OpenAI's API."""

    def __init__(self, message, param=None, status=400, code=None):
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self):
        return JSONResponse(self.body, self.status)


class Limits(NamedTuple):
    """What a request may cost."""
    max_new_tokens: int  # tokens of one answer
    max_answers: int  # answers of one request: its prompts times n
    block_size: int  # tokens of a prompt


class GenerationRequest(NamedTuple):
    """A request that can be answered."""
    prompts: list  # of lists of token ids
    n: int  # answers to each prompt
    max_new_tokens: int  # of each answer
    sampling: Sampling
    seed: int | None  # of the random draws; None: another one each time
    stop: list  # texts before which an answer ends
    runners_up: int | None  # how many of them each token comes with; None: no probabilities
    stream: bool  # send the answer as it comes
    include_usage: bool  # end the stream with the numbers of tokens


def read_completion(body, model_name, tokenizer, limits):
    """Return the GenerationRequest of a body, a dict, of /v1/completions."""
    check_keys(body, model_name, COMPLETION_KEYS)
    # A completion goes on from each of its prompts.
    prompts = read_prompts(body.get("prompt", ""), tokenizer)
    max_new_tokens = number(body, "max_tokens", 16, 1, limits.max_new_tokens)
    runners_up = number(body, "logprobs", None, 0, 20)
    return generation_request(body, prompts, max_new_tokens, runners_up, tokenizer, limits)


def read_chat(body, model_name, tokenizer, limits):
    """Return the GenerationRequest of a body, a dict, of /v1/chat/completions."""
    check_keys(body, model_name, CHAT_KEYS)
    if not knows_conversations(tokenizer):
        raise Refusal("this model was not trained on conversations: it has no <|assistant|> among "
                      "its tokens; use /v1/completions")
    prompts = [read_conversation(body.get("messages"), tokenizer)]

    # How long an answer may be: max_tokens is the key's older name.
    max_new_tokens = limits.max_new_tokens
    for key in ("max_tokens", "max_completion_tokens"):
        max_new_tokens = number(body, key, max_new_tokens, 1, limits.max_new_tokens)

    # Whether tokens come with their probabilities, and with how many runners-up.
    count = number(body, "top_logprobs", 0, 0, 20)
    runners_up = None
    if switch(body, "logprobs"):
        runners_up = count
    return generation_request(body, prompts, max_new_tokens, runners_up, tokenizer, limits)


def generation_request(body, prompts, max_new_tokens, runners_up, tokenizer, limits):
    """Return the GenerationRequest, with what both kinds of requests have."""
    # What the model cannot read, and what would keep it busy for too long.
    longest = max(map(len, prompts))
    if longest > limits.block_size:
        raise Refusal(f"the prompt has {longest:,} tokens, and the model reads at most "
                      f"{limits.block_size:,}; shorten it", code="context_length_exceeded")
    n = number(body, "n", 1, 1, limits.max_answers)
    if n * len(prompts) > limits.max_answers:
        raise Refusal(f"{len(prompts)} prompts with n={n}: a request may have at most "
                      f"{limits.max_answers} answers", "n")

    # How to draw.
    sampling = Sampling(temperature=number(body, "temperature", 1.0, 0, 2, float),
                        top_k=number(body, "top_k", 0, 0, 10**9),
                        top_p=number(body, "top_p", 1.0, 1e-9, 1, float),
                        vocab_size=tokenizer.vocab_size,
                        min_p=number(body, "min_p", 0.0, 0, 1, float),
                        repetition_penalty=number(body, "repetition_penalty", 1.0, 0.1, 10, float))

    # How to send it.
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise Refusal("stream_options: must be an object", "stream_options")
    return GenerationRequest(prompts, n, max_new_tokens, sampling,
                    number(body, "seed", None, -2**63, 2**63 - 1), read_stop(body.get("stop")),
                    runners_up, switch(body, "stream"), switch(options, "include_usage"))


# ---------------------------------------------------------------------- parts of a body


def parse_json(raw):
    """Return the dict that the bytes of a body hold."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the body is not JSON ({error})") from error
    if not isinstance(body, dict):
        raise Refusal("the body is not a JSON object")
    return body


def check_keys(body, model_name, endpoint_keys):
    """Raise Refusal for another model, for an unknown key, and for one that would be ignored."""
    # A request without a model means the only one.
    model = body.get("model", model_name)
    if model != model_name:
        raise Refusal(f"the model {model!r:.100} does not exist; this server has {model_name!r}",
                      "model", 404, "model_not_found")
    # What this server does not have is refused, unless its value asks for nothing.
    for key, value in body.items():
        if key in NEUTRAL and value not in (None, NEUTRAL[key]):
            raise Refusal(f"{key}: not supported by this server; leave it out", key)
        if key not in KEYS | endpoint_keys | NEUTRAL.keys():
            raise Refusal(f"{key:.100}: unknown key; leave it out", key[:100])


def number(body, key, default, lowest, highest, kind=int):
    """Return the number at a key, or `default` where it is missing or null."""
    value = body.get(key)
    if value is None:
        return default
    kinds = (int,) if kind is int else (int, float)
    # In Python true and false are numbers too. NaN is not between any two.
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    if not is_number or not lowest <= value <= highest:
        what = "a whole number" if kind is int else "a number"
        raise Refusal(f"{key}={value!r:.100}: must be {what} from {lowest} to {highest}", key)
    return kind(value)


def switch(body, key):
    """Return the boolean at a key, false where it is missing or null."""
    value = body.get(key)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise Refusal(f"{key}={value!r:.100}: must be true or false", key)
    return value


def read_stop(stop):
    """Return the list of texts before which an answer ends."""
    # Make it a list.
    texts = stop
    if stop is None:
        texts = []
    elif isinstance(stop, str):
        texts = [stop]
    # Check it.
    are_texts = isinstance(texts, list) and all(isinstance(text, str) and text for text in texts)
    if not are_texts or len(texts) > 4 or max(map(len, texts), default=0) > 1000:
        raise Refusal("stop: must be a text of at most 1000 characters, or a list of at most 4",
                      "stop")
    return texts


def read_prompts(prompt, tokenizer):
    """Return the token ids of a prompt: a text, a list of texts, ids, or a list of lists of ids."""
    # Make it a list of prompts, each a text or a list of ids.
    prompts = prompt
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt
                                   and isinstance(prompt[0], int)):
        prompts = [prompt]
    if not isinstance(prompts, list) or not prompts:
        raise Refusal("prompt: must be a text, a list of texts, or token ids", "prompt")
    return [read_prompt(each, tokenizer) for each in prompts]


def read_prompt(prompt, tokenizer):
    """Return the ids of one prompt. An empty one becomes the token with which documents begin."""
    # A text is encoded, ids are checked.
    if isinstance(prompt, str):
        try:
            ids = tokenizer.encode_prompt(prompt)
        except UserError as error:
            raise Refusal(f"prompt: {error}", "prompt") from error
        except UnicodeEncodeError as error:
            raise Refusal(f"prompt: not a text that UTF-8 can hold ({error})", "prompt") from error
    elif isinstance(prompt, list):
        ids = prompt
        are_ids = all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
        if not are_ids:
            raise Refusal("prompt: token ids must be whole numbers from 0 to "
                          f"{tokenizer.vocab_size - 1}", "prompt")
    else:
        raise Refusal("prompt: must be a text, a list of texts, or token ids", "prompt")

    # The model has to start from something.
    if ids:
        return ids
    if tokenizer.eot is None:
        raise Refusal("prompt: is empty, and this model has no end-of-text token", "prompt")
    return [tokenizer.eot]


def read_conversation(raw_messages, tokenizer):
    """Return the ids of messages, and of the token with which the assistant's answer begins."""
    try:
        return encode_messages(tokenizer, raw_messages, "messages")
    except UserError as error:
        raise Refusal(str(error), "messages") from error
