"""What the operating system asks of a run."""

import signal
import threading


class Signals:
    """While entered, SIGINT, SIGTERM and SIGUSR1 are a wish that the training loop looks at between
    two iterations; a second SIGINT or SIGTERM ends the process at once.

    wish: 0, or the number of the signal that came last.
    """
    STOP = (signal.SIGINT, signal.SIGTERM)
    SAVE = getattr(signal, "SIGUSR1", 0)  # not on Windows

    def __init__(self):
        self.wish, self.before = 0, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # only it may
            for number in filter(None, (*self.STOP, self.SAVE)):
                self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        if number in self.STOP:
            self.wish = number
            for other in self.STOP:
                signal.signal(other, signal.SIG_DFL)
        self.wish = self.wish or number

    def saved(self):
        """Forget a wish to save, once it is fulfilled."""
        self.wish = 0 if self.wish == self.SAVE else self.wish
