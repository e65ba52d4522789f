"""Plans and graphs that Triton's own backends run: copied out of a bundle, and compared with it before they serve."""

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

#: The one version of every model.
VERSION = "1"
#: Stages that an engine of Triton may run, by the model that is that engine.
_STAGES: Mapping[str, str] = {ENCODE_MODEL: "encode", DECODE_CHUNK_MODEL: "decode"}
#: The record of a plan, beside it; Triton looks at nothing in a version's folder but the file that it is told.
_RECORD = "model.json"


def place_engines(bundle: Bundle, engines: TritonEngine, repository: Path) -> None:
    """Put plans with their records, or graphs with the weights beside them, where Triton looks for its models.

    Args:
        bundle: whose files were found whole.
        engines: "onnxruntime" or "tensorrt".
        repository: its models' folders are there.

    Raises:
        EngineError: there is no plan, or none that another program can run.
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
    """See that what Triton's backends were given is still of the bundle, and for the GPUs that are here.

    Args:
        bundle: that the other models of the repository serve.
        repository: which Triton loads.

    Raises:
        EngineError: it is not; the message says what to do.
    """
    for model, stage in _STAGES.items():
        folder = repository / model / VERSION
        for engines, name in ENGINE_FILES.items():
            if (folder / name).is_file():  # else another backend serves that model
                try:
                    _check(bundle, stage, engines, folder, gpus=find_gpus()[0])
                except EngineError as error:
                    raise EngineError(f"{error}, then write the repository again") from error


def _check(bundle: Bundle, stage: str, engines: TritonEngine, folder: Path, *, gpus: Collection[Gpu]) -> None:
    """Compare copies with what they were copied from."""
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
