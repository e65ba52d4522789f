"""`config.pbtxt` of every model, built as Triton's protobuf message and written in protobuf's text format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lfdm_export.errors import InputError, MissingDependencyError
from lfdm_export.protocol.contract import (
    CLIP_MODEL,
    DECODE_MODEL,
    ENCODE_MODEL,
    MOTION_MODELS,
    STEP_MODELS,
    STREAM_MODEL,
    WireTensor,
)
from lfdm_export.protocol.model_facts import FACTS_PARAMETER, ModelFacts
from lfdm_export.serving.triton.interfaces import (
    ANY_GEOMETRY,
    DECODE_CHUNK_MODEL,
    ModelInterface,
    engine_interface,
    interfaces,
)
from lfdm_export.serving.triton.settings import ServingSettings
from lfdm_export.stages import Geometry, StageSpec, stage_specs

#: What runs encode and decode: a Python model of this project, or one of Triton's backends.
TritonEngine = Literal["python", "onnxruntime", "tensorrt"]
#: Name of the engine's file in a version's folder.
ENGINE_FILES: Mapping[TritonEngine, str] = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}
#: Parameter of `lfdm_decode`: the model that runs a chunk, if `lfdm_decode` does not run it itself.
DECODE_MODEL_PARAMETER = "decode_model"
#: Microseconds that encode or decode waits for requests of other clips to batch with.
_QUEUE_DELAY = 500


def model_configs(
    geometry: Geometry | None,
    settings: ServingSettings,
    *,
    facts: ModelFacts | None = None,
    engines: TritonEngine = "python",
) -> dict[str, Any]:
    """The configuration of every model of a repository.

    Args:
        geometry: geometry of the bundle; None leaves all sizes open, for any bundle.
        settings: settings of the models.
        facts: facts about the model for clients.
        engines: what runs encode and decode.

    Returns:
        `ModelConfig` messages by model name.

    Raises:
        InputError: Triton's backends cannot run the stages of models that keep clips on a device.
        MissingDependencyError: tritonclient is not installed.
    """
    if settings.on_device and engines != "python":
        raise InputError(f"engines is {engines!r}, expected 'python' for models that keep clips on a device")
    known = interfaces(geometry, on_device=settings.on_device)
    sizes = {} if geometry is None else _sizes(geometry)
    configs = {name: _python_config(known[name], sizes, settings) for name in (*STEP_MODELS, STREAM_MODEL)}
    configs[STREAM_MODEL].model_transaction_policy.decoupled = True
    if engines != "python":
        stages, exact = stage_specs(geometry or ANY_GEOMETRY), geometry is not None
        for name, stage in ((ENCODE_MODEL, stages["encode"]), (DECODE_CHUNK_MODEL, stages["decode"])):
            configs[name] = _engine_config(engine_interface(name, stage, exact=exact), stage, sizes, engines)
        _decode_on_gpu(configs[DECODE_MODEL])
    configs[CLIP_MODEL] = _ensemble_config(known, sizes, ensemble_steps(settings))
    if facts is not None:
        for name in (CLIP_MODEL, STREAM_MODEL):
            configs[name].parameters[FACTS_PARAMETER].string_value = facts.to_json()
    return configs


def ensemble_steps(settings: ServingSettings) -> tuple[str, ...]:
    """The models in the ensemble, in order."""
    return tuple(name for name in STEP_MODELS if not (settings.on_device and name in MOTION_MODELS))


def config_text(config: Any) -> str:
    """A configuration as the text of `config.pbtxt`."""
    from google.protobuf import text_format

    text: str = text_format.MessageToString(config, as_utf8=True)
    return text


def _sizes(geometry: Geometry) -> dict[str, int]:
    """Sizes of the contract's named axes, without those that vary per request."""
    return {
        "size": geometry.image_size,
        "frames": geometry.frames,
        "latent_size": geometry.latent_size,
        "text_width": geometry.text_width,
    }


