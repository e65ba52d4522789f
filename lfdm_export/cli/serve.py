"""``lfdm-serve``: bundle -> running Triton server."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lfdm_export.cli.console import OK, add_common_options, make_parser, run, say
from lfdm_export.cli.ending import orderly
from lfdm_export.engines.onnxruntime.target import Device
from lfdm_export.engines.targets import AUTO, Choice, device_names, target_names
from lfdm_export.errors import InputError
from lfdm_export.files.names import user_name
from lfdm_export.generate.tokenizer import tokenizer_installed
from lfdm_export.machine import engine_threads
from lfdm_export.protocol.requests import Limits
from lfdm_export.serving.server.files import SERVER_VARIABLE, find_server, install_server
from lfdm_export.serving.server.options import ServerOptions
from lfdm_export.serving.server.run_folder import run_folder
from lfdm_export.serving.server.supervisor import TritonServer, wait_for_signal
from lfdm_export.serving.triton.settings import ServingSettings

if TYPE_CHECKING:
    from lfdm_export.batching.slots import Curve
    from lfdm_export.bundle.reader import Bundle
    from lfdm_export.generate.stage_runner import StageRunner

logger = logging.getLogger(__name__)

PROGRAM = "lfdm-serve"
_EXAMPLES = """\
  lfdm-serve --install-server
  lfdm-serve mug
  lfdm-serve mug --host 0.0.0.0 --slots 8 --queue 128
  lfdm-serve mug --tritonserver /opt/tritonserver/bin/tritonserver --trace trace.json
"""


@orderly()
def serve_main(argv: Sequence[str] | None = None) -> int:
    """Run ``lfdm-serve``; returns the exit status (see `lfdm_export.cli`)."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.bundle is None and not args.install_server:
        parser.error("give a bundle to serve, or --install-server")
    return run(PROGRAM, args, lambda: _serve(args), extra="serve")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        PROGRAM,
        "Serve a bundle with Triton Inference Server, until SIGINT or SIGTERM; then finish what it has.",
        _EXAMPLES,
    )
    parser.add_argument(
        "bundle",
        metavar="BUNDLE",
        nargs="?",
        help="a folder, org/name on the Hugging Face hub, or characters: the shipped model",
    )
    _add_server_options(parser)
    _add_sampling_options(parser)
    add_common_options(parser)
    return parser


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument(
        "--install-server", action="store_true", help="download the server (55 MB, through pip), unless it is installed"
    )
    server.add_argument(
        "--tritonserver",
        metavar="FILE",
        help=f"server to start (default: {SERVER_VARIABLE}, PATH, or the installed one)",
    )
    defaults = ServerOptions()
    server.add_argument("--host", default=defaults.host, help="address to listen on (default: %(default)s)")
    for name, port in (("http", defaults.http_port), ("grpc", defaults.grpc_port), ("metrics", defaults.metrics_port)):
        server.add_argument(
            f"--{name}-port", type=int, default=port, metavar="N", help="0: any free port (default: %(default)s)"
        )
    server.add_argument(
        "--start-timeout",
        type=float,
        default=defaults.start_timeout,
        metavar="S",
        help="timeout of the start, in seconds (default: %(default)g)",
    )
    server.add_argument(
        "--drain-timeout",
        type=float,
        default=defaults.drain_timeout,
        metavar="S",
        help="seconds for requests in progress at the end (default: %(default)g)",
    )
    server.add_argument("--token-file", metavar="FILE", help="file with the token that requests must send")
    server.add_argument("--tls-cert", metavar="FILE", help="certificate of the server, PEM: HTTP and gRPC use TLS")
    server.add_argument("--tls-key", metavar="FILE", help="private key of the certificate, PEM")
    server.add_argument("--trace", metavar="FILE", help="write traces of requests")
    server.add_argument(
        "--trace-rate", type=int, default=1, metavar="N", help="trace one request in N (default: %(default)s)"
    )
    server.add_argument(
        "--server-argument",
        action="append",
        default=[],
        metavar="ARG",
        help="argument of tritonserver, such as --log-verbose=1",
    )
    server.add_argument("--verbose", action="store_true", help="show all output of the server")


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    settings, limits = ServingSettings(), Limits()
    sampler = parser.add_argument_group("sampler")
    sampler.add_argument(
        "--slots", type=int, metavar="N", help="clips per step (default: as many as pay, by a measurement at the start)"
    )
    sampler.add_argument(
        "--queue",
        type=int,
        default=settings.queue_limit,
        metavar="N",
        help="clips that may wait (default: %(default)s)",
    )
    sampler.add_argument(
        "--policy",
        default=settings.policy,
        metavar="NAME",
        help="step: clips join and leave at each step; or MODULE:CLASS of another policy (default: %(default)s)",
    )
    sampler.add_argument(
        "--fixed-batch",
        action="store_true",
        help="run full batches, so that the bits of a clip do not depend on other clips",
    )
    sampler.add_argument(
        "--target",
        choices=(AUTO, *target_names()),
        default=settings.target,
        help="target that runs the stages (default: %(default)s)",
    )
    sampler.add_argument(
        "--device",
        choices=device_names(),
        default=settings.device,
        help="device of ONNX Runtime (default: %(default)s)",
    )
    sampler.add_argument("--threads", type=int, default=0, metavar="N", help="threads per engine (default: all cores)")
    bounds = parser.add_argument_group("limits of a request")
    bounds.add_argument(
        "--max-image-bytes", type=int, default=limits.image_bytes, metavar="N", help="(default: %(default)s)"
    )
    bounds.add_argument(
        "--max-image-pixels", type=int, default=limits.image_pixels, metavar="N", help="(default: %(default)s)"
    )
    bounds.add_argument("--max-steps", type=int, default=limits.steps, metavar="N", help="(default: %(default)s)")
    bounds.add_argument(
        "--max-guidance", type=float, default=limits.guidance_scale, metavar="X", help="(default: %(default)g)"
    )


