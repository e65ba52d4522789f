"""Speed-up of lower precision on the CPU: clips of fp32, bf16 and int8 bundles, side by side in one process.

    python benchmarks/precision.py (--golden mug128 | --checkpoints LFAE DM) [--bundles DIR] [--rounds 5]

Rounds are interleaved (A B C, A B C, …) after a warm-up. Every clip is compared with PyTorch's clip of the untouched
networks from the same noise. Results go to benchmarks/results/precision.json, with a plot beside it (needs the extra
`bench`).
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import figures, machine, plots, subject
from benchmarks.latency import PARTS, clip_parser, make_task, parse, samples

if TYPE_CHECKING:
    from benchmarks.contestants import Contestant, Made, Task
    from lfdm_export.bundle.reader import Bundle
    from lfdm_models.model import LfdmModel

#: Name, precision of the bundle, and target of each contestant; ratios are against the first.
CONTESTANTS: Mapping[str, tuple[str, str]] = {
    "fp32, ONNX Runtime": ("fp32", "onnxruntime"),
    "fp32, OpenVINO": ("fp32", "openvino"),
    "fp32, PyTorch": ("fp32", "torch"),
    "bf16, OpenVINO": ("bf16", "openvino"),
    "bf16, PyTorch": ("bf16", "torch"),
    "int8, ONNX Runtime": ("int8", "onnxruntime"),
    "int8, OpenVINO": ("int8", "openvino"),
}


def main() -> int:
    """Measure and print."""
    arguments = _arguments()
    if arguments.isa:  # the libraries read it when loaded
        os.environ["ONEDNN_MAX_CPU_ISA"] = arguments.isa
    if not arguments.no_plot:
        figures.need_matplotlib()
    import torch

    from benchmarks import contestants
    from lfdm_export.checkpoints.load import load_model
    from lfdm_export.errors import LfdmExportError
    from lfdm_export.generate.pipeline import Pipeline

    torch.set_num_threads(arguments.threads)
    try:
        with subject.checkpoints(arguments) as pair, tempfile.TemporaryDirectory(prefix="lfdm-precision-") as folder:
            model = load_model(*pair)
            bundles, schedule = _bundles(model, arguments, Path(folder)), model.diffusion.schedule()
            task, warm_up = (make_task(schedule, next(iter(bundles.values())), steps) for steps in (arguments.steps, 1))
            expected = contestants.eager(model).make(task)
            del model
            racers = [
                contestants.Exported(
                    name, Pipeline(bundles[precision], threads=arguments.threads, target=target, self_check=False)
                )
                for name, (precision, target) in contestants_of(arguments).items()
            ]
            for racer in racers:
                racer.make(warm_up)
            facts = machine.at_start()
            seconds, errors = _measure(racers, task, expected, arguments.rounds)
    except LfdmExportError as error:
        print(f"precision: {error}", file=sys.stderr)
        return 1
    result: dict[str, Any] = {
        **facts,
        "settings": {
            name: getattr(arguments, name)
            for name in ("threads", "rounds", "frames", "image_size", "steps", "golden", "isa")
        },
        "found": _found(seconds, errors),
        "seconds": seconds,
    }
    machine.write_json(arguments.out, result)
    print("\n".join(table(result["found"])))
    if not arguments.no_plot:
        plots.plot_precision(result, arguments.out.with_suffix(".png"))
    return 0


def _arguments() -> argparse.Namespace:
    parser = clip_parser("Time clips of bundles of fp32, bf16 and int8 on the CPU.", "precision")
    parser.add_argument("--only", action="append", choices=CONTESTANTS, help="compare these; repeat for several (all)")
    parser.add_argument(
        "--bundles", type=Path, metavar="DIR", help="folder with bundles of these checkpoints: fp32, bf16 and int8; "
        "missing ones are exported into it (default: a temporary folder)",
    )  # fmt: skip
    parser.add_argument(
        "--isa", metavar="NAME", help="limit OpenVINO's instructions, by oneDNN's name: AVX512_CORE_BF16 excludes AMX"
    )
    return parse(parser)


def contestants_of(arguments: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """The requested contestants."""
    return {name: CONTESTANTS[name] for name in arguments.only or CONTESTANTS}


def _bundles(model: LfdmModel, arguments: argparse.Namespace, scratch: Path) -> dict[str, Bundle]:
    """A bundle of every required precision.

    Raises:
        InputError: an existing bundle has another size or precision.
    """
    from lfdm_export.bundle.reader import Bundle
    from lfdm_export.errors import InputError
    from lfdm_export.export.bundle_export import export_bundle

    folder = arguments.bundles or scratch
    wanted = arguments.frames, arguments.image_size
    bundles = {}
    for precision in dict.fromkeys(precision for precision, _ in contestants_of(arguments).values()):
        path = folder / precision
        if path.exists():
            bundle = Bundle.open(path)
        else:
            print(f"exporting {precision}", file=sys.stderr, flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            bundle = export_bundle(
                model, path, engine=precision, frames=wanted[0], image_size=wanted[1],
                drive=False, reference=False, torch_weights=(precision, "torch") in CONTESTANTS.values(),
            )  # fmt: skip
        manifest = bundle.manifest
        found = manifest.geometry.frames, manifest.geometry.image_size
        if (manifest.precision, found) != (precision, wanted):
            raise InputError(
                f"{path} is {manifest.precision} for {found[0]} frames of {found[1]} pixels, expected {precision} for "
                f"{wanted[0]} of {wanted[1]}; remove it"
            )
        bundles[precision] = bundle
    return bundles


def _measure(
    racers: Sequence[Contestant], task: Task, expected: Made, rounds: int
) -> tuple[dict[str, dict[str, list[float]]], dict[str, dict[str, float]]]:
    """Seconds of every contestant by part, in interleaved rounds, and its errors."""
    clips: dict[str, list[Made]] = {racer.name: [] for racer in racers}
    errors: dict[str, dict[str, float]] = {}
    for number in range(1, rounds + 1):
        for racer in racers:
            made = racer.make(task)
            clips[racer.name].append(made)
            # Every round makes the same clip.
            errors[racer.name] = clip_errors(made, expected)
            print(f"round {number}/{rounds}  {racer.name:20s} {made.clip:7.2f} s", file=sys.stderr, flush=True)
    return {name: samples(made) for name, made in clips.items()}, errors


def clip_errors(made: Made, expected: Made) -> dict[str, float]:
    """Errors of a clip: PSNR of frames in dB, end-point error of the flow in pixels, error of the latent."""
    square = float(np.square(made.frames - expected.frames, dtype=np.float64).mean())
    difference = made.latent.astype(np.float64) - expected.latent
    distance = np.hypot(difference[:, 0], difference[:, 1]) * made.frames.shape[-1] / 2
    return {
        "frames_psnr": -10 * math.log10(max(square, 1e-20)),
        "flow_mean": float(distance.mean()),
        "flow_99": float(np.quantile(distance, 0.99)),
        "latent_mean": float(np.abs(difference).mean()),
    }


def _found(
    seconds: Mapping[str, Mapping[str, Sequence[float]]], errors: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Medians, speed-up over the first contestant, and errors, by contestant."""
    first = next(iter(seconds.values()))
    found: dict[str, dict[str, float]] = {}
    for name, parts in seconds.items():
        medians = {part: statistics.median(parts[part]) for part in PARTS}
        ratios = {
            "ratio" if part == "clip" else f"ratio_{part}": statistics.median(first[part]) / medians[part]
            for part in PARTS
        }
        cores = {"cores": sum(parts["clip_cpu"]) / sum(parts["clip"])}
        found[name] = {**medians, **ratios, **cores, **errors[name]}
    return found


def table(found: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """Medians in seconds, speed-up over the first, and errors, as a Markdown table."""
    titles = ("encode", "step", "decode", "clip", "times as fast", "step", "decode", "frames", "flow, mean", "99%")
    yield f"| | {' | '.join(titles)} |"
    yield f"|---|{'---|' * len(titles)}"
    for name, one in found.items():
        cells = [f"{one[part]:.3f} s" for part in ("encode", "step", "decode")] + [f"{one['clip']:.2f} s"]
        cells += [f"{one[ratio]:.2f}" for ratio in ("ratio", "ratio_step", "ratio_decode")]
        cells += [f"{one['frames_psnr']:.1f} dB", f"{one['flow_mean']:.2g} px", f"{one['flow_99']:.2g} px"]
        yield f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
