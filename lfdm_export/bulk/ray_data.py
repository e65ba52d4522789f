"""Bulk generation on a Ray cluster: jobs as a streamed dataset, one actor per GPU or per group of cores. Resumable."""

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

#: Address that starts a cluster on this machine for the time of the run.
LOCAL = "local"
#: Turns off Ray's usage statistics, progress bars and log lines.
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1", "RAY_BACKEND_LOG_LEVEL": "fatal"}
# Seconds within which a cluster must answer.
_PATIENCE = 10.0
# Most blocks of a dataset; each block is a task.
_MOST_BLOCKS = 20_000


def make_on_ray(
    settings: MakerSettings, units: Sequence[Sequence[Job]], *, address: str, workers: int
) -> Iterator[list[Record]]:
    """Run jobs on a Ray cluster; the folders of bundle, table and clips must exist on all of its machines.

    An actor that dies is restarted and its units are retried; clips that it had written are found.

    Args:
        settings: settings of each actor.
        units: batches of jobs.
        address: address of the cluster, such as "auto" or "ray://head:10001"; or `LOCAL`.
        workers: number of actors.

    Yields:
        The records of each unit, in order of completion.

    Raises:
        MissingDependencyError: Ray is not installed.
        EngineError: the cluster is unreachable, or has too few cores or GPUs.
        LfdmExportError: an actor cannot load an engine or write a clip.
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
            # One task per unit, up to the limit: an actor that dies then loses only one unit.
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
    """Actor that Ray calls with some units at a time; returns fatal errors, because Ray would hide them."""

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
        if host and port.isdigit():  # Ray itself would retry for minutes
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
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # progress is reported by `run_jobs`
    ray.data.DataContext.get_current().enable_progress_bars = False


def _check_room(ray: Any, workers: int, *, cores: int, gpus: bool) -> None:
    """Raise if the whole cluster has less than one actor needs; Ray would wait forever."""
    there = ray.cluster_resources()
    for found, wanted, noun in ((there.get("CPU", 0), cores, "core"), (there.get("GPU", 0), int(gpus), "GPU")):
        if wanted > found:
            raise EngineError(
                f"{count(workers, 'actor')} of {count(wanted, noun)} each does not fit the cluster, which has "
                f"{found:g}; say --threads, or start a larger one"
            )
