"""Generates the clips of jobs and records each result: shared by one process, several, and a cluster."""

from __future__ import annotations

import io
import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfdm_export.bulk.job import Job
from lfdm_export.bulk.records import FAILED, MADE, Record, content_of
from lfdm_export.bulk.sources import InTable, Stamp
from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.onnxruntime.target import Device
from lfdm_export.engines.targets import AUTO
from lfdm_export.errors import InputError
from lfdm_export.generate.arguments import embedding_rows, read_embedding
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.pictures.clip import Clip
from lfdm_export.pictures.metadata import clip_metadata
from lfdm_export.pictures.motion import Motion, read_motion
from lfdm_export.pictures.paste import Surroundings, read_surroundings
from lfdm_export.pictures.preprocess import prepare_image, read_stream, settled_crop
from lfdm_export.sampling.options import takes_both_branches
from lfdm_export.wording import describe_error

#: Key in a clip's metadata of the `job_key` of its job.
JOB = "job"


@dataclass(frozen=True)
class MakerSettings:
    """Settings of a worker.

    Attributes:
        bundle: path of the bundle, whose files are already verified.
        bundle_id: ID of the bundle, `lfdm_export.bundle.manifest.Manifest.bundle_id`.
        out: folder of the clips.
        target, device, threads: arguments of `lfdm_export.generate.pipeline.Pipeline.open`.
    """

    bundle: str
    bundle_id: str
    out: str
    target: str = AUTO
    device: Device = "cpu"
    threads: int | None = None


@dataclass(frozen=True, eq=False)
class _Ready:
    """A job and its inputs.

    Attributes:
        job: job of the clip.
        picture: (size, size, 3) uint8.
        surroundings: the photograph that the clip is put back into, or None.
        moved_by: an embedding (text_width,), a motion, or None.
        content: result of `content_of`.
        stamps: stamps of the sources.
    """

    job: Job
    picture: NDArray[np.uint8]
    surroundings: Surroundings | None
    moved_by: NDArray[np.float32] | Motion | None
    content: str
    stamps: tuple[Stamp, ...]


def job_key(digest: str, content: str) -> str:
    """Return the key of a clip: the job's digest and the digest of the content it reads."""
    return content_of([digest.encode(), content.encode()])


