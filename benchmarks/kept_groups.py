"""The error that each group of nodes causes in fp16 or bf16, from simulated whole clips with it kept in float32 or not.

    python benchmarks/kept_groups.py BUNDLE [--precision bf16] [--groups NAME …] [--out results/kept_groups.json]

BUNDLE has precision fp32 and a reference. Each row is a clip of 10 steps with newly typed graphs, simulated in float32,
compared with the reference's PyTorch clip.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lfdm_export.bundle.reader import EMBEDDINGS, ONNX_FOLDER, REFERENCE, Bundle
from lfdm_export.bundle.writer import BundleWriter
from lfdm_export.files.atomic import write_file
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.graphs import trace
from lfdm_export.graphs.policy import GROUPS, KEPT
from lfdm_export.graphs.typed import TYPES, LowPrecision, lower
from lfdm_export.parity.chain import check_chain
from lfdm_export.parity.simulate import simulate
from lfdm_export.reference.stored import Reference

#: The stages of a clip.
STAGES = ("encode", "step", "decode")
#: Columns: the check's subject, and the column's title.
COLUMNS = {
    "frames, PSNR": "frames, dB",
    "warped, PSNR": "warped, dB",
    "flow, mean error": "flow, px",
    "latent, mean error": "latent, mean",
    "latent, largest error": "latent, largest",
}
#: Further columns: decoding alone, from PyTorch's latent.
ALONE = ("frames of PyTorch's latent, dB", "warped, of PyTorch's latent, dB")


def coordinates(node: ir.Node) -> bool:
    """Select sampling grids and occlusion at both sizes; values that no weights touch stay float32 anyway."""
    return node.op_type == "Resize" or (node.name or "").endswith("/cat")


def update(node: ir.Node) -> bool:
    """Select the outputs of a step: the next latent and history."""
    return any(value.is_graph_output() for value in node.outputs)


@dataclasses.dataclass(frozen=True)
class Row:
    """One clip: groups kept in float32, further nodes that are rounded, and the stages affected."""

    name: str
    kept: frozenset[str]
    also: Callable[[ir.Node], bool] | None = None
    stages: tuple[str, ...] = STAGES


def rows(names: Collection[str]) -> Iterator[Row]:
    """The policy itself, then the policy with one group changed at a time."""
    yield Row("the policy", KEPT)
    yield Row("coordinates and occlusion lowered", KEPT, coordinates, ("decode",))
    yield Row("latent between steps lowered", KEPT, update, ("step",))
    for name in names:
        if name == "sampler":  # its arithmetic has no form in lower precision; see the row above
            continue
        yield Row(f"{name} lowered", KEPT - {name}) if name in KEPT else Row(f"{name} kept", KEPT | {name})


def measure(bundle: Bundle, reference: Reference, precision: LowPrecision, row: Row) -> dict[str, float]:
    """Errors of one clip, by column."""
    with tempfile.TemporaryDirectory(prefix="lfdm-groups-") as scratch:
        simulated = _simulated(bundle, precision, row, Path(scratch))
        chain = reference.chain
        result = check_chain(simulated, chain, reference.seed, None, None)
        pipe = Pipeline(simulated)
        decoded = pipe.decode(pipe.encode(chain.image), chain.latents[-1][None])
    found = {check.subject: check.found for check in result.checks}
    errors = {title: value for subject, title in COLUMNS.items() if (value := found.get(subject)) is not None}
    for title, images, expected in zip(ALONE, decoded, (chain.kept_frames, chain.kept_warped), strict=True):
        square = (images[0].transpose(1, 0, 2, 3)[chain.kept].astype(np.float64) - expected) ** 2
        errors[title] = -10 * math.log10(max(float(square.mean()), 1e-12))
    return errors


def _simulated(bundle: Bundle, precision: LowPrecision, row: Row, scratch: Path) -> Bundle:
    with BundleWriter(scratch / "bundle") as writer:
        folder = writer.folder / ONNX_FOLDER
        for stage in bundle.stages:
            if stage not in STAGES:  # not loaded
                (folder / f"{stage}.onnx").touch()
                continue
            typed = lower(ir.load(bundle.stage_path(stage)), precision, kept=row.kept)
            trace.save({stage: typed}, scratch, "typed.data")
            also = row.also if stage in row.stages else None
            trace.save({stage: simulate(scratch / f"{stage}.onnx", precision, also=also)}, folder, f"{stage}.data")
        for name in (EMBEDDINGS, REFERENCE):
            shutil.copy(bundle.path / name, writer.folder / name)
        return writer.finish(bundle.manifest)


def table(found: dict[str, dict[str, float]]) -> str:
    """The rows as a Markdown table."""
    titles = (*COLUMNS.values(), *ALONE)
    lines = [f"| | {' | '.join(titles)} |", f"|---|{'---|' * len(titles)}"]
    for name, errors in found.items():
        lines.append(f"| {name} | {' | '.join(f'{errors[title]:.3g}' for title in titles)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", choices=list(TYPES), default="bf16")
    parser.add_argument(
        "--groups", nargs="*", choices=list(GROUPS), help="only these groups (default: all of a clip's stages)"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle, check_hashes=False)
    if bundle.manifest.precision != "fp32" or bundle.reference_path is None:
        parser.error("the bundle must have precision fp32 and contain a reference")
    manifest = bundle.manifest
    reference = Reference.load(
        bundle.reference_path, manifest.config, manifest.geometry, bundle.stages, manifest.provenance
    )
    nodes = [node for stage in STAGES for node in ir.load(bundle.stage_path(stage)).graph]
    present = [name for name, group in GROUPS.items() if any(group.has(node) for node in nodes)]
    found: dict[str, dict[str, float]] = {}
    for row in rows(present if arguments.groups is None else arguments.groups):
        found[row.name] = measure(bundle, reference, arguments.precision, row)
        print(row.name, {title: f"{value:.3g}" for title, value in found[row.name].items()}, flush=True)
    print(table(found))
    if arguments.out is not None:
        frames = bundle.manifest.geometry.frames
        facts = {"precision": arguments.precision, "frames": frames, "seed": reference.seed, "rows": found}
        write_file(arguments.out, (json.dumps(facts, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
