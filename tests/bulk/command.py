"""``lfdm-generate`` as a separate program, which a test can kill before it ends.

    LAST=N python -m tests.bulk.command …

It makes no clips any more, and waits, once there are N in the folder of the option ``-o``.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

from lfdm_export.bulk.maker import Maker
from lfdm_export.cli import generate_main


def wait_at_last() -> None:
    """Let makers wait for the kill."""
    real, out, last = Maker.make, Path(sys.argv[sys.argv.index("-o") + 1]), int(os.environ["LAST"])

    def make(maker: Maker, unit: Any) -> Any:
        if sum(1 for _ in out.glob("*.npz")) >= last:
            threading.Event().wait()
        return real(maker, unit)

    Maker.make = make  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    wait_at_last()
    raise SystemExit(generate_main())
