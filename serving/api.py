"""OpenAI's completions and chat/completions over HTTP, and what belongs to a server.

    GET  /v1/models               the one model
    POST /v1/completions          a prompt, or several, to text
    POST /v1/chat/completions     a conversation to the assistant's answer
    GET  /health, /metrics        is it well; counts, in Prometheus' text format

A streamed answer is a series of server-sent events: `data:` and a chunk in JSON, at last
`data: [DONE]`.
"""

import asyncio
import json
import secrets
import time
from collections import Counter
from contextlib import suppress

import torch
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from runtime.seeds import seed_for
from serving.engine import Answer, Busy, End
from serving.replies import CHAT, COMPLETION, Part, new_header, usage
from serving.requests import (
    Limits,
    Refusal,
    parse_json,
    read_chat,
    read_completion,
)
from serving.token_stream import TokenStream
from text.chat import knows_conversations

MAX_BODY = 2**20  # bytes
BODY_SECONDS = 10  # in which a body has to arrive
LEFT = 499  # the status, which nobody reads, where a client has left (nginx's number)


class Api:
    """The endpoints, around one model and its engine."""

    def __init__(self, name, tokenizer, engine, max_new_tokens, max_seconds):
        """name: what clients call the model. max_new_tokens: of one answer. max_seconds: how long a
        request may take."""
        self.name, self.tokenizer, self.engine = name, tokenizer, engine
        # A request may have as many answers as may wait.
        self.limits = Limits(max_new_tokens, engine.max_waiting, engine.model.config.block_size)
        self.max_seconds = max_seconds
        self.created = int(time.time())
        self.statuses = Counter()  # of the requests for text so far

    async def completions(self, request):
        return await self.answer(request, read_completion, COMPLETION)

    async def chat_completions(self, request):
        return await self.answer(request, read_chat, CHAT)

    async def answer(self, request, read, wording):
        """Return the response to a request for text. read: makes a GenerationRequest of its
        body."""
        # What goes wrong has a status of its own.
        try:
            response = await self.try_to_answer(request, read, wording)
        except Refusal as refusal:
            response = refusal.response()
        except ClientDisconnect:
            response = Response(status_code=LEFT)
        self.statuses[response.status_code] += 1
        return response

    async def try_to_answer(self, request, read, wording):
        # Read the request; in a thread, because to tokenize a long text takes a while.
        body = parse_json(await read_body(request))
        wanted = await run_in_threadpool(read, body, self.name, self.tokenizer, self.limits)
        answers = Answers(wanted, self)

        # A stream waits for its first part, so that what fails until then has a status.
        if wanted.stream:
            first = await while_connected(request, anext(answers.parts))
            return StreamingResponse(answers.stream(first, wording), media_type="text/event-stream",
                                     headers={"Cache-Control": "no-store"})
        return JSONResponse(await while_connected(request, answers.collect(wording)))

    async def models(self, request):
        model = {"id": self.name, "object": "model", "created": self.created,
                 "owned_by": "flatgpt", "has_chat": knows_conversations(self.tokenizer)}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self, request):
        if self.engine.thread.is_alive():
            return JSONResponse({"status": "ok", "model": self.name})
        return JSONResponse({"status": "the engine has stopped"}, 503)

    async def metrics(self, request):
        """Counts in Prometheus' text format, prometheus.io/docs/instrumenting/exposition_formats"""
        # What only grows, since the start of the server.
        engine = self.engine
        lines = ["# TYPE flatgpt_requests_total counter"]
        for status, count in sorted(self.statuses.items()):
            lines.append(f'flatgpt_requests_total{{status="{status}"}} {count}')
        for name in ("answers", "prompt_tokens", "generated_tokens", "steps",
                     "first_token_seconds"):
            lines.append(f"# TYPE flatgpt_{name}_total counter")
            lines.append(f"flatgpt_{name}_total {engine.counts[name]}")
        # What is so now.
        for name, value in (("slots", engine.slots), ("slots_in_use", len(engine.active)),
                            ("waiting", len(engine.waiting))):
            lines.append(f"# TYPE flatgpt_{name} gauge")
            lines.append(f"flatgpt_{name} {value}")
        return PlainTextResponse("\n".join(lines) + "\n")


