"""Waiting for remote services with a time limit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, ask: Callable[[], T]) -> T:
    """The result of `ask`; if it takes longer, it continues in a daemon thread.

    Raises:
        TimeoutError: it took longer than `seconds`.
    """
    given: list[T] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            given.append(ask())
        except Exception as error:  # noqa: BLE001  # raised in the waiting thread
            failed.append(error)

    thread = threading.Thread(target=run, name="lfdm-hub", daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not given:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return given[0]