def _python_config(interface: ModelInterface, sizes: Mapping[str, int], settings: ServingSettings) -> Any:
    """A Python model: one process; any batching is the model's own."""
    config = _config(interface, sizes)
    config.backend = "python"
    config.instance_group.add(count=1, kind=messages().ModelInstanceGroup.KIND_CPU)
    for name, value in settings.to_parameters().items():
        config.parameters[name].string_value = value
    return config


def _engine_config(interface: ModelInterface, stage: StageSpec, sizes: Mapping[str, int], engines: TritonEngine) -> Any:
    """A stage that one of Triton's backends runs, with requests of several clips in one batch."""
    config = _config(interface, sizes, batched=True)
    config.backend = engines
    config.max_batch_size = stage.batch[2]
    config.dynamic_batching.max_queue_delay_microseconds = _QUEUE_DELAY
    config.default_model_filename = ENGINE_FILES[engines]
    config.instance_group.add(count=1, kind=messages().ModelInstanceGroup.KIND_GPU)
    return config


def _decode_on_gpu(config: Any) -> None:
    """Let `lfdm_decode`, which calls the chunk model, leave tensors on the GPU."""
    config.parameters[DECODE_MODEL_PARAMETER].string_value = DECODE_CHUNK_MODEL
    config.parameters["FORCE_CPU_ONLY_INPUT_TENSORS"].string_value = "no"
    config.instance_group[0].kind = messages().ModelInstanceGroup.KIND_GPU


def _ensemble_config(known: Mapping[str, ModelInterface], sizes: Mapping[str, int], steps: Sequence[str]) -> Any:
    """The steps in order: an input comes from the earlier output of that name, else from the request."""
    clip = known[CLIP_MODEL]
    config = _config(clip, sizes)
    config.platform = "ensemble"
    from_request = {tensor.name for tensor in clip.inputs}
    wanted = {tensor.name for tensor in clip.outputs}
    wanted |= {tensor.name for name in steps for tensor in known[name].inputs}
    made: dict[str, str] = {}
    for name in steps:
        step = config.ensemble_scheduling.step.add(model_name=name, model_version=-1)
        for tensor in known[name].inputs:
            if tensor.name in made or tensor.name in from_request:
                step.input_map[tensor.name] = made.get(tensor.name, tensor.name)
        for tensor in known[name].outputs:
            if tensor.name in wanted:
                # A request's tensor and the output that a step computes from it need different names in the ensemble.
                made[tensor.name] = f"ready_{tensor.name}" if tensor.name in from_request else tensor.name
                step.output_map[tensor.name] = made[tensor.name]
    return config


def _config(interface: ModelInterface, sizes: Mapping[str, int], *, batched: bool = False) -> Any:
    config = messages().ModelConfig(name=interface.name)
    for tensor in interface.inputs:
        dims = _dims(tensor, sizes, batched=batched)
        config.input.add(name=tensor.name, data_type=_data_type(tensor), dims=dims, optional=tensor.optional)
    for tensor in interface.outputs:
        dims = _dims(tensor, sizes, batched=batched)
        config.output.add(name=tensor.name, data_type=_data_type(tensor), dims=dims)
    return config


def _data_type(tensor: WireTensor) -> int:
    value: int = messages().DataType.Value("TYPE_STRING" if tensor.datatype == "BYTES" else f"TYPE_{tensor.datatype}")
    return value


def _dims(tensor: WireTensor, sizes: Mapping[str, int], *, batched: bool) -> list[int]:
    """Axes as Triton writes them, -1 for open ones; without the batch axis if Triton adds it itself."""
    axes = tensor.shape[1:] if batched else tensor.shape
    return [sizes.get(axis, -1) if isinstance(axis, str) else axis for axis in axes]


def messages() -> Any:
    """Triton's protobuf messages for model configurations.

    Raises:
        MissingDependencyError: tritonclient is not installed.
    """
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise MissingDependencyError("tritonclient[grpc]", "writing a Triton model repository", "serve") from error
    return model_config_pb2
