"""The signals by which the operating system, or a scheduler, stops a run or asks it to save."""

import signal
import threading


class Signals:
    """Inside `with Signals() as signals:` a signal does not interrupt the program: SIGINT, SIGTERM
    and SIGUSR1 only set `pending`, which the training loop checks between two iterations. A second
    SIGINT or SIGTERM ends the process at once.

    pending: 0, or the number of the last signal; a signal to save does not replace one to stop.
    """
    # The signals after which the run ends, and the one after which it saves and goes on.
    STOP = (signal.SIGINT, signal.SIGTERM)
    SAVE = getattr(signal, "SIGUSR1", 0)  # Windows has none

    def __init__(self):
        self.pending = 0
        self.previous_handlers = {}

    def __enter__(self):
        # Python lets the main thread alone set handlers.
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (*self.STOP, self.SAVE):
            if number:
                self.previous_handlers[number] = signal.signal(number, self.set_pending)
        return self

    def __exit__(self, *exception):
        # From here on signals do what they did before.
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def set_pending(self, number, frame):
        """The handler of all these signals."""
        if number in self.STOP:
            self.pending = number
            # From now on another signal to stop has its usual effect.
            for stop in self.STOP:
                signal.signal(stop, signal.SIG_DFL)
        elif not self.pending:
            self.pending = number

    def saved(self):
        """Forget a pending signal to save, after the checkpoint is written."""
        if self.pending == self.SAVE:
            self.pending = 0
