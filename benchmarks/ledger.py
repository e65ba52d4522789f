"""What concurrent clients of a server under test got."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Ledger:
    """Results of all clients' requests.

    Attributes:
        ends: number of requests by kind and end.
        wrong: what must not happen.
    """

    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def end(self, what: str) -> None:
        """Count one end."""
        with self._lock:
            self.ends[what] += 1

    def violation(self, what: str) -> None:
        """Record and print what must not happen."""
        with self._lock:
            self.wrong.append(what)
        print("VIOLATION", what, flush=True)
