"""Export of latent flow diffusion models (LFDM) to ONNX bundles, and generation of clips with them.

Examples:
    The model that comes with the package requires neither torch nor onnx:

    >>> from lfdm_export import Pipeline
    >>> pipeline = Pipeline("characters")
    >>> clip = pipeline.generate("face.png", label="nod", steps=10, seed=1)
    >>> paths = clip.save("nod.gif")

    Your own checkpoints are exported to a bundle first:

    >>> from lfdm_export import export_bundle, load_model
    >>> model = load_model("RegionMM_mug.pth", "flowdiff_mug.pth", dataset="mug")
    >>> bundle = export_bundle(model, "mug", dataset="mug")
    >>> paths = Pipeline(bundle).generate("face.jpg", label="happiness", seed=0).save("happiness.gif")

Importing the package is fast: torch and onnxruntime are imported on first use. The import turns off the telemetry of
these packages (see `lfdm_export.telemetry`).
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
from lfdm_export.telemetry import turn_off

if TYPE_CHECKING:
    from lfdm_export.bundle.reader import Bundle
    from lfdm_export.checkpoints.load import load_model
    from lfdm_export.export.bundle_export import export_bundle
    from lfdm_export.generate.pipeline import Pipeline
    from lfdm_export.pictures.clip import Clip
    from lfdm_export.pictures.motion import Motion

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
    "Motion",
    "ParityError",
    "Pipeline",
    "__version__",
    "export_bundle",
    "load_model",
]

turn_off()

_LAZY = {
    "Bundle": "lfdm_export.bundle.reader",
    "Clip": "lfdm_export.pictures.clip",
    "Motion": "lfdm_export.pictures.motion",
    "Pipeline": "lfdm_export.generate.pipeline",
    "export_bundle": "lfdm_export.export.bundle_export",
    "load_model": "lfdm_export.checkpoints.load",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562).

    Raises:
        AttributeError: the name does not exist.
        MissingDependencyError: the name requires a package that is not installed.
    """
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        from lfdm_export.dependencies import missing_dependency

        raise missing_dependency(error, f"lfdm_export.{name}", "export") or error from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List all public names, loaded or not."""
    return sorted({*globals(), *__all__})
