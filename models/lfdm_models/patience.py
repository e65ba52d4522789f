"""Waiting for strangers no longer than is sensible."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, ask: Callable[[], T]) -> T:
    """What `ask` gives; it is left behind, in a thread that ends with the process, where it takes longer.

    Raises:
        TimeoutError: it took longer.
    """
    given: list[T] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            given.append(ask())
        except Exception as error:  # noqa: BLE001  # raised where it is waited for
            failed.append(error)

    thread = threading.Thread(target=run, name="lfdm-hub", daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not given:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return given[0]
