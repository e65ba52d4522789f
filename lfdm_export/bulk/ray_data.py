"""The same jobs as a Ray dataset: an actor per some cores or per GPU, streamed, and gone on with like any other run."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

from lfdm_export.bulk.job import Job
from lfdm_export.bulk.maker import Maker, MakerSettings
from lfdm_export.bulk.records import Record
from lfdm_export.errors import EngineError, LfdmExportError, MissingDependencyError
from lfdm_export.files.json_codec import from_plain, to_plain
from lfdm_export.machine import available_cores

#: The address of a cluster that is started here, and ends with the run.
LOCAL = "local"
#: What Ray does of its own accord and nobody requested.
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1", "RAY_BACKEND_LOG_LEVEL": "fatal"}
# Blocks of a dataset, each of which is a task.
_MOST_BLOCKS = 20_000


def make_on_ray(
    settings: MakerSettings, units: Sequence[Sequence[Job]], *, address: str, workers: int
) -> Iterator[list[Record]]:
    """Make jobs on a Ray cluster; the folders of bundle, table and clips must be there on all of its machines.

    An actor that dies is started again, and what it was at is tried again; clips that it had written are found.

    Args:
        settings: of each actor.
        units: jobs that are made together.
        address: of the cluster, such as "auto" or "ray://head:10001"; or `LOCAL`.
        workers: actors.

    Yields:
        The records of each unit, in the order in which they come.

    Raises:
        MissingDependencyError: Ray is not installed.
        EngineError: the cluster cannot be reached, or has too few cores or GPUs.
        LfdmExportError: see `Maker.make`.
    """
    if not units:
        return
    ray = _import_ray()
    ours = not ray.is_initialized()
    cores = settings.threads or available_cores()
    try:
        if ours:
            _connect(ray, address)
        rows = ray.data.from_items(
            [{"unit": json.dumps([to_plain(job) for job in unit])} for unit in units],
            # One task per unit, as far as Ray takes so many: what an actor was at when it died is then one unit.
            override_num_blocks=min(len(units), _MOST_BLOCKS),
        )
        made = rows.map_batches(
            _Actor,
            fn_constructor_kwargs={"settings": settings},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=cores if settings.device == "cpu" else 1,
            num_gpus=0 if settings.device == "cpu" else 1,
        )
        for row in made.iter_rows():
            yield [_record(plain) for plain in json.loads(row["records"])]
    except ray.exceptions.RayError as error:
        raise _told(error) from error
    finally:
        if ours:
            ray.shutdown()


class _Actor:
    """What Ray calls with one unit at a time."""

    def __init__(self, settings: MakerSettings) -> None:
        self._maker = Maker(settings)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        units = [[from_plain(Job, plain, "job") for plain in json.loads(str(text))] for text in batch["unit"]]
        return {"records": [json.dumps([to_plain(record) for record in self._maker.make(unit)]) for unit in units]}


def _record(plain: object) -> Record:
    record = Record.from_json(json.dumps(plain))
    assert record is not None, "our own actors wrote it"
    return record


def _import_ray() -> Any:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise MissingDependencyError(error.name or "ray", "--ray", "bulk") from error
    return ray


def _connect(ray: Any, address: str) -> None:
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level="ERROR",
            include_dashboard=False if address == LOCAL else None,
            num_cpus=available_cores() if address == LOCAL else None,
        )
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise EngineError(
            f"the Ray cluster at {address!r} cannot be reached ({str(error).splitlines()[0]}); start one with "
            "`ray start --head`, or leave the address out for one of this machine alone"
        ) from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its progress is told as ours
    ray.data.DataContext.get_current().enable_progress_bars = False


def _told(error: BaseException) -> LfdmExportError:
    """What an actor raised on purpose, or Ray's own words."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, LfdmExportError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    return EngineError(f"Ray: {str(error).strip().splitlines()[-1][:300]}")
