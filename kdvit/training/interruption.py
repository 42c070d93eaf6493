"""SIGTERM and Ctrl-C: asked once, a run ends at the end of its step; asked twice, at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop, saved its state and stopped.

    Args:
        number: of the signal; a command exits with 128 + number.
    """

    def __init__(self, number: int, sentence: str) -> None:
        super().__init__(sentence)
        self.number = number


class Interruption:
    """While it is entered, the first SIGTERM or SIGINT is noted in ``number``; the next one acts as it did before."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interruption:
        self.number = 0
        if threading.current_thread() is threading.main_thread():  # Python takes handlers from no other
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            # None: a handler that was not set from Python, which cannot be set again from here.
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def obey_parent_alone(worker: int) -> None:
    """For `DataLoader(worker_init_fn=...)`: SIGTERM and SIGINT from others do not end a loader process.

    Schedulers, service managers and terminals send them to all processes of a job. The trainer still needs images then:
    to end its step and its accumulation, in step with the other processes.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, Interruption.SIGNALS)

    def wait() -> None:
        while signal.sigwaitinfo(Interruption.SIGNALS).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
