"""Which clips one `lfdm-generate` makes: labels times seeds, and the file of each."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lfdm_export.errors import InputError
from lfdm_export.files.names import user_path
from lfdm_export.files.places import refuse_inputs
from lfdm_export.sampling.noise import draw_seed
from lfdm_export.sampling.options import WHOLE, SamplingOptions

#: Clips that one command makes at most; more are rather a slip than a wish.
MAX_CLIPS = 1000
# Characters of a label in a file name; a file system takes 255 bytes in all.
_LONGEST_WORD = 40


@dataclass(frozen=True)
class Wish:
    """One clip.

    Attributes:
        label: None where a text, an embedding or a clip says how it moves.
        seed: None where nothing is sampled.
        out: where it goes.
    """

    label: str | None
    seed: int | None
    out: str

    def __str__(self) -> str:
        label = None if self.label is None else repr(self.label)
        parts = [f"{name} {value}" for name, value in (("label", label), ("seed", self.seed)) if value is not None]
        return ", ".join(parts) or self.out


def seeds_of(word: str) -> range:
    """A seed, or a range such as 1-8, both ends of which count.

    Raises:
        argparse.ArgumentTypeError: it is neither, or too long.
    """
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
    if found is None:
        raise argparse.ArgumentTypeError(f"{word!r} is neither a seed nor a range such as 1-8")
    first, last = int(found[1]), int(found[2] or found[1])
    if not 0 < last + 1 - first <= MAX_CLIPS:
        raise argparse.ArgumentTypeError(f"the range {word} has {last + 1 - first} seeds, expected 1 to {MAX_CLIPS}")
    return range(first, last + 1)


def inputs_of(args: argparse.Namespace) -> dict[str, str | None]:
    """The files and folders that the command reads, which no clip may replace."""
    named = {f"--{name}": getattr(args, name) for name in ("image", "drive", "motion", "embedding")}
    return {**named, "BUNDLE": args.bundle}


def wants_many(args: argparse.Namespace) -> bool:
    """Whether the command names several clips, whose files then say label and seed."""
    return bool(args.labels_all or len(args.label or ()) > 1 or sum(map(len, args.seeds or ())) > 1)


def example_name(args: argparse.Namespace) -> str:
    """A file that the command might write, to rehearse with."""
    return _name(args.out, args.format, None, 0) if wants_many(args) and not _is_device(args) else str(args.out)


def _is_device(args: argparse.Namespace) -> bool:
    """Whether the output is a device or a pipe, beside which there is no other file."""
    out = user_path(args.out)
    return out.exists() and not (out.is_file() or out.is_dir())


def wishes(args: argparse.Namespace, known: Sequence[str]) -> tuple[Wish, ...]:
    """The clips that the command names, all labels of a seed after each other.

    Args:
        args: of the command.
        known: labels of the bundle or of the served model.

    Raises:
        InputError: there are too many, none, one of them twice, a device would have to take them all, or one would
            replace an input.
    """
    seeds = _seeds(args)
    if not wants_many(args):
        return (Wish(args.label[0] if args.label else None, seeds[0], args.out),)
    canonical = {label.strip().casefold(): label for label in known}
    labels: list[str | None] = [canonical.get(label.strip().casefold(), label) for label in args.label or ()]
    labels = labels or (list(known) if args.labels_all else [None])
    if not labels:
        raise InputError("there are no labels for --labels-all: this model was exported without any; give --embedding")
    if len(labels) * len(seeds) > MAX_CLIPS:
        raise InputError(
            f"found {len(labels)} labels times {len(seeds)} seeds, {len(labels) * len(seeds)} clips, expected at most "
            f"{MAX_CLIPS}; run the command several times"
        )
    named: tuple[tuple[str, Sequence[object]], ...] = (("label", labels), ("seed", seeds))
    for noun, values in named:
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise InputError(f"the {noun} {twice[0]!r} is given twice; leave one out")
    if _is_device(args):
        raise InputError(f"{args.out} takes one clip, found {len(labels) * len(seeds)}; give a file name or a folder")
    made: dict[str, Wish] = {}
    for seed in seeds:
        for label in labels:
            name = _name(args.out, args.format, label, seed)
            number = 2
            while name.casefold() in made:  # two labels may differ in what no file name shows
                name = _name(args.out, args.format, f"{_word(label or '')}-{number}", seed)
                number += 1
            refuse_inputs(name, inputs_of(args))
            made[name.casefold()] = Wish(label, seed, name)
    return tuple(made.values())


def _seeds(args: argparse.Namespace) -> list[int | None]:
    """Those that were given, else one that is drawn for all clips of the command; none where nothing is sampled."""
    if args.seeds is not None:
        return [seed for part in args.seeds for seed in part]
    if args.seed is None and args.drive is None and args.motion is None:
        return [draw_seed()]
    return [args.seed]


def options_of(args: argparse.Namespace) -> SamplingOptions:
    """How the command's clips are sampled.

    Raises:
        InputError: an option is out of range.
    """
    interval = WHOLE if args.guidance_interval is None else tuple(args.guidance_interval)
    return SamplingOptions(args.sampler, args.steps, args.eta, args.guidance, interval)


def _name(out: str | os.PathLike[str], ending: str | None, label: str | None, seed: int | None) -> str:
    """``a.gif`` -> ``a-nod-seed3.gif``; ``folder/`` -> ``folder/nod-seed3.gif``, without ending a folder of frames."""
    given = os.fspath(out)
    words = "-".join([*([] if label is None else [_word(label)]), f"seed{seed}"])
    if given.endswith(("/", os.sep)) or user_path(given).is_dir():
        return f"{given.rstrip('/' + os.sep)}/{words}" + (f".{ending}" if ending else "/")
    suffix = Path(given).suffix
    return f"{given.removesuffix(suffix)}-{words}{suffix}"


def _word(label: str) -> str:
    """A label as part of a file name on any system."""
    return re.sub(r"[^\w-]+", "_", label).strip("_")[:_LONGEST_WORD] or "label"
