"""The table of targets, from their declarations: for ``lfdm-export --help`` and for documents.

``python -m lfdm_export.engines.target_table FILE ...`` updates it between the two marks in each document.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from lfdm_export.engines.target_spec import FIRST_CAPABILITY
from lfdm_export.engines.targets import spec_of, target_names
from lfdm_export.errors import InputError
from lfdm_export.files.atomic import write_file

#: The marks before and after the table in a document.
BEGIN, END = "<!-- targets: made by `python -m lfdm_export.engines.target_table` -->", "<!-- end of targets -->"
_HEADS = ("target", "extra", "takes", "on a CPU", "on a GPU", "")
_WIDTH = 100


def target_rows() -> list[tuple[str, str, str, str, str, str]]:
    """One row per target: name, extra, what it runs, precisions on a CPU and on a GPU, note."""
    return [
        (spec.name, spec.extra, spec.takes, ", ".join(spec.cpu_precisions), _on_gpu(spec.gpu_precisions), spec.note)
        for spec in map(spec_of, target_names())
    ]


def as_markdown() -> str:
    """The table for a document."""
    rows = [(f"`{name}`", f"`{extra}`", *rest) for name, extra, *rest in target_rows()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (_HEADS, ["---"] * len(_HEADS), *rows)) + "\n"


def as_text() -> str:
    """The table for a terminal."""
    return "\n".join(line for row in target_rows() for line in _lines(*row)) + "\n"


def with_table(document: str, name: str) -> str:
    """Return a document with the table between its marks.

    Raises:
        InputError: a mark is missing; `name` identifies the document in the message.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"{name} has no place for the table of targets; put it between {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{as_markdown()}\n{END}{after}"


def _on_gpu(precisions: Iterable[str]) -> str:
    """Precisions by the first architecture that has them: "fp32, fp16 from SM75; bf16 from SM80"."""
    by_first: dict[tuple[int, int], list[str]] = {}
    for precision in precisions:
        by_first.setdefault(FIRST_CAPABILITY[precision], []).append(precision)
    return "; ".join(f"{', '.join(names)} from SM{major}{minor}" for (major, minor), names in sorted(by_first.items()))


def _lines(name: str, extra: str, takes: str, cpu: str, gpu: str, note: str) -> list[str]:
    places = [f"{place}: {found}" for place, found in (("CPU", cpu), ("GPU", gpu)) if found]
    text = "; ".join([f"takes {takes}", *places, note.replace("`", ""), f"extra {extra}"])
    return textwrap.wrap(f"{name:<14}{text}", _WIDTH, initial_indent="  ", subsequent_indent=" " * 16)


def main(paths: Sequence[str]) -> None:
    """Update the table in documents.

    Raises:
        InputError: a document has no marks.
    """
    for path in map(Path, paths):
        write_file(path, with_table(path.read_text(encoding="utf-8"), str(path)).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
