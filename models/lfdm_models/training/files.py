"""Files of a training run: written completely or not at all; read without running any code in them."""

from __future__ import annotations

import errno
import os
import pickle
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lfdm_models.stored_files import TorchFile, read_safetensors
from lfdm_models.training.errors import TrainingError
from lfdm_models.wording import first_line

_LONGEST_NAME = 255


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, which then replaces it.

    A link stays, and its target is replaced; a device or a pipe is written to. Leftovers of killed runs in the folder
    are removed. (`lfdm_export.files.atomic` does the same for the toolkit.)

    Args:
        path: the file; missing folders are created.
        write: fills the given file.

    Raises:
        TrainingError: the file cannot be written.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            write(path)
            return
        target = path.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target.parent)
        with _part(target) as part:
            write(part)
            _sync(part)  # else a crash of the machine may leave the new name without the new bytes
            part.replace(target)
            _sync(target.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError if the disk is full
        raise TrainingError(f"{path} cannot be written: {error}; free some space or choose another folder") from error


def refuse_input(output: Path, inputs: Mapping[str, Path | None]) -> None:
    """Reject an output that would replace an input.

    Args:
        output: file to be written.
        inputs: files by option.

    Raises:
        TrainingError: the output is the same file as an input, under any name.
    """
    for option, path in inputs.items():
        if path is not None and path.is_file() and output.exists() and path.samefile(output):
            raise TrainingError(
                f"the output {output} is the same file as {option} {path}, which it would replace; "
                "choose another folder for the run"
            )


@contextmanager
def _part(target: Path) -> Iterator[Path]:
    """A temporary name beside `target`, locked while its writer lives, and removed afterwards."""
    ending = f".lfdm-{secrets.token_hex(6)}.part"
    kept = os.fsencode(target.name)[: _LONGEST_NAME - len(ending) - 1].decode("utf-8", "ignore")
    part = target.with_name(f".{kept}{ending}")
    try:
        with part.open("xb") as file:
            _lock(file.fileno())
            yield part
    finally:
        part.unlink(missing_ok=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove leftovers of killed runs: files with such names that no process has locked."""
    for path in folder.glob(".*.lfdm-*.part"):
        if path.is_file() and not path.is_symlink():
            with suppress(OSError), path.open("rb") as file:
                if _lock(file.fileno()):
                    path.unlink()


def _lock(descriptor: int) -> bool:
    """Whether a file was locked; False if another process holds the lock, or locks are not available."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def _sync(path: Path) -> None:
    """Make a file, or a folder's entries, durable, where the file system supports it."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def save(path: Path, content: dict[str, Any]) -> None:
    """`torch.save`, completely or not at all; equal content gives equal bytes.

    Raises:
        TrainingError: it cannot be written.
    """

    def write(part: Path) -> None:
        with part.open("wb") as file:  # given a path, torch would store its name, which is random
            torch.save(content, file)

    write_whole(path, write)


def load(path: Path, what: str) -> dict[str, Any]:
    """Read the result of `save`, on the CPU; from a safetensors file, its tensors by the first part of their names.

    Args:
        path: the file.
        what: expected kind of file, for messages.

    Raises:
        TrainingError: the file cannot be read, or is of another kind.
    """
    try:
        if path.suffix == ".safetensors":
            return _by_part(read_safetensors(path))
        TorchFile(path)  # torch's own reader allocates whatever an invalid file claims, before any check
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise TrainingError(f"{path} does not exist; give the path of {what}") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise TrainingError(f"{path} cannot be read as {what} ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise TrainingError(f"{path} holds a {type(content).__name__}, expected {what}")
    return content


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], path: Path, what: str) -> None:
    """Give a network the weights of a checkpoint.

    Args:
        network: a network of the checkpoint's architecture.
        weights: by the network's own names.
        path: the checkpoint, for messages.
        what: expected kind of network, for messages.

    Raises:
        TrainingError: the checkpoint has another architecture.
    """
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise TrainingError(f"{path} is not {what} of this architecture: {reason}") from error


def _by_part(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tensors by released names, as a checkpoint holds them: those of "diffusion.x" under "diffusion"."""
    parts: dict[str, Any] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    return parts
