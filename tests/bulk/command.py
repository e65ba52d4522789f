"""``lfdm-generate`` as a separate program, which a test can kill."""

from __future__ import annotations

from lfdm_export.cli import generate_main

if __name__ == "__main__":
    raise SystemExit(generate_main())
