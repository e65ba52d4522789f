"""Bundles on the Hugging Face hub: downloaded by name into the hub's cache, and published with a model card."""

from __future__ import annotations

import glob
import io
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfdm_export.errors import BundleError, InputError, MissingDependencyError
from lfdm_export.pictures.clip import Clip
from lfdm_models.patience import within
from lfdm_models.wording import first_line

logger = logging.getLogger(__name__)

#: Files of a bundle's repository that are not part of the bundle.
CARD, CARD_CLIP = "README.md", "clip.gif"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
# Timeout of a request to the hub in seconds.
_PATIENCE = 20.0
_REVISION = re.compile(r"[\w./-]{1,200}")


@dataclass(frozen=True)
class HubName:
    """Name of a bundle on the hub.

    Attributes:
        repository: ``org/name``.
        revision: a branch, a tag or a commit; None for the newest of the main branch.
    """

    repository: str
    revision: str | None = None

    def __post_init__(self) -> None:
        """Check the form.

        Raises:
            InputError: the name is not a valid name on the hub.
        """
        if not _NAME.fullmatch(self.repository) or ".." in self.repository:
            raise InputError(f"{self.repository[:200]!r} is not a name on the Hugging Face hub, expected org/name")
        if self.revision is not None and not _REVISION.fullmatch(self.revision):
            raise InputError(f"the revision is {self.revision[:200]!r}, expected a branch, a tag or a commit")

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"

    @classmethod
    def find(cls, path: str | os.PathLike[str]) -> HubName | None:
        """Parse a hub name given instead of a bundle's folder; None if it can only be a path.

        ``org/name`` and ``org/name@revision`` are names if there is no folder ``org``.
        """
        if not isinstance(path, str):
            return None
        repository, at, revision = path.partition("@")
        if not _NAME.fullmatch(repository) or Path(path).exists() or Path(repository).parent.exists():
            return None
        return cls(repository, revision if at else None)


def fetch(name: HubName, manifest_file: str, files_of: Callable[[Path], Iterable[str]]) -> Path:
    """The folder of a bundle's files in this machine's hub cache; missing files are downloaded.

    Only the manifest and the files that it lists are downloaded. Without a connection, or with HF_HUB_OFFLINE=1, the
    cached copy is used. The caller, who opens the bundle, checks every file.

    Args:
        name: name of the bundle.
        manifest_file: name of its manifest.
        files_of: returns the files that the manifest in a folder lists.

    Raises:
        BundleError: there is no such bundle, no access to it, or no connection and no copy.
        MissingDependencyError: huggingface_hub is not installed.
    """
    hub = _import_hub(f"there is no folder {str(name)!r}, and fetching it from the Hugging Face hub")
    api = hub.HfApi(library_name="lfdm-export")
    with _errors_as_sentences(hub, name, "fetched"):
        local = not _answers(hub, api, name)
        first = Path(
            api.hf_hub_download(name.repository, manifest_file, revision=name.revision, local_files_only=local)
        )
        # By the manifest's commit: the branch may have moved since.
        found = api.snapshot_download(
            name.repository,
            revision=first.parent.name,
            allow_patterns=[glob.escape(file) for file in (manifest_file, *files_of(first.parent))],
            local_files_only=local,
        )
    return Path(found)


def _answers(hub: Any, api: Any, name: HubName) -> bool:
    """Whether the hub answers: without an answer, a download would retry for minutes."""
    if hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        within(_PATIENCE, lambda: api.model_info(name.repository, revision=name.revision, timeout=_PATIENCE / 2))
    except (hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError):
        raise
    except Exception as error:  # noqa: BLE001 (the client raises errors of its own, of its HTTP library, of the system)
        reason = first_line(error, 200)
        logger.warning("no answer from the Hugging Face hub about %s (%s); looking for a copy here", name, reason)
        return False
    return True


def publish(
    folder: Path, files: Sequence[str], name: HubName, *, card: str, clip: Clip | None, private: bool, message: str
) -> str:
    """Publish a bundle in a hub repository, in one commit that also deletes the files of an earlier bundle.

    Args:
        folder: folder of a bundle whose files have been checked.
        files: its files, including the manifest.
        name: name of the repository, which is created if missing; the revision is the branch.
        card: text of the model card.
        clip: a clip of one sample for the card.
        private: make a new repository private.
        message: commit message.

    Returns:
        The URL of the commit.

    Raises:
        BundleError: the hub refuses the commit.
        MissingDependencyError: huggingface_hub is not installed.
    """
    hub = _import_hub(f"publishing {name}")
    content: dict[str, bytes | str] = {file: str(folder / file) for file in files}
    content[CARD] = card.encode()
    if clip is not None:
        content[CARD_CLIP] = _gif(clip)
    api = hub.HfApi(library_name="lfdm-export")
    with _errors_as_sentences(hub, name, "published"):
        api.create_repo(name.repository, private=private or None, exist_ok=True)
        if name.revision is not None:
            api.create_branch(name.repository, branch=name.revision, exist_ok=True)
        there = api.list_repo_files(name.repository, revision=name.revision)
        operations: list[Any] = [
            hub.CommitOperationAdd(file, data if isinstance(data, str) else io.BytesIO(data))
            for file, data in content.items()
        ]
        operations += [hub.CommitOperationDelete(file) for file in there if _is_old(file, content)]
        made = api.create_commit(name.repository, operations, commit_message=message, revision=name.revision)
    return str(made.commit_url)


def _is_old(file: str, content: Mapping[str, object]) -> bool:
    """Whether a file of the repository belongs to an earlier bundle and not to this one."""
    return file not in content and (file == CARD_CLIP or file.startswith(("onnx/", "tokenizer/")) or file in _OPTIONAL)


_OPTIONAL = ("reference.npz",)


def _gif(clip: Clip) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        (path,) = clip.sample(0).save(Path(folder) / CARD_CLIP)
        return path.read_bytes()


def _import_hub(purpose: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ModuleNotFoundError as error:
        raise MissingDependencyError("huggingface_hub", purpose, "hub") from error
    return huggingface_hub


@contextmanager
def _errors_as_sentences(hub: Any, name: HubName, done: str) -> Iterator[None]:
    """Re-raise errors of the hub's client as one-sentence errors of this program."""
    errors = hub.errors
    try:
        yield
    except (BundleError, InputError):
        raise
    except errors.GatedRepoError as error:
        reason = "its owner grants access on request; request it on its page, and log in with `hf auth login`"
        raise BundleError(f"{name} cannot be {done}: {reason}") from error
    except errors.RepositoryNotFoundError as error:
        raise BundleError(
            f"{name} cannot be {done}: no such folder here, and no such repository on the Hugging Face hub, or a "
            "private one; check the name, or log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise BundleError(f"{name} cannot be {done}: the repository has no such revision") from error
    except errors.LocalEntryNotFoundError as error:
        raise BundleError(
            f"{name} cannot be {done}: it is neither a folder nor in the hub's cache on this machine, and the Hugging "
            "Face hub cannot be reached (no connection, or HF_HUB_OFFLINE is set); connect, or give a bundle's folder"
        ) from error
    except errors.EntryNotFoundError as error:
        raise BundleError(f"{name} is not a bundle: the repository has no manifest.json") from error
    except Exception as error:  # the client raises errors of its own, of its HTTP library and of the system
        reason = first_line(error)
        raise BundleError(f"{name} cannot be {done}: {reason}") from error
