"""The machine. Imported before torch, this sets how long torch's threads spin."""

import os

# A thread that waits for the next operation keeps a core busy by counting before it sleeps: to
# 300,000 as libgomp comes, which reads this when torch is imported. That is right on a quiet
# machine; where anything else runs, the threads take the cores from those that work. Two trainings
# on two cores slow each other four times or fifty; with 1,000 twice, and one alone loses 3%
# (experiments/speed.md). To wake many threads costs more, so machines with more cores than a
# laptop's keep it. A value that the user has set stays.
if os.cpu_count() <= 8:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
