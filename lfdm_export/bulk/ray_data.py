"""The same jobs as a Ray dataset: an actor per some cores or per GPU, streamed, and gone on with like any other run."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from typing import Any

from lfdm_export.bulk.job import Job
from lfdm_export.bulk.maker import Maker, MakerSettings
from lfdm_export.bulk.records import Record
from lfdm_export.errors import EngineError, LfdmExportError, MissingDependencyError
from lfdm_export.files.json_codec import from_plain, to_plain
from lfdm_export.machine import available_cores
from lfdm_export.wording import count, describe_error

#: The address of a cluster that is started here, and ends with the run.
LOCAL = "local"
#: What Ray does of its own accord and nobody requested.
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1", "RAY_BACKEND_LOG_LEVEL": "fatal"}
# Seconds in which a cluster must answer.
_PATIENCE = 10.0
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
        _check_room(ray, workers, cores=cores if settings.device == "cpu" else 1, gpus=settings.device != "cpu")
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
            answer = json.loads(row["answer"])
            if isinstance(answer, str):
                raise LfdmExportError(answer)
            yield [_record(plain) for plain in answer]
    except ray.exceptions.RayError as error:
        raise EngineError(f"Ray: {str(error).strip().splitlines()[-1][:300]}") from error
    finally:
        if ours:
            ray.shutdown()


class _Actor:
    """What Ray calls with some units at a time; what ends the run it answers, because Ray would hide it."""

    def __init__(self, settings: MakerSettings) -> None:
        self._settings = settings
        self._maker: Maker | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        return {"answer": [json.dumps(self._answer(json.loads(str(text)))) for text in batch["unit"]]}

    def _answer(self, unit: list[object]) -> list[object] | str:
        try:
            self._maker = self._maker or Maker(self._settings)
            return [to_plain(record) for record in self._maker.make([from_plain(Job, job, "job") for job in unit])]
        except LfdmExportError as error:
            return describe_error(error)


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
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdigit():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=_PATIENCE).close()
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level="ERROR",
            include_dashboard=False if address == LOCAL else None,
            num_cpus=available_cores() if address == LOCAL else None,
        )
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise EngineError(
            f"the Ray cluster at {address!r} cannot be reached ({str(error).splitlines()[0]}); start one with "
            "`ray start --head`, or leave the address out for one of this machine alone"
        ) from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its progress is told as ours
    ray.data.DataContext.get_current().enable_progress_bars = False


def _check_room(ray: Any, workers: int, *, cores: int, gpus: bool) -> None:
    """Refuse what would wait for ever: the whole cluster has less than one actor needs."""
    there = ray.cluster_resources()
    for found, wanted, noun in ((there.get("CPU", 0), cores, "core"), (there.get("GPU", 0), int(gpus), "GPU")):
        if wanted > found:
            raise EngineError(
                f"{count(workers, 'actor')} of {count(wanted, noun)} each does not fit the cluster, which has "
                f"{found:g}; say --threads, or start a larger one"
            )
