"""The options --crop and --paste-back, and the message about black bars."""

from __future__ import annotations

import argparse

from lfdm_export.cli.console import say
from lfdm_export.errors import InputError
from lfdm_export.files.names import user_path
from lfdm_export.pictures.crop import Crop, parse_crop
from lfdm_export.pictures.preprocess import Preprocessing, find_face, picture_size, read_image


def crop_of(text: str) -> Crop:
    """Parse the value of --crop.

    Raises:
        argparse.ArgumentTypeError: the value is invalid.
    """
    try:
        return parse_crop(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_crop_options(parser: argparse.ArgumentParser) -> None:
    """Add --crop and --paste-back."""
    parser.add_argument(
        "--crop",
        type=crop_of,
        metavar="center|face|X,Y,W,H",
        help="region of the image to use (center: the largest square; face: a square around the largest face) instead "
        "of padding it with black bars",
    )
    parser.add_argument(
        "--paste-back",
        action="store_true",
        help="put the clip back into the whole photograph, with a soft border (panels still show the crop)",
    )


def check_crop_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Reject --paste-back without --crop: prints the usage and exits with status 2."""
    # Rows of a table may have crops of their own.
    if args.paste_back and args.crop is None and args.jobs is None:
        parser.error("--paste-back needs --crop, the region to put back")


def read_pipe(args: argparse.Namespace) -> None:
    """Replace an --image that is a pipe or a device by its picture: it can be read only once, and is needed often.

    Raises:
        InputError: the photograph cannot be used.
    """
    path = user_path(args.image)
    if path.exists() and not path.is_file() and not path.is_dir():
        args.image = read_image(path)


def settle_crop(args: argparse.Namespace) -> None:
    """Replace --crop face by the region around the face, once for all clips of the command, and print it.

    Raises:
        InputError: the photograph cannot be used, or has no face.
        MissingDependencyError: OpenCV is not installed.
    """
    if args.crop != "face":
        return
    face = find_face(args.image)
    args.crop = face.crop
    several = f"{face.found} faces, the largest is used: " if face.found > 1 else ""
    say(args, f"face  {several}--crop {','.join(map(str, face.crop))}")


def say_bars(args: argparse.Namespace, rule: Preprocessing) -> None:
    """Report black bars: added to an image that is neither square nor of the data set's aspect ratio."""
    if args.crop is not None or rule.resize_first is not None:
        return
    size = picture_size(args.image) if isinstance(args.image, str) else args.image.shape[1::-1]
    if size[0] != size[1] and size != rule.frame_size:
        say(
            args, f"the photograph has {size[0]}x{size[1]} pixels: black bars make it square; --crop center avoids them"
        )
