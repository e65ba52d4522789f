"""Arguments given once or once per sample, converted to one batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lfdm_export.errors import InputError
from lfdm_export.files.names import user_path
from lfdm_export.sampling.noise import NoiseSource, check_seeds, draw_seed, handed_noise, seeded_noise
from lfdm_models.pictures.errors import PictureError
from lfdm_models.pictures.formats import open_stream

#: Maximum characters of an invalid value in a message.
_SHOWN = 42


def common_batch(sizes: Mapping[str, int]) -> int:
    """Return the common batch of these sizes, each of which is 1 or that batch.

    Raises:
        InputError: two of them differ and neither is 1.
    """
    batch = max(sizes.values())
    if any(size not in (1, batch) for size in sizes.values()):
        found = ", ".join(f"{size} of {name}" for name, size in sizes.items())
        raise InputError(f"found {found}; expected the same number of each, or 1 to serve all")
    return batch


def per_sample(value: str | Sequence[str], name: str) -> tuple[str, ...]:
    """Return one string, or one per sample, as a tuple.

    Raises:
        InputError: it is neither.
    """
    values = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else ()
    if not values or not all(isinstance(one, str) for one in values):
        raise InputError(f"{name} is {value!r}, expected a string or a sequence of them")
    return values


def condition_name(label: object, text: object, text_embedding: object) -> str:
    """Which of the three is given, not None: "label", "text" or "text_embedding".

    Raises:
        InputError: none is, or several are.
    """
    given = {"label": label, "text": text, "text_embedding": text_embedding}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise InputError(f"found {len(names)} of label, text and text_embedding, expected exactly one")
    return names[0]


def embedding_rows(embedding: ArrayLike, width: int) -> NDArray[np.float32]:
    """Convert one text embedding (width,) or several (B, width) to (B, width) float32.

    Raises:
        InputError: it has another shape, or values that are not finite numbers.
    """
    try:
        array = np.asarray(embedding)
        rows = array.astype(np.float32) if array.dtype.kind in "fiu" else None
    except (TypeError, ValueError):
        rows = None
    if rows is None:
        raise InputError("text_embedding is not an array of numbers")
    if rows.ndim == 1:
        rows = rows[None]
    if rows.ndim != 2 or rows.shape[1] != width or len(rows) == 0:
        raise InputError(f"text_embedding has shape {array.shape}, expected ({width},) or (B, {width})")
    if not np.isfinite(rows).all():
        raise InputError("text_embedding holds values that are not finite; make it again")
    return rows


def load_embedding(path: str | os.PathLike[str]) -> NDArray[np.generic]:
    """Load a text embedding from a .npy file; `embedding_rows` checks its content.

    Raises:
        InputError: the file does not exist or is not an array.
    """
    source = user_path(path)
    try:
        with open_stream(source, str(source)) as stream:
            return read_embedding(stream, str(source))
    except PictureError as error:
        reason = getattr(error.__context__, "strerror", None) or "it is not a file"
        raise InputError(f"the embedding {source} cannot be read: {reason}; save it with numpy.save") from error


def read_embedding(stream: BinaryIO, name: str) -> NDArray[np.generic]:
    """Like `load_embedding`, from a seekable stream.

    Raises:
        InputError: it is not an array.
    """
    try:
        loaded = np.load(stream, allow_pickle=False)
    except Exception as error:  # NumPy and its parsers raise various errors on a damaged file
        reason = getattr(error, "strerror", None) or "it is not an .npy array"
        raise InputError(f"the embedding {name} cannot be read: {reason}; save it with numpy.save") from error
    if not isinstance(loaded, np.ndarray):
        raise InputError(f"the embedding {name} is an archive, expected one array; save it with numpy.save")
    return loaded


def whole_number(value: object, name: str) -> int:
    """Convert an integer, or text that is one.

    Raises:
        InputError: it is not an integer.
    """
    number = _from_text(value, int)
    if isinstance(number, bool) or not isinstance(number, int):
        raise InputError(f"{name} is {repr(value)[:_SHOWN]}, expected a whole number")
    return number


def real_number(value: object, name: str) -> float:
    """Convert a number, or text that is one; it may be infinite or NaN.

    Raises:
        InputError: it is not a number.
    """
    number = _from_text(value, float)
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise InputError(f"{name} is {repr(value)[:_SHOWN]}, expected a number")
    return float(number)


def _from_text(value: object, kind: type[int] | type[float]) -> object:
    """Text as a number if it is one; any other value as it is."""
    try:
        return kind(value) if isinstance(value, str) else value
    except ValueError:
        return value


def seed_count(seed: int | Sequence[int] | None) -> int:
    """Number of seeds; 1 for a single seed or None.

    Raises:
        InputError: it is neither an integer nor a sequence.
    """
    if seed is None or isinstance(seed, int | np.integer):
        return 1
    if not isinstance(seed, Sequence | np.ndarray) or len(seed) == 0:
        raise InputError(f"seed is {seed!r}, expected an integer or a sequence of them")
    return len(seed)


def sample_seeds(seed: int | Sequence[int] | None, batch: int) -> tuple[int, ...]:
    """The seed of each sample: as given, or ``seed + i`` for sample i; None draws one.

    Raises:
        InputError: a seed is not an integer or out of range, or the number of seeds differs from the batch.
    """
    seed = draw_seed() if seed is None else seed
    if isinstance(seed, int | np.integer):
        return check_seeds([int(seed) + index for index in range(batch)])
    if seed_count(seed) != batch:
        raise InputError(f"found {seed_count(seed)} seeds for {batch} samples, expected one per sample or a single one")
    return check_seeds(seed)


def find_noise(
    seed: int | Sequence[int] | None,
    noise: Iterator[NDArray[np.float32]] | None,
    batch: int,
    shape: tuple[int, int, int, int],
) -> tuple[tuple[int, ...] | None, NoiseSource]:
    """The seeds of the samples, or None if the caller passes noise; and the noise.

    Args:
        seed: as for `sample_seeds`; None if `noise` is given.
        noise: draws (batch, *shape), instead of seeds.
        batch: number of samples.
        shape: (3, T, h, w) of a sample.

    Raises:
        InputError: both are given, or the seeds are not valid.
    """
    if noise is None:
        seeds = sample_seeds(seed, batch)
        return seeds, seeded_noise(seeds, shape)
    if seed is not None:
        raise InputError("both seed and noise were given, expected one of them; leave one out")
    return None, handed_noise(iter(noise), (batch, *shape))
