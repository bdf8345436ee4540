"""The signals by which the operating system, or a scheduler, stops a run or asks it to save."""

import os
import signal
import sys
import threading
from contextlib import suppress

from runtime.processes import is_main_process


class Signals:
    """Inside `with Signals() as signals:` a signal does not interrupt the program: SIGINT, SIGTERM,
    SIGHUP and SIGUSR1 only set `pending`, which the training loop checks between two iterations.
    Once the run is to stop, another SIGINT or SIGTERM ends the process at once. Another SIGHUP does
    not: a terminal that is closed may send several. Under nohup SIGHUP stays ignored.

    pending: 0, or the number of the last signal; a signal to save does not replace one to stop.
    """
    # The signals after which the run ends, and the one after which it saves and goes on. Windows
    # has not all of them.
    AT_ONCE = (signal.SIGINT, signal.SIGTERM)  # where they come again
    HANGUP = getattr(signal, "SIGHUP", 0)
    STOP = (*AT_ONCE, HANGUP)
    SAVE = getattr(signal, "SIGUSR1", 0)

    def __init__(self):
        self.pending = 0
        self.previous_handlers = {}

    def __enter__(self):
        # Python lets the main thread alone set handlers.
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (*self.STOP, self.SAVE):
            under_nohup = number == self.HANGUP and signal.getsignal(number) == signal.SIG_IGN
            if number and not under_nohup:
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
            # From now on another of these signals has its usual effect.
            for again in self.AT_ONCE:
                signal.signal(again, signal.SIG_DFL)
            announce(number)
        elif not self.pending:
            self.pending = number

    def saved(self):
        """Forget a pending signal to save, after the checkpoint is written."""
        if self.pending == self.SAVE:
            self.pending = 0


def announce(number):
    """Say what a signal to stop does: an evaluation may take minutes to its end."""
    if not is_main_process() or sys.stderr is None:
        return
    line = (f"{signal.Signals(number).name}: finishing the iteration or the evaluation, then "
            "saving; Ctrl-C once more ends at once\n")
    # Not by print, which the signal may have interrupted; and the terminal may be gone.
    with suppress(OSError):
        os.write(2, line.encode())
