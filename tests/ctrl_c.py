"""Ctrl-C in the midst of a run."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest


@contextlib.contextmanager
def interrupted_after(wait: Callable[[], object]) -> Iterator[None]:
    """The body gets Ctrl-C once `wait`, in a thread, has returned, and has to pass it on."""

    def interrupt() -> None:
        wait()
        os.kill(os.getpid(), signal.SIGINT)

    # A shell's background job, as tests run in may be, is born with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
