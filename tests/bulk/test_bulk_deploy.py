"""The examples of `deploy/bulk` use only options that the command has."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from lfdm_export.bulk.run import Shard
from lfdm_export.cli import generate

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "bulk"


def test_the_indexed_job_covers_every_row_once():
    job = yaml.safe_load((FOLDER / "indexed-job.yaml").read_text(encoding="utf-8"))
    spec = job["spec"]
    assert (job["kind"], spec["completionMode"]) == ("Job", "Indexed")
    (container,) = spec["template"]["spec"]["containers"]
    assert container["command"] == ["lfdm-generate"]
    (variable,) = container["env"]
    source = variable["valueFrom"]["fieldRef"]["fieldPath"]
    assert source == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    shards = []
    for index in range(spec["completions"]):
        words = [word.replace(f"$({variable['name']})", str(index)) for word in container["args"]]
        args = generate._parser().parse_args(words)
        assert (args.bundle, args.jobs, args.out) == ("/bundle", "/jobs/jobs.csv", "/jobs/clips")
        shards.append(Shard.parse(args.shard))
    assert shards == [Shard(index, len(shards)) for index in range(len(shards))]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    assert {"/bundle", "/jobs"} <= set(mounts.values())


@pytest.mark.parametrize(("first", "task", "expected"), [(0, 3, "3/4"), (1, 1, "0/4")])
def test_the_slurm_array_covers_every_row_once(tmp_path: Path, first: int, task: int, expected: str):
    (tmp_path / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    variables = {
        "BUNDLE": "a bundle", "JOBS": "jobs.csv", "OUT": "out", "SLURM_ARRAY_TASK_ID": str(task),
        "SLURM_ARRAY_TASK_MIN": str(first), "SLURM_ARRAY_TASK_COUNT": "4",
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    script = FOLDER / "slurm-array.sh"
    done = subprocess.run(["bash", script], env=variables, capture_output=True, text=True, check=True)
    program, *words = done.stdout.splitlines()
    args = generate._parser().parse_args(words)
    assert (program, args.bundle, args.jobs, args.out) == ("lfdm-generate", "a bundle", "jobs.csv", "out")
    assert args.shard == expected
