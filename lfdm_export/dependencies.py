"""Which extra of this project brings a package that is missing: read from the project's own metadata."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping

from lfdm_export.errors import MissingDependencyError

_PROJECT = "lfdm-export"
# A requirement as wheels' metadata has it. Source: PEP 508.
_REQUIREMENT = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[([^]]*)\])?")
_EXTRA = re.compile(r"""extra\s*==\s*["']([^"']+)["']""")


def missing_dependency(error: ModuleNotFoundError, purpose: str, extra: str) -> MissingDependencyError | None:
    """What a failed import means: the package, and the extra to install; None if it belongs to no extra.

    Args:
        error: of the import.
        purpose: what needed it, for the message.
        extra: the one that is meant for this purpose; named if it brings the package, else the first that does.
    """
    module = (error.name or "").partition(".")[0]
    bringing = [name for name, packages in _packages_by_extra().items() if _normal(module) in packages]
    if not bringing:
        return None
    return MissingDependencyError(module, purpose, extra if extra in bringing else bringing[0])


def _packages_by_extra() -> Mapping[str, set[str]]:
    """The packages that each extra brings, those of the extras that it is made of included, in pyproject's order."""
    try:
        requirements = importlib.metadata.requires(_PROJECT) or []
    except importlib.metadata.PackageNotFoundError:  # run from its sources
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
    """A distribution's name, or the module's that is called the same, in one spelling. Source: PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()