class Answers:
    """The answers to one GenerationRequest, as the engine draws them."""

    def __init__(self, wanted, api):
        """Raises Refusal where the engine is too busy."""
        self.wanted, self.model_name, self.tokenizer = wanted, api.name, api.tokenizer
        self.queue = asyncio.Queue()  # of (the index of an answer, what the engine delivers for it)
        self.new_tokens = 0

        # The i-th answer to a prompt is sample i of sample.py.
        seed = wanted.seed
        if seed is None:
            seed = secrets.randbits(62)
        self.answers = []
        deadline = time.monotonic() + api.max_seconds
        for prompt_ids in wanted.prompts:
            for i in range(wanted.n):
                generator = torch.Generator().manual_seed(seed_for(seed, "sample", i))
                self.answers.append(Answer(
                    prompt_ids, wanted.sampling, generator, wanted.max_new_tokens,
                    end_ids(self.tokenizer), wanted.runners_up, deadline,
                    self.deliver_to(len(self.answers))))
        # From here on the engine fills the queue.
        try:
            api.engine.submit(self.answers)
        except Busy:
            raise Refusal("the server is busy: too many answers wait for their turn; try again "
                          "later", status=503, code="overloaded") from None
        self.parts = self.iterate()

    def deliver_to(self, index):
        """Return a function that puts an event into the queue, from the engine's thread."""
        loop = asyncio.get_running_loop()

        def deliver(event):
            with suppress(RuntimeError):  # the server is ending: its loop is closed
                loop.call_soon_threadsafe(self.queue.put_nowait, (index, event))

        return deliver

    async def iterate(self):
        """Yield the Parts of all answers as they come. Raises Refusal where the engine fails. Where
        this ends early, the client has left: the engine then draws no more."""
        streams = [TokenStream(self.tokenizer, self.wanted.stop) for _ in self.answers]
        offsets = [0] * len(streams)
        running = set(range(len(streams)))
        try:
            while running:
                # What may follow a stop string is of no interest.
                index, event = await self.queue.get()
                if index not in running:
                    continue

                # A token, or the end: of the answer, or at a stop string.
                stream, reason = streams[index], None
                if isinstance(event, End):
                    if event.reason == "error":
                        raise Refusal(event.error, status=503)
                    tokens, reason = stream.end(), event.reason
                else:
                    tokens = stream.add(event)
                    self.new_tokens += 1
                    if stream.has_stopped:
                        reason = "stop"
                if reason:
                    running.remove(index)
                    self.answers[index].cancel()

                # The part that can be sent.
                if tokens or reason:
                    part = Part(index, tokens, offsets[index], reason, stream.is_new)
                    stream.is_new = False
                    offsets[index] += len(part.text)
                    yield part
        finally:
            for answer in self.answers:
                answer.cancel()

    def usage(self):
        return usage(sum(map(len, self.wanted.prompts)), self.new_tokens)

    async def collect(self, wording):
        """Return the whole answers as one object of JSON."""
        # Wait for all parts, and sort them by the answer that they belong to.
        parts = [[] for _ in self.answers]
        async for part in self.parts:
            parts[part.index].append(part)
        # Join them.
        choices = []
        for index, pieces in enumerate(parts):
            tokens = []
            for piece in pieces:
                tokens += piece.tokens
            whole = Part(index, tokens, 0, pieces[-1].finish_reason, is_first=True)
            choices.append(wording.choice(whole, self.wanted.runners_up is not None, False))
        header = new_header(wording, wording.whole, self.model_name)
        return {**header, "choices": choices, "usage": self.usage()}

    async def stream(self, first, wording):
        """Yield the events of a stream. first: the first part, which has been waited for."""
        header = new_header(wording, wording.chunk, self.model_name)
        has_probabilities = self.wanted.runners_up is not None
        try:
            # One event for each part.
            choice = wording.choice(first, has_probabilities, True)
            yield server_sent({**header, "choices": [choice]})
            async for part in self.parts:
                choice = wording.choice(part, has_probabilities, True)
                yield server_sent({**header, "choices": [choice]})
            # The end.
            if self.wanted.include_usage:
                yield server_sent({**header, "choices": [], "usage": self.usage()})
            yield "data: [DONE]\n\n"
        except Refusal as refusal:  # too late for a status
            yield server_sent(refusal.body)


def end_ids(tokenizer):
    """Return the ids at which an answer ends: end-of-text, and the end of a message."""
    ids = {tokenizer.eot, tokenizer.special.get("<|end|>")}
    return ids - {None}


def server_sent(body):
    return f"data: {json.dumps(body)}\n\n"


async def read_body(request):
    """Return the bytes of a request's body. Raises Refusal for one that is too large or slow."""
    body = bytearray()

    async def read():
        async for chunk in request.stream():
            body.extend(chunk)
            if len(body) > MAX_BODY:
                raise Refusal(f"the body is larger than {MAX_BODY:,} bytes", status=413)

    try:
        await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise Refusal(f"the body has not arrived in {BODY_SECONDS} seconds", status=408) from None
    return bytes(body)


async def while_connected(request, work):
    """Return the result of `work`. Raises ClientDisconnect, and ends the work, where the client
    leaves before."""
    async def leave():
        while (await request.receive())["type"] != "http.disconnect":
            pass

    # Wait for whichever comes first.
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(leave())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
