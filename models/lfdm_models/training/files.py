"""Files of a training run: written whole or not at all; read without running anything in them."""

from __future__ import annotations

import os
import pickle
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lfdm_models.stored_files import TorchFile
from lfdm_models.training.errors import TrainingError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, which then takes its place.

    Raises:
        TrainingError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())  # else a machine that goes down may leave the new name without the new bytes
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError where the disk is full
        raise TrainingError(f"{path} cannot be written: {error}; free some space or choose another folder") from error
    finally:
        part.unlink(missing_ok=True)


def save(path: Path, content: dict[str, Any]) -> None:
    """`torch.save`, whole or not at all.

    Raises:
        TrainingError: it cannot be written.
    """
    write_whole(path, lambda part: torch.save(content, part))


def load(path: Path, what: str) -> dict[str, Any]:
    """What `save` wrote, on the CPU.

    Args:
        path: the file.
        what: what it is meant to be, for messages.

    Raises:
        TrainingError: it cannot be read, or is no such file.
    """
    try:
        TorchFile(path)  # torch's own reader builds what a damaged or hostile file claims, before it can be checked
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise TrainingError(f"{path} does not exist; give the path of {what}") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TrainingError(f"{path} cannot be read as {what} ({reason})") from error
    if not isinstance(content, dict):
        raise TrainingError(f"{path} holds a {type(content).__name__}, expected {what}")
    return content
