"""Plans and graphs for Triton's own backends: copied from a bundle, and compared with it before they are served."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from lfdm_export.bundle.reader import ONNX_FOLDER, Bundle, fingerprint, onnx_path
from lfdm_export.engines.cuda_driver import Gpu, find_gpus
from lfdm_export.engines.tensorrt.plan_checks import check_plan_alone
from lfdm_export.engines.tensorrt.plans import PlanFolder
from lfdm_export.engines.tensorrt.target import TENSORRT
from lfdm_export.errors import EngineError
from lfdm_export.graphs.file import read_graph
from lfdm_export.protocol.contract import ENCODE_MODEL
from lfdm_export.serving.triton.config import ENGINE_FILES, TritonEngine
from lfdm_export.serving.triton.interfaces import DECODE_CHUNK_MODEL

#: The only version of every model.
VERSION = "1"
#: Stages that Triton's backends may run, by the model that runs them.
_STAGES: Mapping[str, str] = {ENCODE_MODEL: "encode", DECODE_CHUNK_MODEL: "decode"}
#: The record beside a plan; Triton reads only the configured file of a version's folder.
_RECORD = "model.json"


def place_engines(bundle: Bundle, engines: TritonEngine, repository: Path) -> None:
    """Copy plans with their records, or graphs with their weights, into the models' folders.

    Args:
        bundle: a bundle whose files have been checked.
        engines: "onnxruntime" or "tensorrt".
        repository: a repository that has the models' folders.

    Raises:
        EngineError: the bundle has no plan, or none that another program can run.
        OSError: a file cannot be copied.
    """
    for model, stage in _STAGES.items():
        folder = repository / model / VERSION
        if engines == "tensorrt":
            plans = PlanFolder(bundle.path, TENSORRT.name)
            check_plan_alone(bundle, stage, TENSORRT.name, plans.plan(stage), plans.record_path(stage))
            files = {plans.plan(stage): ENGINE_FILES[engines], plans.record_path(stage): _RECORD}
        else:
            graph = bundle.stage_path(stage)
            files = {graph: ENGINE_FILES[engines]} | {graph.parent / name: name for name in _weights(graph)}
        for source, name in files.items():
            shutil.copyfile(source, folder / name)
        _check(bundle, stage, engines, folder, gpus=())


def check_engines(bundle: Bundle, repository: Path) -> None:
    """Check that the files of Triton's backends belong to the bundle and fit this machine's GPUs.

    Args:
        bundle: the bundle that the repository's other models serve.
        repository: the repository that Triton loads.

    Raises:
        EngineError: they do not; the message says what to do.
    """
    for model, stage in _STAGES.items():
        folder = repository / model / VERSION
        for engines, name in ENGINE_FILES.items():
            if (folder / name).is_file():  # else another backend runs that model
                try:
                    _check(bundle, stage, engines, folder, gpus=find_gpus()[0])
                except EngineError as error:
                    raise EngineError(f"{error}, then write the repository again") from error


def _check(bundle: Bundle, stage: str, engines: TritonEngine, folder: Path, *, gpus: Collection[Gpu]) -> None:
    """Compare copies with their originals."""
    engine = folder / ENGINE_FILES[engines]
    if engines == "tensorrt":
        check_plan_alone(bundle, stage, TENSORRT.name, engine, folder / _RECORD, gpus)
        return
    files = bundle.manifest.files
    copies = {onnx_path(stage): engine} | {f"{ONNX_FOLDER}/{name}": folder / name for name in _weights(engine)}
    for name, copy in copies.items():
        if name not in files or not copy.is_file() or fingerprint(copy) != files[name]:
            raise EngineError(f"{copy} is not the {name} of the bundle {bundle.path}: export again")


def _weights(graph: Path) -> list[str]:
    """Names of the files beside a graph that hold its weights."""
    return sorted({data.location for data in read_graph(graph).external})
