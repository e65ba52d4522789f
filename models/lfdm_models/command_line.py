"""The parser of every command: a usage error is one line, with a suggestion for a misspelled word."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

#: A path may have 4096 characters, but more than these are not read in a message.
_LONG_WORD, _SHOWN = re.compile(r"\S{600,}"), 250


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` whose errors are one line on stderr; exit status 2.

    Options are never abbreviated. An unknown option is reported before any other error, because it explains missing
    ones.
    """

    def __init__(self, **settings: Any) -> None:
        """Take the arguments of `argparse.ArgumentParser`."""
        super().__init__(**{"allow_abbrev": False, **settings})

    def parse_known_args(  # type: ignore[override]  # the base class has overloads by the namespace's type
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse like the base class, but first reject unknown options."""
        if args is not None and self._subparsers is None:  # a subcommand has its own parser
            self._refuse_unknown(args)
        return super().parse_known_args(args, namespace)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse like the base class."""
        return super().parse_args(sys.argv[1:] if args is None else args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print one line, and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {cut_words(' '.join(message.split()))}; see {self.prog} --help\n")

    def _refuse_unknown(self, words: Sequence[str]) -> None:
        for word in words:
            if word == "--":
                return
            name = word.partition("=")[0]
            if name.startswith("--") and " " not in name and name not in self._option_string_actions:
                self.error(f"unknown option {name}{did_you_mean(name, self._option_string_actions)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = ", ".join(map(str, action.choices))
            hint = did_you_mean(str(value), map(str, action.choices))
            raise argparse.ArgumentError(action, f"invalid choice {value!r}{hint}, expected one of {known}")


def cut_words(text: str) -> str:
    """Text whose very long words, such as a value of thousands of digits, are cut in the middle."""
    return _LONG_WORD.sub(lambda found: f"{found[0][:_SHOWN]}…{found[0][-_SHOWN:]}", text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The most similar known word, in parentheses; "" if none is similar."""
    folded = {one.casefold(): one for one in known}
    near = difflib.get_close_matches(word.casefold(), folded, n=1)
    return f" (did you mean {folded[near[0]]}?)" if near else ""
