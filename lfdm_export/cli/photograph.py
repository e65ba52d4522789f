"""The option --crop, and the message about black bars."""

from __future__ import annotations

import argparse
from pathlib import Path

from lfdm_export.cli.console import say
from lfdm_export.errors import InputError
from lfdm_export.pictures.crop import Crop, parse_crop
from lfdm_export.pictures.preprocess import Preprocessing, picture_size


def crop_of(text: str) -> Crop:
    """Parse the value of --crop.

    Raises:
        argparse.ArgumentTypeError: the value is invalid.
    """
    try:
        return parse_crop(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def say_bars(args: argparse.Namespace, rule: Preprocessing) -> None:
    """Report black bars: added to an image that is neither square nor of the data set's aspect ratio."""
    if args.crop is not None or rule.resize_first is not None or not Path(args.image).is_file():
        return
    size = picture_size(args.image)
    if size[0] != size[1] and size != rule.frame_size:
        say(
            args, f"the photograph has {size[0]}x{size[1]} pixels: black bars make it square; --crop center avoids them"
        )
