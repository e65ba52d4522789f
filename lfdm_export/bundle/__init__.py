"""The exported folder: manifest, reader, writer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lfdm_export.bundle.reader import Bundle

__all__ = ["Bundle"]


def __getattr__(name: str) -> object:
    """`Bundle`, from when this package was a module; imported on first use (PEP 562)."""
    if name != "Bundle":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lfdm_export.bundle.reader import Bundle

    return Bundle
