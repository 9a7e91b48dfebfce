"""SIGTERM, which Slurm and Kubernetes send before they kill: what is not on the disk yet goes there first.

One handler does it for all loggers of the process, and then what would have been done without it: it calls the
handler that was there before, or ends the process by the signal, as its parent expects. A handler that is set later
takes its place. Where the signal is ignored, or handled by C code, or no logger was made in the main thread, there
is none.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
import traceback
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")

_flushes: dict[int, Callable[[], None]] = {}  # by the logger's key
_busy: dict[int, int] = {}  # threads that must not be interrupted now, and how deep in
_late = False  # the signal came while one was busy


class _Handler:
    def __init__(self, previous: Any):
        self.previous = previous

    def __call__(self, number: int, frame: Any) -> None:
        global _late
        if _busy:  # what is being written is finished first
            _late = True
            return
        try:
            for flush in list(_flushes.values()):
                try:
                    flush()
                except Exception:  # as at an exit: it is told, and the next one has its turn
                    traceback.print_exc()
        finally:
            if callable(self.previous):
                self.previous(number, frame)
            else:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.raise_signal(signal.SIGTERM)


def watch(key: int, flush: Callable[[], None]) -> None:
    """Call `flush` when SIGTERM comes, until `unwatch(key)`."""
    _flushes[key] = flush
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        return
    current = signal.getsignal(signal.SIGTERM)
    if current == signal.SIG_DFL or (callable(current) and not isinstance(current, _Handler)):
        signal.signal(signal.SIGTERM, _Handler(current))


def unwatch(key: int) -> None:
    """Take `watch` back; with the last one goes the handler."""
    _flushes.pop(key, None)
    if not _flushes and threading.current_thread() is threading.main_thread():
        _give_back()


def _give_back() -> None:
    current = signal.getsignal(signal.SIGTERM)
    if isinstance(current, _Handler):
        signal.signal(signal.SIGTERM, current.previous)


def is_late() -> bool:
    """Whether the signal came and waits for what must not be interrupted: then that should not wait for others."""
    return _late


def _leave_to_parent() -> None:
    """A forked child has what its parent had before there was a logger."""
    global _late
    _flushes.clear()
    _late = False
    with contextlib.suppress(ValueError):  # of an interpreter that may not set handlers
        _give_back()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


def _send_again() -> None:
    """To the main thread, which handles signals and may be asleep."""
    main = threading.main_thread().ident
    if main is not None and hasattr(signal, "pthread_kill"):
        signal.pthread_kill(main, signal.SIGTERM)
    else:
        signal.raise_signal(signal.SIGTERM)


def uninterrupted(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a SIGTERM that comes during the function wait for its end."""

    @functools.wraps(function)
    def whole(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        global _late
        thread = threading.get_ident()
        _busy[thread] = _busy.get(thread, 0) + 1
        try:
            return function(*args, **kwargs)
        finally:
            _busy[thread] -= 1
            if not _busy[thread]:
                del _busy[thread]
            if _late and not _busy:
                _late = False
                _send_again()

    return whole
