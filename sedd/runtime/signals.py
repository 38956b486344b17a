"""Ctrl-C and SIGTERM as an event that a loop can look at between two steps."""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set instead of ending the process; a second signal ends it."""
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread only
        yield stopping
        return

    def stop(number, _):
        stopping.set()
        signal.signal(number, previous[number])

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