class Maker:
    """Generates clips with one pipeline. Not thread-safe."""

    def __init__(self, settings: MakerSettings, pipeline: Pipeline | None = None) -> None:
        """Use a pipeline, or open the bundle of the settings.

        Raises:
            BundleError: the bundle is missing or incomplete.
        """
        self._pipeline = pipeline or Pipeline.open(
            Bundle.open(settings.bundle, check_hashes=False),
            threads=settings.threads,
            device=settings.device,
            target=settings.target,
            self_check=settings.target == AUTO,
        )
        self._out = Path(settings.out)
        self._bundle_id = settings.bundle_id
        self._worker = f"{socket.gethostname()}:{os.getpid()}"

    def make(self, unit: Sequence[Job]) -> list[Record]:
        """Generate the clips of jobs of one `group` as a batch; existing clips are not written again.

        The record of a failed job holds the error. All clips are computed even if some exist, because the last bits
        depend on the batch.

        Raises:
            EngineError: an engine cannot be loaded.
            InputError: a clip cannot be written to disk.
        """
        began = time.monotonic()
        records: dict[str, Record] = {}
        ready: list[_Ready] = []
        for job in unit:
            stamps = tuple(source.stamp() for source in job.sources)
            read: list[bytes] = []
            try:
                ready.append(self._read(job, stamps, read))
            except Exception as error:  # noqa: BLE001 (one row must not stop the others)
                records[job.id] = self._record(job, content_of(read), stamps, error)
        missing = [one for one in ready if not self._is_there(one)]
        self._load_engines([one.job for one in missing])
        records.update({one.job.id: self._record(one.job, one.content, one.stamps) for one in ready})
        for one, clip in self._clips(ready) if missing else ():
            if isinstance(clip, Exception):
                records[one.job.id] = self._record(one.job, one.content, one.stamps, clip)
            elif one in missing:
                self._write(one, clip)
        share = (time.monotonic() - began) / len(unit)
        return [replace(records[job.id], seconds=round(share, 4), at=time.time()) for job in unit]

    def _load_engines(self, jobs: Sequence[Job]) -> None:
        """Load the engines first: an engine that fails to load must end the run, not fail single jobs."""
        defaults = self._pipeline.bundle.manifest.sampler
        stages = {"encode", "decode"} if jobs else set()
        for job in jobs:
            if job.condition != "motion":
                guided = takes_both_branches(job.settings.options.over(defaults).scale)
                stages.add("step_guided" if guided else "step")
        for stage in sorted(stages):
            self._pipeline.stages.engine(stage)

    def _read(self, job: Job, stamps: tuple[Stamp, ...], read: list[bytes]) -> _Ready:
        """Read and validate the inputs of a job; appends to `read` all content read so far."""
        if job.fault:
            raise InputError(job.fault)
        manifest = self._pipeline.bundle.manifest
        read += [source.read() for source in job.sources]
        content = content_of(read)
        raster = read_stream(io.BytesIO(read[0]), job.image.name)
        crop = None if job.settings.crop is None else settled_crop(raster, job.settings.crop)
        picture = prepare_image(raster, manifest.geometry.image_size, manifest.preprocessing, crop=crop)
        surroundings = read_surroundings(raster, crop) if job.settings.paste_back else None
        moved_by: NDArray[np.float32] | Motion | None = None
        if job.condition == "label":
            self._pipeline.bundle.label_index(job.value)
        elif job.condition == "motion":
            assert job.moved_by is not None
            moved_by = read_motion(io.BytesIO(read[1]), job.moved_by.name)
        elif job.condition == "embedding":
            assert job.moved_by is not None
            inside = isinstance(job.moved_by, InTable)
            values: Any = json.loads(read[1]) if inside else read_embedding(io.BytesIO(read[1]), job.moved_by.name)
            (moved_by,) = embedding_rows(values, manifest.geometry.text_width)
        return _Ready(job, picture, surroundings, moved_by, content, stamps)

    def _is_there(self, ready: _Ready) -> bool:
        """Whether the clip was written by a run that ended before it could record this."""
        path = self._out / ready.job.file
        if not path.is_file():
            return False
        try:
            return clip_metadata(path).get(JOB) == job_key(ready.job.digest(self._bundle_id), ready.content)
        except InputError:
            return False

    def _clips(self, ready: Sequence[_Ready]) -> list[tuple[_Ready, Clip | Exception]]:
        """Generate the clips as a batch; if the batch fails, one by one."""
        try:
            clip = self._together(ready)
        except Exception as error:  # noqa: BLE001 (one row must not stop the others)
            if len(ready) == 1:
                return [(ready[0], error)]
            return [found for one in ready for found in self._clips([one])]
        return [(one, clip.sample(index)) for index, one in enumerate(ready)]

    def _together(self, ready: Sequence[_Ready]) -> Clip:
        first, pictures = ready[0].job, np.stack([one.picture for one in ready])
        if isinstance(ready[0].moved_by, Motion):
            return self._pipeline.animate(pictures, ready[0].moved_by)
        values = [one.job.value for one in ready]
        return self._pipeline.generate(
            pictures,
            label=values if first.condition == "label" else None,
            text=values if first.condition == "text" else None,
            text_embedding=np.stack([one.moved_by for one in ready]) if first.condition == "embedding" else None,  # type: ignore[misc]
            seed=[one.job.seed for one in ready],
            **first.settings.options.given(),
        )

    def _write(self, ready: _Ready, clip: Clip) -> None:
        settings, job = ready.job.settings, ready.job
        told = {**clip.settings, JOB: job_key(job.digest(self._bundle_id), ready.content)}
        replace(clip, settings=told, surroundings=ready.surroundings).save(
            self._out / job.file, panels=settings.panels, fps=settings.fps, scale=settings.scale
        )

    def _record(self, job: Job, content: str, stamps: tuple[Stamp, ...], error: Exception | None = None) -> Record:
        return Record(
            id=job.id,
            state=MADE if error is None else FAILED,
            file=job.file,
            digest=job.digest(self._bundle_id),
            content=content,
            stamps=stamps,
            error="" if error is None else describe_error(error),
            worker=self._worker,
        )
