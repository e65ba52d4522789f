"""Find the extra of this project that installs a missing package, from the project's own metadata."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping

from lfdm_export.errors import MissingDependencyError

_PROJECT = "lfdm-export"
# A requirement in a wheel's metadata. Source: PEP 508.
_REQUIREMENT = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[([^]]*)\])?")
_EXTRA = re.compile(r"""extra\s*==\s*["']([^"']+)["']""")


def missing_dependency(error: ModuleNotFoundError, purpose: str, extra: str) -> MissingDependencyError | None:
    """The error for a failed import, with the package and the extra to install; None if no extra installs it.

    Args:
        error: the import error.
        purpose: what needs the package, for the message.
        extra: the extra for this purpose; named if it installs the package, else the first extra that does.
    """
    module = (error.name or "").partition(".")[0]
    bringing = [name for name, packages in _packages_by_extra().items() if _normal(module) in packages]
    if not bringing:
        return None
    return MissingDependencyError(module, purpose, extra if extra in bringing else bringing[0])


def _packages_by_extra() -> Mapping[str, set[str]]:
    """The packages of each extra, those of nested extras included, in the order of pyproject.toml."""
    try:
        requirements = importlib.metadata.requires(_PROJECT) or []
    except importlib.metadata.PackageNotFoundError:  # runs from its sources
        return {}
    direct: dict[str, set[str]] = {}
    parts: dict[str, set[str]] = {}
    for requirement in requirements:
        found, of_extra = _REQUIREMENT.match(requirement), _EXTRA.search(requirement)
        if found is None or of_extra is None:
            continue
        packages = direct.setdefault(of_extra[1], set())
        if _normal(found[1]) == _PROJECT:
            parts.setdefault(of_extra[1], set()).update(part.strip() for part in (found[2] or "").split(","))
        else:
            packages.add(_normal(found[1]))

    def all_of(extra: str) -> set[str]:
        return direct.get(extra, set()).union(*(all_of(part) for part in parts.get(extra, ())))

    return {extra: all_of(extra) for extra in direct}


def _normal(name: str) -> str:
    """A distribution name, or the name of its module, in one spelling. Source: PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()
