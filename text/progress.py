"""How far a preparation is, on stderr."""

import sys
import time


def progress(text, what, removed=None, writers=(), max_tokens=1 << 62):
    """Return a function that shows on stderr how far it is: each second on a terminal, else each
    minute, a line."""
    every = 1 if sys.stderr.isatty() else 60

    def tokens():
        return sum(writers[split].totals["tokens"] for split in writers)

    def share():
        return max(text.share_done(), tokens() / max_tokens)

    began = last = time.monotonic()
    first_share, first_tokens = share(), tokens()

    def show():
        nonlocal last
        now = time.monotonic()
        if now - last < every:
            return
        last, done, seconds = now, share(), now - began
        line = f"{what}: {done:.1%}"
        if writers:
            line += (f", {removed.read:,} documents, {tokens():,} tokens, "
                     f"{(tokens() - first_tokens) / seconds:,.0f} tokens/s")
        if done > first_share:
            left = round(seconds * (1 - done) / (done - first_share))
            line += f", {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
        print(f"\r{line}   " if every == 1 else line, end="\r" if every == 1 else "\n",
              file=sys.stderr, flush=True)

    return show
