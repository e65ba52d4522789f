"""The clips of one `lfdm-generate` command: labels times seeds, and the file of each."""

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

#: Most clips of one command; more are probably a typing error.
MAX_CLIPS = 1000
# Most characters of a label in a file name; file systems limit the whole name to 255 bytes.
_LONGEST_WORD = 40


@dataclass(frozen=True)
class PlannedClip:
    """One clip.

    Attributes:
        label: label; None if a text, an embedding or a clip determines the motion.
        seed: seed; None if nothing is sampled.
        out: file or folder of the clip.
    """

    label: str | None
    seed: int | None
    out: str

    def __str__(self) -> str:
        label = None if self.label is None else repr(self.label)
        parts = [f"{name} {value}" for name, value in (("label", label), ("seed", self.seed)) if value is not None]
        return ", ".join(parts) or self.out


def seeds_of(word: str) -> range:
    """Parse a seed, or a range such as 1-8, both ends included.

    Raises:
        argparse.ArgumentTypeError: the text is neither, or the range is too long.
    """
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
    if found is None:
        raise argparse.ArgumentTypeError(f"{word!r} is neither a seed nor a range such as 1-8")
    first, last = int(found[1]), int(found[2] or found[1])
    if not 0 < last + 1 - first <= MAX_CLIPS:
        raise argparse.ArgumentTypeError(f"the range {word} has {last + 1 - first} seeds, expected 1 to {MAX_CLIPS}")
    return range(first, last + 1)


def positions_of(word: str) -> range:
    """Parse the position of a frame, or a range such as 0-7, both ends included.

    Raises:
        argparse.ArgumentTypeError: the text is neither, or the range is empty or beyond any clip.
    """
    found = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", word)
    frames = range(0) if found is None else range(int(found[1]), int(found[2] or found[1]) + 1)
    if not frames:
        raise argparse.ArgumentTypeError(f"{word!r} is neither the position of a frame nor a range such as 0-7")
    return frames


def frames_of(args: argparse.Namespace) -> list[int] | slice | None:
    """Return the frames to decode; None for all."""
    if args.stride is not None:
        return slice(None, None, args.stride)
    return None if args.frames is None else sorted({frame for part in args.frames for frame in part})


def inputs_of(args: argparse.Namespace) -> dict[str, str]:
    """Return the files and folders that the command reads, which no clip may replace."""
    named = {f"--{name}": getattr(args, name) for name in ("image", "drive", "motion", "embedding")}
    # The picture of a pipe has been read: it is no path.
    return {name: path for name, path in {**named, "BUNDLE": args.bundle}.items() if isinstance(path, str)}


def wants_many(args: argparse.Namespace) -> bool:
    """Whether the command generates several clips, whose file names then include label and seed."""
    return bool(args.labels_all or len(args.label or ()) > 1 or sum(map(len, args.seeds or ())) > 1)


def example_name(args: argparse.Namespace) -> str:
    """Return an output file for the check that outputs are writable."""
    return _name(args.out, args.format, None, 0) if wants_many(args) and not _is_device(args) else str(args.out)


def _is_device(args: argparse.Namespace) -> bool:
    """Whether the output is a device or a pipe, which holds only one clip."""
    out = user_path(args.out)
    return out.exists() and not (out.is_file() or out.is_dir())


def planned_clips(args: argparse.Namespace, known: Sequence[str]) -> tuple[PlannedClip, ...]:
    """Return the clips of the command, ordered by seed, then label.

    Args:
        args: arguments of the command.
        known: labels of the bundle or of the served model.

    Raises:
        InputError: there are no clips, too many, or the same clip twice; several would go to a device; or one would
            replace an input.
    """
    seeds = _seeds(args)
    if not wants_many(args):
        return (PlannedClip(args.label[0] if args.label else None, seeds[0], args.out),)
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
    made: dict[str, PlannedClip] = {}
    for seed in seeds:
        for label in labels:
            name = _name(args.out, args.format, label, seed)
            number = 2
            while name.casefold() in made:  # two labels may have the same file name
                name = _name(args.out, args.format, f"{_word(label or '')}-{number}", seed)
                number += 1
            refuse_inputs(name, inputs_of(args))
            made[name.casefold()] = PlannedClip(label, seed, name)
    return tuple(made.values())


def _seeds(args: argparse.Namespace) -> list[int | None]:
    """Return the given seeds; by default one drawn for all clips of the command; none if nothing is sampled."""
    if args.seeds is not None:
        return [seed for part in args.seeds for seed in part]
    if args.seed is None and args.drive is None and args.motion is None:
        return [draw_seed()]
    return [args.seed]


def options_of(args: argparse.Namespace) -> SamplingOptions:
    """Return the options of sampling.

    Raises:
        InputError: an option is out of range.
    """
    interval = WHOLE if args.guidance_interval is None else tuple(args.guidance_interval)
    return SamplingOptions(args.sampler, args.steps, args.eta, args.guidance, interval)


def _name(out: str | os.PathLike[str], ending: str | None, label: str | None, seed: int | None) -> str:
    """Name a clip: ``a.gif`` -> ``a-nod-seed3.gif``; ``folder/`` -> ``folder/nod-seed3.gif``; no ending for frames."""
    given = os.fspath(out)
    words = "-".join([*([] if label is None else [_word(label)]), f"seed{seed}"])
    if given.endswith(("/", os.sep)) or user_path(given).is_dir():
        return f"{given.rstrip('/' + os.sep)}/{words}" + (f".{ending}" if ending else "/")
    suffix = Path(given).suffix
    return f"{given.removesuffix(suffix)}-{words}{suffix}"


def _word(label: str) -> str:
    """Convert a label to a part of a file name that is valid on any system."""
    return re.sub(r"[^\w-]+", "_", label).strip("_")[:_LONGEST_WORD] or "label"
