"""docs/troubleshooting.md quotes sentences of the source: each must still stand there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
QUOTED = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)
# What an expression in a sentence gives; no text of the page contains it.
HOLE = "\0"
# Expressions, with a few words between.
GAP = f"(?:[^{HOLE}]{{0,12}}{HOLE})+[^{HOLE}]{{0,12}}"
# Letters that a quotation needs, so that it cannot fit anything.
LEAST = 12


def texts_of(source: str) -> set[str]:
    """All strings of a module, with a hole for each expression within."""
    return {text for node in ast.walk(ast.parse(source)) if (text := _text(node)) is not None}


def _text(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join((_text(part) or "") if isinstance(part, ast.Constant) else HOLE for part in node.values)
    return None


def stands_in(quoted: str, texts: set[str]) -> bool:
    """Whether a text has the quotation: its words in order, with expressions where it has `…`."""
    parts = [part.strip() for part in quoted.split("…")]
    words = [part for part in parts if part.strip(" ;,:.()")]
    pattern = re.compile(GAP.join(re.escape(part) for part in parts if part).strip(), re.DOTALL)
    return any(pattern.search(text) for text in texts if all(part in text for part in words))


@pytest.fixture(scope="module")
def texts() -> set[str]:
    modules = [path for folder in ("lfdm_export", "models/lfdm_models") for path in (ROOT / folder).rglob("*.py")]
    return {text for path in modules for text in texts_of(path.read_text())}


@pytest.mark.parametrize("quoted", QUOTED.findall(PAGE.read_text()))
def test_a_quoted_sentence_stands_in_the_source(quoted, texts):
    assert len(re.sub(r"[^a-z]", "", quoted.lower())) >= LEAST, "too short to be found by"
    assert stands_in(quoted, texts), "the source says it otherwise, or not at all"


def test_a_sentence_that_the_source_does_not_have_is_found_out():
    texts = texts_of("raise InputError(f'steps is {steps}, expected {least} to {most}; use fewer')")
    assert stands_in("steps is …, expected … to …; use fewer", texts)
    assert not stands_in("steps is …, expected … to …; use more", texts)
    assert not stands_in("expected … to …, steps is …", texts)


def test_every_row_of_the_page_quotes_a_sentence():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("|") and not line.startswith("|---")]
    headings = [line for line in rows if line.startswith("| it says ")]
    assert len(QUOTED.findall(PAGE.read_text())) == len(rows) - len(headings)
