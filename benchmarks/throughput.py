"""Load on a running server over gRPC: step-level batching compared with one clip at a time and whole-clip batching.

    python benchmarks/throughput.py [--bundle DIR] [--seconds 25]
    python benchmarks/throughput.py --soak 10

Starts one `lfdm-serve` per contestant (`--contestants POLICY:SLOTS …`) and puts the same load on each in turn, cell by
cell, so that disturbances affect all equally: the same arrivals, photographs, labels, seeds, samplers and numbers of
steps. Every answer is compared with the clip that the pipeline makes in this process; a wrong one ends the program with
status 1.

- step costs: time of a step in this process, by batch size;
- overhead: a single clip of many steps, alternately over gRPC and in this process;
- join: how long a short request waits while a long one runs, in the long one's steps;
- closed loop: several clients, each of which sends its next request when it has its answer;
- open loop: Poisson arrivals at shares of the capacity (the first contestant's rate in the closed loop), without and
  with a deadline. Latency counts from the planned arrival. Goodput: clips within the deadline, per second;
- streams: open loop, time to the first frames.

Without `--bundle` the small untrained model is exported first. Results go to benchmarks/results/throughput.json, with a
plot beside it (extra `bench`). `--soak MINUTES` is described in `benchmarks/soak.py`. Needs the server
(``lfdm-serve --install-server``).
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import cells, figures, load, machine
from benchmarks.cells import Contestant, connect, say
from benchmarks.policies import POLICIES
from benchmarks.served import ServerFailed, print_logs, serve
from benchmarks.throughput_plots import plot_throughput
from benchmarks.throughput_report import report, violations

#: Arrivals of streams, as a share of the capacity.
_STREAM_LOAD = 0.6
_SETTINGS = (
    "contestants", "threads", "steps", "seconds", "concurrency", "orders", "frames", "image_size", "deadline"
)  # fmt: skip


def main() -> int:
    """Measure and print; returns 1 if a clip was wrong or missing."""
    arguments = _arguments()
    from lfdm_export.errors import LfdmExportError

    facts = machine.at_start()
    try:
        with tempfile.TemporaryDirectory(prefix="lfdm-throughput-") as folder:
            bundle = arguments.bundle or _export(Path(folder) / "bundle", arguments.frames, arguments.image_size)
            if arguments.soak:
                from benchmarks.soak import run_soak

                result = facts | run_soak(bundle, Path(folder), arguments)
            else:
                result = facts | _compare(bundle, Path(folder), arguments)
    except (LfdmExportError, ServerFailed) as error:
        print(f"throughput: {error}", file=sys.stderr)
        return 1
    machine.write_json(arguments.out, result)
    print("\n".join(result["report"]))
    if not (arguments.no_plot or arguments.soak):
        plot_throughput(result, arguments.out.with_suffix(".png"))
    return 1 if result["violations"] else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Load a server over gRPC, with and without step-level batching.")
    parser.add_argument("--bundle", type=Path, help="the bundle to serve (default: the small untrained model)")
    parser.add_argument("--frames", type=int, default=10, help="frames per clip of the exported model (10)")
    parser.add_argument("--image-size", type=int, default=64, help="image size of the exported model in pixels (64)")
    parser.add_argument(
        "--contestants",
        nargs="+",
        default=["step:1", "clip:1", "dynamic-shrink:8", "dynamic:8"],
        metavar="POLICY:SLOTS",
        help="servers to compare (step:1 clip:1 dynamic-shrink:8 dynamic:8)",
    )
    parser.add_argument("--threads", type=int, default=1, help="threads per engine (1)")
    parser.add_argument(
        "--steps",
        type=int,
        nargs=2,
        default=(3, 20),
        metavar=("FEWEST", "MOST"),
        help="range of the requests' steps (3 20)",
    )
    parser.add_argument("--seconds", type=float, default=25.0, help="time of sending per cell of the open loop (25)")
    parser.add_argument(
        "--free-loads",
        type=float,
        nargs="*",
        default=[0.7],
        help="arrivals without a deadline, as shares of the capacity (0.7)",
    )
    parser.add_argument(
        "--deadline-loads", type=float, nargs="*", default=[0.9, 1.2], help="the same with a deadline (0.9 1.2)"
    )
    parser.add_argument("--deadline", type=float, default=4.0, help="as a multiple of a single clip's mean time (4)")
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 8], help="clients of the closed loop (1 8)")
    parser.add_argument(
        "--batches", type=int, nargs="*", default=[1, 2, 4, 8], help="batch sizes of the timed steps (1 2 4 8)"
    )
    parser.add_argument("--pairs", type=int, default=5, help="pairs of clips for the overhead (5)")
    parser.add_argument("--orders", type=int, default=24, help="different requests (24)")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="run a mixed load with faults instead")
    parser.add_argument("--no-plot", action="store_true", help="write no picture")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results (benchmarks/results/throughput.json)")
    arguments = parser.parse_args()
    arguments.out = arguments.out or machine.RESULTS / ("soak.json" if arguments.soak else "throughput.json")
    if not (arguments.no_plot or arguments.soak):
        figures.need_matplotlib()
    return arguments


def _export(folder: Path, frames: int, image_size: int) -> Path:
    from lfdm_export.export.bundle_export import export_bundle
    from lfdm_models.demo import untrained_model

    say("exporting the small model")
    return export_bundle(untrained_model(), folder, frames=frames, image_size=image_size).path


def _compare(bundle: Path, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    from lfdm_export.generate.pipeline import Pipeline

    pipeline = Pipeline.open(bundle, threads=arguments.threads)
    say(f"making {arguments.orders} clips to compare with")
    orders = load.make_orders(pipeline, arguments.orders, tuple(arguments.steps), cells.GUIDED, cells.SEED)
    mean_alone = statistics.fmean(order.seconds for order in orders)
    with contextlib.ExitStack() as stack:
        contestants = list(_start(stack, bundle, folder, arguments))
        began = time.perf_counter()
        first = contestants[0]
        result: dict[str, Any] = {
            "settings": {name: getattr(arguments, name) for name in _SETTINGS},
            "mean_clip_alone_seconds": mean_alone,
            "step_costs": cells.step_costs(pipeline, arguments.batches),
            "overhead": cells.overhead(first, pipeline, arguments.pairs),
            "join": {one.name: cells.join(one, pipeline) for one in contestants if one.name.startswith("step")},
            "closed": cells.closed(contestants, orders, arguments.concurrency, arguments.seconds / 3),
        }
        done = [cell["results"][first.name]["clips_per_second"] for cell in result["closed"]]
        capacity, deadline = max(done, default=1 / mean_alone), arguments.deadline * mean_alone
        result |= {"capacity_per_second": capacity, "deadline_seconds": deadline, "open": []}
        for shares, limit in ((arguments.free_loads, None), (arguments.deadline_loads, deadline)):
            for share in shares:
                cell = cells.opened(contestants, orders, share * capacity, arguments.seconds, limit)
                result["open"].append(cell | {"load": share})
        result["streams"] = cells.opened(
            contestants, orders, _STREAM_LOAD * capacity, arguments.seconds / 2, None, stream=True
        )
        result["load_seconds"] = time.perf_counter() - began
    result["violations"] = list(violations(result))
    if result["violations"]:
        print_logs(folder)
    result["report"] = list(report(result))
    return result


def _start(
    stack: contextlib.ExitStack, bundle: Path, folder: Path, arguments: argparse.Namespace
) -> Iterator[Contestant]:
    """All servers, ready; idle ones use no processor time."""
    for name in arguments.contestants:
        policy, _, slots = name.partition(":")
        options = [
            f"--policy={POLICIES[policy]}",
            f"--slots={slots or 1}",
            f"--threads={arguments.threads}",
            "--queue=1000",
        ]
        say(f"starting {name}")
        served = stack.enter_context(serve(bundle, folder / f"{name.replace(':', '_')}.log", options))
        yield Contestant(name, served, stack.enter_context(connect(served)))


if __name__ == "__main__":
    sys.exit(main())
