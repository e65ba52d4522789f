"""``lfdm-train recipe``: makes a model from nothing, by all its parts in order."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lfdm_export.cli.console import INTERRUPTED, OK, Bars, add_common_options, complain, make_parser, run, say
from lfdm_export.errors import InputError
from lfdm_export.files.names import user_path
from lfdm_export.recipe.characters64 import RECIPES
from lfdm_export.recipe.parts import Recipe, steps_of
from lfdm_export.recipe.record import Record
from lfdm_models.memory import keep_freed_memory
from lfdm_models.training.settings import DEVICES

PROGRAM = "lfdm-train recipe"
_EXAMPLES = """\
  lfdm-train recipe --list
  lfdm-train recipe characters64 --out runs/characters64
  lfdm-train recipe characters64 --out runs/characters64 --minutes 60     again and again, until it exits with 0
  lfdm-train recipe characters64 --out runs/characters64 --list
  lfdm-train recipe characters64 --out runs/characters64 --only regions motion
"""


def recipe_main(argv: Sequence[str]) -> int:
    """Run ``lfdm-train recipe``; returns the exit status."""
    parser = make_parser(
        PROGRAM,
        "Make a model by a recipe: all trainings in order, tuned tables, a distilled DM, the files that ship, and "
        "their evaluation. Finished parts are skipped. After any interruption, the same command continues. Parts whose "
        "settings changed are made again, as are the parts that need them.",
        _EXAMPLES,
    )
    parser.add_argument("recipe", nargs="?", metavar="NAME", help=f"a recipe: {', '.join(RECIPES)}")
    parser.add_argument("-o", "--out", metavar="DIR", help="folder of all results")
    parser.add_argument("--list", action="store_true", help="list the recipes, or a recipe's parts, and make nothing")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="make only these parts")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="device of the training (default: auto)")
    parser.add_argument("--minutes", type=float, metavar="M", help="stop with a checkpoint after this time")
    add_common_options(parser)
    args = parser.parse_args(argv)
    return run(PROGRAM, args, lambda: _recipe(args), extra="train")


def _recipe(args: argparse.Namespace) -> int:
    if args.list and args.recipe is None:
        for recipe in RECIPES.values():
            total = sum(steps_of(part) for part in recipe.parts)
            say(args, f"{recipe.name}  version {recipe.version}, {len(recipe.parts)} parts, {total} training steps")
        return OK
    if args.recipe not in RECIPES:
        found = "a recipe's name is missing" if args.recipe is None else f"there is no recipe {args.recipe!r}"
        raise InputError(f"{found}; choose from {', '.join(RECIPES)}")
    recipe = RECIPES[args.recipe]
    if args.list:
        say(args, "\n".join(list_parts(recipe, None if args.out is None else Record(user_path(args.out), recipe))))
        return OK
    if args.out is None:
        raise InputError("a recipe needs a folder for its results; give it with --out")
    if (args.threads is not None and args.threads < 1) or (args.minutes is not None and not args.minutes > 0):
        raise InputError(f"found --threads {args.threads} and --minutes {args.minutes}, expected numbers above 0")
    return _make(args, recipe)


def _make(args: argparse.Namespace, recipe: Recipe) -> int:
    from lfdm_export.recipe.run import run_recipe

    keep_freed_memory()
    with Bars(quiet=args.quiet) as progress:
        outcome = run_recipe(
            recipe,
            user_path(args.out),
            only=args.only,
            threads=args.threads,
            device=args.device,
            minutes=args.minutes,
            progress=progress,
            tell=lambda sentence: say(args, sentence),
        )
    if outcome.part is None:
        return OK
    after = f" after step {outcome.step}" if outcome.step else ""
    complain(PROGRAM, f"stopped in part {outcome.part!r}{after}; the same command continues")
    return 128 + outcome.signal if outcome.signal else INTERRUPTED


def list_parts(recipe: Recipe, record: Record | None) -> list[str]:
    """A line per part: name, kind, steps, needed parts, and its state in a folder."""
    width = max(len(part.name) for part in recipe.parts)
    lines, made = [], set()
    for part in recipe.parts:
        steps = f"{steps_of(part)} steps" if steps_of(part) else ""
        needs = f"needs {', '.join(part.inputs)}" if part.inputs else ""
        state = ""
        if record is not None:
            state = "not made"
            if all(name in made for name in part.inputs):
                if record.made(part):
                    made.add(part.name)
                    state = "made"
                else:
                    state = _unfinished(record, part.name, record.key(part))
        line = f"{part.name:<{width}}  {part.kind:<10}  {steps:<11}  {state:<20}  {needs}"
        lines.append(line.rstrip())
    return lines


def _unfinished(record: Record, name: str, key: str) -> str:
    entry = record.entries.get(name)
    if entry is None:
        return "not made"
    if entry.key != key:
        return "settings changed"
    steps = max((session.last_step for session in entry.sessions), default=0)
    return f"stopped, step {steps}" if steps and not entry.done else "not made"
