"""Writes a Triton model repository for a bundle: configurations, thin `model.py` files, engines."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from lfdm_export.bundle.reader import Bundle
from lfdm_export.errors import ExportError
from lfdm_export.files.atomic import rehearse, temporary_folder
from lfdm_export.files.folders import publish
from lfdm_export.files.names import user_path
from lfdm_export.files.places import destination
from lfdm_export.protocol.contract import (
    CLIP_MODEL,
    CONDITION_MODEL,
    DECODE_MODEL,
    ENCODE_MODEL,
    PREPROCESS_MODEL,
    SAMPLE_MODEL,
    STREAM_MODEL,
)
from lfdm_export.protocol.model_facts import ModelFacts
from lfdm_export.serving.triton.config import TritonEngine, config_text, model_configs
from lfdm_export.serving.triton.engine_files import VERSION, place_engines
from lfdm_export.serving.triton.settings import ServingSettings
from lfdm_export.stages import Geometry

#: The class behind each Python model.
_CLASSES: Mapping[str, str] = {
    PREPROCESS_MODEL: "preprocess.PreprocessModel",
    CONDITION_MODEL: "condition.ConditionModel",
    ENCODE_MODEL: "encode.EncodeModel",
    SAMPLE_MODEL: "sample.SampleModel",
    DECODE_MODEL: "decode.DecodeModel",
    STREAM_MODEL: "stream.StreamModel",
}
#: Path of a bundle inside a repository: Triton treats every top-level folder as a model, and in a model's folder
#: reads only the configuration and the versions.
BUNDLE_PLACE = f"{SAMPLE_MODEL}/bundle"
#: Keeps the empty folder of the ensemble's version in Git.
_PLACEHOLDER = ".gitkeep"


def write_repository(
    bundle: Bundle,
    target: str | os.PathLike[str],
    *,
    settings: ServingSettings | None = None,
    engines: TritonEngine = "python",
    copy_bundle: bool = True,
) -> Path:
    """Write a repository that serves one bundle, with its exact shapes.

    Args:
        bundle: the bundle to serve.
        target: folder of the repository; an earlier repository is replaced.
        settings: settings of the models; `bundle` is set here.
        engines: what runs encode and decode: "python" for this project's Python models, which run everywhere;
            "onnxruntime" or "tensorrt" for Triton's backends of NVIDIA's container, with the bundle's graphs or plans.
        copy_bundle: copy the bundle into the repository, so that it can be moved; else refer to the bundle's path.

    Returns:
        The repository's path.

    Raises:
        ExportError: something else is at `target`, or it cannot be written.
        EngineError: for "tensorrt": the bundle has no plans of its own graphs that run without this program.
        MissingDependencyError: tritonclient is not installed.
    """
    place = BUNDLE_PLACE if copy_bundle else str(bundle.path.resolve())
    settings = replace(settings or ServingSettings(), bundle=place)
    manifest = bundle.manifest

    require_apart(bundle.path, target)

    def fill(folder: Path) -> None:
        _write_models(folder, manifest.geometry, settings, ModelFacts.of(manifest), engines)
        if engines != "python":
            place_engines(bundle, engines, folder)
        if copy_bundle:
            shutil.copytree(bundle.path, folder / BUNDLE_PLACE)

    return _write(target, fill)


def write_open_repository(target: str | os.PathLike[str]) -> Path:
    """Write a repository with open sizes for any bundle, which the environment variable LFDM_BUNDLE names.

    Raises:
        ExportError: something else is at `target`, or it cannot be written.
        MissingDependencyError: tritonclient is not installed.
    """
    return _write(target, lambda folder: _write_models(folder, None, ServingSettings(), None, "python"))


def require_apart(bundle: str | os.PathLike[str], repository: str | os.PathLike[str]) -> None:
    """Refuse a repository that is, contains or is inside the bundle that it serves, or that cannot be written.

    Raises:
        ExportError: one folder is inside the other, or the repository's place holds something else or is not writable.
    """
    here, there = user_path(bundle).resolve(), user_path(repository).resolve()
    if there == here or here in there.parents or there in here.parents:
        raise ExportError(
            f"the repository {there} and the bundle {here} must not contain each other; choose another folder"
        )
    _require_own(user_path(repository))
    try:
        rehearse(repository, as_folder=True)
    except OSError as error:
        raise ExportError(f"the repository {there} cannot be written: {error.strerror or error}") from error


def _require_own(target: Path) -> None:
    if target.exists() and not (target / CLIP_MODEL / "config.pbtxt").is_file() and not _is_empty_folder(target):
        raise ExportError(f"{target} exists and is not a model repository of this program; choose another folder")


def _write(path: str | os.PathLike[str], fill: Callable[[Path], None]) -> Path:
    """Fill a folder beside the target, and move it to the target."""
    target = user_path(path)
    _require_own(target)
    try:
        place = destination(target).path
        with temporary_folder(place) as part:
            fill(part)
            publish(part, place)
    except OSError as error:
        raise ExportError(f"the repository {target} cannot be written: {error.strerror or error}") from error
    return target


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _write_models(
    folder: Path, geometry: Geometry | None, settings: ServingSettings, facts: ModelFacts | None, engines: TritonEngine
) -> None:
    """Write every model's folder: its configuration and its only version."""
    for name, config in model_configs(geometry, settings, facts=facts, engines=engines).items():
        version = folder / name / VERSION
        version.mkdir(parents=True)
        (folder / name / "config.pbtxt").write_text(config_text(config), encoding="utf-8")
        if config.backend == "python":
            module, class_name = _CLASSES[name].split(".")
            text = f"from lfdm_export.serving.models.{module} import {class_name} as TritonPythonModel  # noqa: F401\n"
            (version / "model.py").write_text(text, encoding="utf-8")
        elif name == CLIP_MODEL:
            (version / _PLACEHOLDER).touch()
