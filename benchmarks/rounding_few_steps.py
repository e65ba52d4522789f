"""Errors of lower precisions at few steps, where rounding has fewer steps to heal in: bundles against one of fp32.

    python benchmarks/rounding_few_steps.py FP32 --with fp16/simulation=FOLDER --with int8/onnxruntime=FOLDER …
        [--plans ddim:1,ddim:2,ddim:4,ddim:10,tuned:4] [--characters 8] [--out FILE]

Every bundle is of the shipped model. The clips are the reference case of FP32, and one held-out character per label,
each from its own seed, the same in all bundles. PSNR compares unrounded frames with FP32's in ONNX Runtime.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine
from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.onnxruntime.target import ONNXRUNTIME
from lfdm_export.engines.targets import SIMULATION
from lfdm_export.errors import LfdmExportError
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.parity.simulate import simulate_bundle
from lfdm_export.reference.stored import Reference
from lfdm_models.training.procedural import HELD_OUT_SEEDS, sample_clip

Float32: TypeAlias = NDArray[np.float32]

_SEED = 100


@dataclass(frozen=True, eq=False)
class Case:
    """What one clip is made from."""

    image: NDArray[np.uint8]
    embedding: Float32
    seed: int


@dataclass(frozen=True, eq=False)
class Made:
    """A clip: its latent (1, 3, T, h, w), and its frames (1, 3, T, H, W) in [0, 1]."""

    latent: Float32
    frames: Float32


def cases(bundle: Bundle, characters: int) -> list[Case]:
    """The reference case of a bundle, and a held-out character for each of its first labels."""
    assert bundle.reference_path is not None
    manifest = bundle.manifest
    reference = Reference.load(
        bundle.reference_path, manifest.config, manifest.geometry, bundle.stages, manifest.provenance
    )
    found = [Case(reference.chain.image, reference.chain.embedding, reference.seed)]
    for index, label in enumerate(manifest.labels[:characters]):
        drawn = sample_clip(HELD_OUT_SEEDS[index], size=manifest.geometry.image_size, frames=2, label=label)
        found.append(Case(drawn.frames[0], bundle.embeddings[index], _SEED + index))
    return found


def make(pipe: Pipeline, case: Case, plan: str) -> Made:
    """The clip of a case by a plan, SAMPLER:STEPS."""
    sampler, _, steps = plan.partition(":")
    encoded = pipe.encode(case.image)
    eta = 1.0 if sampler == "ddim" else None
    latent = pipe.sample(encoded, case.embedding[None], sampler=sampler, steps=int(steps), eta=eta, seed=case.seed)
    return Made(latent, pipe.decode(encoded, latent)[0])


def errors(made: Sequence[Made], expected: Sequence[Made], image_size: int) -> dict[str, object]:
    """Of the first clip and of the others: PSNR of frames in dB, mean error of the flow, mean shift; both in pixels."""
    pairs = list(zip(made, expected, strict=True))
    psnr = [
        float(-10 * np.log10(max(np.square(one.frames - other.frames, dtype=np.float64).mean(), 1e-20)))
        for one, other in pairs
    ]
    flows = [(one.latent - other.latent)[0, :2].astype(np.float64) * image_size / 2 for one, other in pairs]
    drifts = [flow.mean(axis=(1, 2, 3)) for flow in flows]
    return {
        "reference_psnr": psnr[0],
        "psnr": psnr[1:],
        "flow_mean": [float(np.hypot(*flow).mean()) for flow in flows],
        "shift": [[float(x), float(y)] for x, y in drifts],
    }


def measure(
    exact: Bundle, others: Mapping[str, tuple[Bundle, str]], plans: Sequence[str], characters: int, threads: int | None
) -> Iterator[tuple[str, dict[str, dict[str, object]]]]:
    """The name of each contestant, and its errors by plan."""
    pipe = Pipeline(exact, threads=threads, target=ONNXRUNTIME.name, self_check=False)
    given = cases(exact, characters)
    expected = {plan: [make(pipe, case, plan) for case in given] for plan in plans}
    size = exact.manifest.geometry.image_size
    for name, (bundle, target) in others.items():
        pipe = Pipeline(bundle, threads=threads, target=target, self_check=False)
        yield name, {plan: errors([make(pipe, case, plan) for case in given], expected[plan], size) for plan in plans}


def table(found: Mapping[str, Mapping[str, Mapping[str, object]]]) -> Iterator[str]:
    """PSNR of the reference case, and the median and the worst of the characters, by plan, as a Markdown table."""
    plans = list(next(iter(found.values())))
    yield f"| | {' | '.join(plans)} |"
    yield f"|---|{'---|' * len(plans)}"
    for name, rows in found.items():
        cells = []
        for row in rows.values():
            others = np.array(row["psnr"])
            cells.append(f"{row['reference_psnr']:.1f}; {np.median(others):.1f}, {others.min():.1f} dB")
        yield f"| {name} | {' | '.join(cells)} |"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fp32", type=Path, metavar="FP32", help="a bundle of fp32 with a reference")
    parser.add_argument("--with", dest="others", action="append", required=True, metavar="NAME/TARGET=FOLDER",
                        help=f"a bundle to compare, and its target or {SIMULATION!r}")  # fmt: skip
    parser.add_argument("--plans", default="ddim:1,ddim:2,ddim:4,ddim:10,tuned:4", metavar="SAMPLER:STEPS,…")
    parser.add_argument("--characters", type=int, default=8, help="clips of characters, 1 to 8, one per label (8)")
    parser.add_argument("--threads", type=int, help="threads of each engine (all cores)")
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "rounding_few_steps.json", metavar="FILE")
    arguments = parser.parse_args()
    found: dict[str, dict[str, dict[str, object]]] = {}
    try:
        with tempfile.TemporaryDirectory(prefix="lfdm-few-steps-") as scratch:
            others = {}
            for index, given in enumerate(arguments.others):
                name, _, folder = given.partition("=")
                bundle, target = Bundle.open(folder), name.rpartition("/")[2]
                if target == SIMULATION:
                    bundle, target = simulate_bundle(bundle, Path(scratch) / str(index)), ONNXRUNTIME.name
                others[name] = bundle, target
            exact, plans = Bundle.open(arguments.fp32), arguments.plans.split(",")
            facts = {**machine.describe(), "seed": _SEED}
            for name, rows in measure(exact, others, plans, arguments.characters, arguments.threads):
                found[name] = rows
                machine.write_json(arguments.out, {**facts, "found": found})
                print(name, file=sys.stderr, flush=True)
    except LfdmExportError as error:
        print(f"rounding_few_steps: {error}", file=sys.stderr)
        return 1
    print("\n".join(table(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
