"""The commands that the pages show have the options that the pages give them."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from lfdm_export import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "deploy" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Commands of lfdm-train with options of their own.
STAGES = ("lfae", "dm", "distill", "classifier", "schedule", "evaluate", "recipe")


def commands_of(text):
    """The words of each command in code that is fenced or indented; lines that end with a backslash go on."""
    fenced = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    indented = "\n".join(re.findall(r"^    (.*)", text, re.MULTILINE))
    for line in f"{fenced}\n{indented}".replace("\\\n", " ").splitlines():
        if line.strip().startswith("lfdm-"):
            yield shlex.split(line, comments=True)


SHOWN = [(page.name, words) for page in PAGES for words in commands_of(page.read_text())]


@cache
def help_of(program, stage):
    """What a command says of its options."""
    main = getattr(cli, f"{program.removeprefix('lfdm-')}_main")
    arguments = [*([stage] if stage else []), "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit):
        main(arguments)
    return said.getvalue()


@pytest.mark.parametrize(("page", "words"), SHOWN, ids=[f"{page}: {' '.join(words)}" for page, words in SHOWN])
def test_a_shown_command_has_its_options(page, words):
    program, *rest = words
    stage = next((word for word in rest if word in STAGES), "") if program == "lfdm-train" else ""
    known = set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", help_of(program, stage)))
    given = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
    assert given <= known


def test_commands_are_found_where_pages_show_them():
    text = "```bash\nlfdm-serve mug \\\n  --queue 3  # waits\nls\n```\n\n    lfdm-info 'my b' --json\n\nlfdm-none\n"
    assert list(commands_of(text)) == [["lfdm-serve", "mug", "--queue", "3"], ["lfdm-info", "my b", "--json"]]
    assert len(SHOWN) > 30


def test_the_help_of_a_stage_is_its_own():
    assert "--signal-std" in help_of("lfdm-train", "dm")
    assert "--signal-std" not in help_of("lfdm-train", "lfae")
