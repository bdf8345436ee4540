"""The thread that runs the model for all clients of the server: continuous batching.

    with Engine(model, runtime, slots=8, max_waiting=64) as engine:
        answer = Answer(prompt_ids, ..., deliver=queue.put)
        engine.submit([answer])     # its events go to `deliver`, from the engine's thread
        answer.cancel()             # its client has left

An answer waits until one of the batch's rows, the slots, is free, and has it to its end. Answers
enter and leave between two steps, so none waits for another to end (Yu et al. 2022, Orca, section
3). inference/generate.py has the Batch.

Sizes: B rows, V vocabulary.
"""

import threading
import time
from collections import Counter, deque
from typing import NamedTuple

from inference.generate import Batch


class Drawn(NamedTuple):
    """A token that was drawn."""
    id: int
    log_probability: float | None  # of the model's own distribution, where it was asked for
    runners_up: list  # the most probable ids, each with its log-probability


class End(NamedTuple):
    """The end of an answer."""
    reason: str  # stop: at a token that ends it; length: at a limit; error
    error: str = ""


class Busy(Exception):
    """Too many answers wait for a slot."""


class Answer:
    """What is drawn after a prompt."""

    def __init__(self, prompt_ids, sampling, generator, max_new_tokens, end_ids, runners_up,
                 deadline, deliver):
        """generator: its random generator. end_ids: it ends at one of these. runners_up: how many
        its tokens come with; None: tokens come without probabilities. deadline: when it ends at the
        latest, of time.monotonic(). deliver: a function that takes each Drawn, and last an End."""
        self.prompt_ids, self.sampling, self.generator = prompt_ids, sampling, generator
        self.tokens_left, self.end_ids = max_new_tokens, end_ids
        self.runners_up, self.deadline, self.deliver = runners_up, deadline, deliver
        self.submitted = time.monotonic()
        self.is_new = True  # nothing was drawn
        self.is_cancelled = False

    def cancel(self):
        """Let the engine draw no more of it."""
        self.is_cancelled = True


class Engine:
    """Draws the tokens of all answers, in a thread of its own while entered."""

    def __init__(self, model, runtime, slots, max_waiting):
        self.model, self.slots, self.max_waiting = model, slots, max_waiting
        self.batch = Batch(model, slots, runtime)
        self.waiting, self.active = deque(), {}  # {row of the batch: Answer}
        self.counts = Counter()  # since the start: tokens, steps, seconds
        self.changed = threading.Condition()  # of `waiting` and `is_closed`
        self.is_closed = False
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exception):
        with self.changed:
            self.is_closed = True
            self.changed.notify()
        # A step takes less, but for a long prompt of a large model.
        self.thread.join(timeout=5)

    def submit(self, answers):
        """Let answers wait for slots. Raises Busy where too many wait already."""
        with self.changed:
            if len(self.waiting) + len(answers) > self.max_waiting:
                raise Busy
            self.waiting += answers
            self.changed.notify()

    # ---------------------------------------------------------------------- in the engine's thread

    def run(self):
        """Draw tokens until the engine is closed."""
        while self.wait_for_work():
            try:
                self.drop_answers()
                self.admit()
                if self.active:
                    self.step()
            except Exception as error:
                # Out of memory, say: what is being drawn ends, what waits may be luckier.
                for row, answer in list(self.active.items()):
                    self.leave(row)
                    answer.deliver(End("error", f"{type(error).__name__}: {error}"))

    def wait_for_work(self):
        """Wait until there is an answer to draw; return False where the engine is closed."""
        with self.changed:
            while not (self.waiting or self.active or self.is_closed):
                self.changed.wait()
            return not self.is_closed

    def drop_answers(self):
        """Drop the answers whose clients have left, and those that have waited for too long."""
        # Those that are being drawn.
        for row, answer in list(self.active.items()):
            if answer.is_cancelled:
                self.leave(row)
        # Those that wait.
        with self.changed:
            kept = deque()
            for answer in self.waiting:
                if time.monotonic() > answer.deadline:
                    answer.deliver(End("error", "no slot became free in time; try again later"))
                elif not answer.is_cancelled:
                    kept.append(answer)
            self.waiting = kept

    def admit(self):
        """Give a free slot to the answer that has waited longest. One before each step: the others
        wait for a single prompt to be read, not for several."""
        with self.changed:
            if self.waiting and len(self.active) < self.slots:
                answer = self.waiting.popleft()
                row = self.batch.add(answer.prompt_ids, answer.sampling, answer.generator)
                self.active[row] = answer
                self.counts["prompt_tokens"] += len(answer.prompt_ids)

    def step(self):
        """Draw the next token of each answer, and deliver it."""
        # One token of each.
        new_ids = self.batch.step()
        self.counts["steps"] += 1
        self.counts["generated_tokens"] += len(self.active)
        # The model's own probabilities, where somebody wants them.
        log_probabilities = None
        if any(answer.runners_up is not None for answer in self.active.values()):
            vocab_size = next(iter(self.active.values())).sampling.vocab_size
            logits = self.batch.logits[:, :vocab_size]  # (B, V)
            log_probabilities = logits.float().log_softmax(-1)  # (B, V)

        for row, answer in list(self.active.items()):
            # The time to the first token.
            if answer.is_new:
                answer.is_new = False
                self.counts["answers"] += 1
                self.counts["first_token_seconds"] += time.monotonic() - answer.submitted

            # A token that ends the answer is no part of it.
            new_id = new_ids[row]
            if new_id in answer.end_ids:
                self.leave(row)
                answer.deliver(End("stop"))
                continue

            # Deliver others. At a limit the answer ends after it.
            drawn = Drawn(new_id, None, [])
            if answer.runners_up is not None:
                drawn = with_probabilities(new_id, log_probabilities[row], answer.runners_up)
            answer.deliver(drawn)
            answer.tokens_left -= 1
            if answer.tokens_left == 0 or time.monotonic() > answer.deadline:
                self.leave(row)
                answer.deliver(End("length"))

    def leave(self, row):
        """Free a slot."""
        self.batch.remove(row)
        del self.active[row]


def with_probabilities(new_id, log_probabilities, count):
    """Return the Drawn of an id with its log-probability and the `count` most probable ids.
    log_probabilities: (V,), of all ids."""
    # A small vocabulary may have fewer.
    best = log_probabilities.topk(min(count, len(log_probabilities)))
    runners_up = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Drawn(new_id, float(log_probabilities[new_id]), runners_up)
