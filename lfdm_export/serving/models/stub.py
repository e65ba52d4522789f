"""Between the models and Triton's Python backend: settings, tensors, errors, and a check that arrays arrive intact."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import triton_python_backend_utils as pb_utils

from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.onnxruntime.target import Device
from lfdm_export.errors import EngineError, InputError, LfdmExportError
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.protocol.contract import Array, OverloadedError, RequestCancelledError
from lfdm_export.serving.triton.interfaces import ModelInterface, interfaces
from lfdm_export.serving.triton.settings import ServingSettings
from lfdm_export.stages import BATCH

#: Maps one request's input tensors to output tensors, by name.
Function = Callable[[Mapping[str, Array]], Mapping[str, Array]]


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model's settings, pipeline and interface.

    Attributes:
        settings: settings from the model's configuration.
        parameters: all string parameters of the configuration.
        pipeline: pipeline of the bundle.
        interface: the model's inputs and outputs.
    """

    settings: ServingSettings
    parameters: Mapping[str, str]
    pipeline: Pipeline
    interface: ModelInterface


def load(args: Mapping[str, str]) -> Loaded:
    """Read a model's configuration and open the bundle; its engines are not loaded yet.

    Args:
        args: the argument of `initialize`.

    Raises:
        LfdmExportError: the backend changes arrays, or the bundle cannot be opened.
    """
    _end_with_server()
    check_arrays()
    config = json.loads(args["model_config"])
    parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
    settings = ServingSettings.from_parameters(parameters)
    # `model_repository` is the folder of this model.
    folder = settings.bundle_folder(Path(args["model_repository"]).parent)
    # Hashes were checked when the repository was written; here each model would read all weights again.
    bundle = Bundle.open(folder, check_hashes=False)
    pipeline = Pipeline.open(
        bundle,
        threads=settings.threads or None,
        device=cast(Device, settings.device),
        target=settings.target,
        self_check=settings.self_check,
    )
    known = interfaces(bundle.manifest.geometry, on_device=settings.on_device)
    return Loaded(settings, parameters, pipeline, known[args["model_name"]])


def _end_with_server() -> None:
    """End this process when the server is gone, which the backend does not always notice."""
    server = os.getppid()

    def watch() -> None:
        while os.getppid() == server:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, name="lfdm-server-watch", daemon=True).start()


def check_arrays() -> None:
    """Pass an array through the backend and back.

    A backend built with an older pybind11 returns wrong values under NumPy 2, without an error.

    Raises:
        EngineError: the array comes back changed.
    """
    sent = np.arange(1.0, 5.0, dtype=np.float32)
    # Through a capsule of the backend itself: it hangs on one of NumPy 1.26.
    got = pb_utils.Tensor.from_dlpack("check", pb_utils.Tensor("check", sent).to_dlpack()).as_numpy()
    if got.shape != sent.shape or got.dtype != sent.dtype or not (got == sent).all():
        raise EngineError(
            f"Triton's Python backend does not work with NumPy {np.__version__}: it turned {sent} into {got}; "
            "serve with lfdm-serve, which gives the models a NumPy that the server can use, or take a newer server"
        )


def inputs(request: Any, interface: ModelInterface) -> dict[str, Array]:
    """A request's input tensors as arrays, by name.

    Raises:
        InputError: a tensor has several rows: limits count requests, so each must be one clip.
    """
    found = {}
    for spec in interface.inputs:
        tensor = pb_utils.get_input_tensor_by_name(request, spec.name)
        if tensor is None:
            continue
        found[spec.name] = tensor.as_numpy()
        if spec.shape[:1] == (BATCH,) and len(found[spec.name]) != 1:
            raise InputError(f"{spec.name} has {len(found[spec.name])} rows, expected 1; send a request for each")
    return found


def response(tensors: Mapping[str, Array], requested: Iterable[str]) -> Any:
    """A response with the requested tensors."""
    names = set(requested)
    return pb_utils.InferenceResponse(
        [pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in tensors.items() if name in names]
    )


def failure(error: Exception, *, stream: bool = False) -> Any:
    """The response for an error; an unexpected error is logged with its traceback.

    Args:
        error: the error.
        stream: put the status into the message, as ``[INVALID_ARGUMENT] …``: Triton's streams do not send it.
    """
    code, status, message = pb_utils.TritonError.INTERNAL, "INTERNAL", str(error)
    if isinstance(error, InputError):
        code, status = pb_utils.TritonError.INVALID_ARG, "INVALID_ARGUMENT"
    elif isinstance(error, OverloadedError):
        code, status = pb_utils.TritonError.UNAVAILABLE, "UNAVAILABLE"
    elif isinstance(error, RequestCancelledError):
        code, status = pb_utils.TritonError.CANCELLED, "CANCELLED"
    elif not isinstance(error, LfdmExportError):
        message = f"{type(error).__name__}: {error} (a fault of the server: see its log)"
        log_error(error)
    if stream:
        message = f"[{status}] {message}"
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def log_error(error: BaseException) -> None:
    """Write an error with its traceback into the server's log."""
    import traceback

    pb_utils.Logger.log_error("".join(traceback.format_exception(error)))


def answer_each(requests: Sequence[Any], interface: ModelInterface, function: Function) -> list[Any]:
    """Answer requests one by one, so that a failed one does not affect the others."""
    answers = []
    for request in requests:
        try:
            if request.is_cancelled():
                raise RequestCancelledError("the request was cancelled")
            answers.append(response(function(inputs(request, interface)), request.requested_output_names()))
        except Exception as error:  # noqa: BLE001 (each request has its own answer)
            answers.append(failure(error))
    return answers


def custom_parameters(request: Any) -> dict[str, object]:
    """The custom parameters of a request."""
    text = request.parameters()
    found: dict[str, object] = json.loads(text) if text else {}
    return found


def deadline(request: Any) -> float | None:
    """When the request's timeout ends, in seconds of `time.monotonic`; None without a timeout."""
    microseconds: int = request.timeout()
    return time.monotonic() + microseconds / 1e6 if microseconds else None