def _serve(args: argparse.Namespace) -> int:
    if args.install_server:
        files = install_server()
        say(args, f"server   {files.binary}")
        if args.bundle is None:
            return OK
    from lfdm_export.bundle.reader import Bundle
    from lfdm_export.serving.step_curve import described
    from lfdm_export.serving.triton.repository import write_repository

    options, settings = _server_options(args), _settings(args)
    bundle = Bundle.open(args.bundle)
    check_packages(bundle)
    settings, choice = settle_target(bundle, settings)
    files = find_server(args.tritonserver)
    options = options.with_ports()
    say(args, f"target   {choice.target}: {choice.reason}")
    if args.slots is None:
        settings, curve = settle_slots(bundle, settings)
        say(args, f"slots    {settings.slots}: a step takes {described(curve)}")
    with run_folder() as folder:
        repository = write_repository(bundle, folder / "repository", settings=settings, copy_bundle=False)
        with TritonServer(files, repository, options) as server:
            _announce(args, bundle, server)
            wait_for_signal(server)
            say(args, "stopping: requests in flight are finished")
    return OK


def check_packages(bundle: Bundle) -> None:
    """Check for packages whose absence each model would otherwise report in its own traceback, after the start.

    Raises:
        MissingDependencyError: Triton's messages are not installed.
    """
    from lfdm_export.serving.triton.config import messages

    messages()
    if bundle.manifest.has_text and not tokenizer_installed():
        logger.warning(
            "free text is refused, labels and embeddings are served: the package 'tokenizers' is not installed; "
            "install it with: pip install 'lfdm-export[serve]'"
        )


def settle_target(bundle: Bundle, settings: ServingSettings) -> tuple[ServingSettings, Choice]:
    """Choose and check the target that runs the stages on this machine, once for all models.

    Raises:
        EngineError: no target runs the bundle; or the target of the settings is not available, or gives wrong results.
    """
    runner = _runner(bundle, settings)
    choice = runner.choice
    settled = replace(
        settings, target=choice.target or AUTO, on_device=settings.on_device or runner.prefers_device, self_check=False
    )
    return settled, choice


def settle_slots(bundle: Bundle, settings: ServingSettings) -> tuple[ServingSettings, Curve]:
    """Choose the number of slots by what a step takes on this machine, once for all models.

    Args:
        bundle: the bundle.
        settings: the result of `settle_target`.

    Raises:
        EngineError: an engine cannot be loaded or fails.
    """
    if settings.on_device:  # in a process of its own, whose end frees the device for the server
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            slots, curve = pool.submit(_slots, bundle.path, settings).result()
    else:
        slots, curve = _slots(bundle, settings)
    return replace(settings, slots=slots), curve


def _slots(bundle: Bundle | Path, settings: ServingSettings) -> tuple[int, Curve]:
    from lfdm_export.bundle.reader import Bundle
    from lfdm_export.serving.step_curve import measured_slots

    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, check_hashes=False)
    return measured_slots(_runner(opened, settings), on_device=settings.on_device)


def _runner(bundle: Bundle, settings: ServingSettings) -> StageRunner:
    from lfdm_export.generate.stage_runner import StageRunner

    return StageRunner(
        bundle,
        threads=settings.threads or None,
        device=cast(Device, settings.device),
        target=settings.target,
        self_check=settings.self_check,
    )


def _announce(args: argparse.Namespace, bundle: Bundle, server: TritonServer) -> None:
    options = server.options
    say(args, f"serving  {bundle.path}")
    say(args, f"gRPC     {options.host}:{options.grpc_port}")
    scheme = "http" if options.tls_certificate is None else "https"
    say(args, f"HTTP     {scheme}://{options.host}:{options.http_port}")
    say(args, f"metrics  http://{options.host}:{options.metrics_port}/metrics")
    say(args, "ready")


def _server_options(args: argparse.Namespace) -> ServerOptions:
    return ServerOptions(
        host=args.host,
        http_port=args.http_port,
        grpc_port=args.grpc_port,
        metrics_port=args.metrics_port,
        start_timeout=args.start_timeout,
        drain_timeout=args.drain_timeout,
        token_file=args.token_file,
        tls_certificate=args.tls_cert,
        tls_key=args.tls_key,
        trace_file=None if args.trace is None else user_name(args.trace),
        trace_rate=args.trace_rate,
        verbose=args.verbose,
        arguments=tuple(args.server_argument),
    )


def _settings(args: argparse.Namespace) -> ServingSettings:
    limits = Limits(
        image_bytes=args.max_image_bytes,
        image_pixels=args.max_image_pixels,
        steps=args.max_steps,
        guidance_scale=args.max_guidance,
    )
    if args.threads < 0:
        raise InputError(f"--threads is {args.threads}, expected 1 or more, or 0 for all cores")
    engine_threads(args.threads or None)
    return ServingSettings(
        slots=1 if args.slots is None else args.slots,
        queue_limit=args.queue,
        policy=args.policy,
        fixed_batch=args.fixed_batch,
        threads=args.threads,
        target=args.target,
        device=args.device,
        limits=limits,
    )
