"""What a caller gives once or once a sample, brought to one batch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lfdm_export.errors import InputError
from lfdm_export.files.names import user_path
from lfdm_export.sampling.noise import check_seeds

#: The interval in which guidance acts at every step.
WHOLE = (0.0, 1.0)
#: Characters of a value that is no number which a message shows.
_SHOWN = 42


def common_batch(sizes: Mapping[str, int]) -> int:
    """The batch that all of these sizes mean, of which each is 1 or that batch.

    Raises:
        InputError: two of them differ and neither is 1.
    """
    batch = max(sizes.values())
    if any(size not in (1, batch) for size in sizes.values()):
        found = ", ".join(f"{size} of {name}" for name, size in sizes.items())
        raise InputError(f"found {found}; expected the same number of each, or 1 to serve all")
    return batch


def per_sample(value: str | Sequence[str], name: str) -> tuple[str, ...]:
    """One string, or one a sample, as a tuple.

    Raises:
        InputError: it is neither.
    """
    values = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else ()
    if not values or not all(isinstance(one, str) for one in values):
        raise InputError(f"{name} is {value!r}, expected a string or a sequence of them")
    return values


def embedding_rows(embedding: ArrayLike, width: int) -> NDArray[np.float32]:
    """A text embedding (width,) or several (B, width) as (B, width) float32.

    Raises:
        InputError: it has another shape, or values that are no finite numbers.
    """
    try:
        array = np.asarray(embedding)
        rows = array.astype(np.float32) if array.dtype.kind in "fiu" else None
    except (TypeError, ValueError):
        rows = None
    if rows is None:
        raise InputError("text_embedding is no array of numbers")
    if rows.ndim == 1:
        rows = rows[None]
    if rows.ndim != 2 or rows.shape[1] != width or len(rows) == 0:
        raise InputError(f"text_embedding has shape {array.shape}, expected ({width},) or (B, {width})")
    if not np.isfinite(rows).all():
        raise InputError("text_embedding holds values that are not finite; make it again")
    return rows


def load_embedding(path: str | os.PathLike[str]) -> NDArray[np.generic]:
    """A text embedding out of a .npy file; `embedding_rows` checks what is in it.

    Raises:
        InputError: there is no such file, or it is no array.
    """
    return _embedding(lambda: np.load(user_path(path), allow_pickle=False), os.fspath(path))


def read_embedding(stream: BinaryIO, name: str) -> NDArray[np.generic]:
    """Like `load_embedding`, out of a stream.

    Raises:
        InputError: it is no array.
    """
    return _embedding(lambda: np.load(stream, allow_pickle=False), name)


def _embedding(load: Callable[[], object], name: str) -> NDArray[np.generic]:
    try:
        loaded = load()
    except InputError:
        raise
    except Exception as error:  # NumPy and its parsers raise anything on a damaged file
        reason = getattr(error, "strerror", None) or "it is no .npy array"
        raise InputError(f"the embedding {name} cannot be read: {reason}; save it with numpy.save") from error
    if not isinstance(loaded, np.ndarray):
        raise InputError(f"the embedding {name} is an archive, expected one array; save it with numpy.save")
    return loaded


def whole_number(value: object, name: str) -> int:
    """A whole number, or text that is one.

    Raises:
        InputError: it is something else.
    """
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = value
    if isinstance(number, bool) or not isinstance(number, int):
        raise InputError(f"{name} is {repr(value)[:_SHOWN]}, expected a whole number")
    return number


def real_number(value: object, name: str) -> float:
    """A number, or text that is one; perhaps not finite.

    Raises:
        InputError: it is something else.
    """
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        number = value
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise InputError(f"{name} is {repr(value)[:_SHOWN]}, expected a number")
    return float(number)


def finite_number(value: float, name: str) -> float:
    """`value` as a float.

    Raises:
        InputError: it is no number, or not finite.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InputError(f"{name} is {value!r}, expected a number") from None
    if not math.isfinite(number):
        raise InputError(f"{name} is {number}, expected a finite number")
    return number


def guided_steps(timesteps: NDArray[np.int64], training_steps: int, interval: tuple[float, float]) -> NDArray[np.bool_]:
    """Which steps guidance acts at: those whose time, as a share of the schedule, lies in the interval.

    Args:
        timesteps: (S,) int64.
        training_steps: of the schedule; time t of N is the share t / (N - 1).
        interval: (low, high), each 0 … 1, both counted in.

    Returns:
        (S,) bool.

    Raises:
        InputError: the interval is none.

    Source: Kynkäänniemi et al., Applying Guidance in a Limited Interval (arXiv 2404.07724).
    """
    low, high = interval_ends(interval)
    shares = timesteps / max(training_steps - 1, 1)
    return (low <= shares) & (shares <= high)


def interval_ends(interval: tuple[float, float]) -> tuple[float, float]:
    """Low and high of an interval of guidance.

    Raises:
        InputError: it is none.
    """
    try:
        low, high = (finite_number(end, "guidance_interval") for end in interval)
    except (TypeError, ValueError):
        raise InputError(f"guidance_interval is {interval!r}, expected two numbers, such as (0.2, 0.8)") from None
    if not 0.0 <= low <= high <= 1.0:
        raise InputError(f"guidance_interval is ({low:g}, {high:g}), expected 0 <= low <= high <= 1")
    return low, high


def seed_count(seed: int | Sequence[int] | None) -> int:
    """How many seeds were given; 1 for a single one, or none.

    Raises:
        InputError: it is neither an integer nor a sequence.
    """
    if seed is None or isinstance(seed, int | np.integer):
        return 1
    if not isinstance(seed, Sequence | np.ndarray) or len(seed) == 0:
        raise InputError(f"seed is {seed!r}, expected an integer or a sequence of them")
    return len(seed)


def sample_seeds(seed: int | Sequence[int] | None, batch: int) -> tuple[int, ...]:
    """The seed of each sample: as given, or ``seed + i`` for sample i; None is 0.

    Raises:
        InputError: a seed is no integer or out of range, or there are not as many as samples.
    """
    if seed is None or isinstance(seed, int | np.integer):
        return check_seeds([int(seed or 0) + index for index in range(batch)])
    if seed_count(seed) != batch:
        raise InputError(f"found {seed_count(seed)} seeds for {batch} samples, expected one a sample or a single one")
    return check_seeds(seed)
