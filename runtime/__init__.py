"""The machine. Imported before torch, this sets how long torch's threads spin."""

import os

# A thread that waits for the next operation keeps its core busy: it counts, and then it sleeps.
# libgomp lets it count to 300,000, and reads this setting when torch is imported. On a quiet
# machine that is right; on a busy one the waiting threads take the cores from those that work. Of
# two trainings on two cores each takes 4 to 50 times as long as alone; with 1,000 it is twice, and
# one training alone takes 3% longer (experiments/speed.md). This was measured on two cores, so
# large machines keep libgomp's value, and so does a user who has set one.
if os.cpu_count() <= 8:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
