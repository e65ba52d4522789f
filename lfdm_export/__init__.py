"""Export of latent flow diffusion models (LFDM) to ONNX bundles, and generation of clips with them.

Example:
    The model that comes with the package, which needs neither torch nor onnx:

    >>> from lfdm_export import Pipeline
    >>> pipeline = Pipeline("characters")
    >>> clip = pipeline.generate("face.png", label="nod", steps=10, seed=1)
    >>> paths = clip.save("nod.gif")

    Checkpoints of your own become a bundle first:

    >>> from lfdm_export import export_bundle, load_model
    >>> model = load_model("RegionMM_mug.pth", "flowdiff_mug.pth", dataset="mug")
    >>> bundle = export_bundle(model, "mug", dataset="mug")
    >>> paths = Pipeline(bundle).generate("face.jpg", label="happiness", seed=0).save("happiness.gif")

Importing the package is light: what needs torch or onnxruntime is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lfdm_export.errors import (
    BundleError,
    CheckpointError,
    EngineError,
    InputError,
    LfdmExportError,
    MissingDependencyError,
    ParityError,
)

if TYPE_CHECKING:
    from lfdm_export.bundle import Bundle
    from lfdm_export.checkpoints import load_model
    from lfdm_export.clip import Clip
    from lfdm_export.export import export_bundle
    from lfdm_export.pipeline import Pipeline

__version__ = "0.1.0"
__all__ = [
    "Bundle",
    "BundleError",
    "CheckpointError",
    "Clip",
    "EngineError",
    "InputError",
    "LfdmExportError",
    "MissingDependencyError",
    "ParityError",
    "Pipeline",
    "__version__",
    "export_bundle",
    "load_model",
]

_LAZY = {
    "Bundle": "lfdm_export.bundle",
    "Clip": "lfdm_export.clip",
    "Pipeline": "lfdm_export.pipeline",
    "export_bundle": "lfdm_export.export",
    "load_model": "lfdm_export.checkpoints",
}


def __getattr__(name: str) -> object:
    """Import a name of the interface on first use (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """All public names, loaded or not."""
    return sorted({*globals(), *__all__})
