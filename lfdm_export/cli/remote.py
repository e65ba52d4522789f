"""``lfdm-generate --url``: photograph -> clip, on a server."""

from __future__ import annotations

import argparse
import functools
import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any

from lfdm_export.cli.console import Bars, say
from lfdm_export.cli.making import Making
from lfdm_export.cli.photograph import say_bars
from lfdm_export.cli.planned import PlannedClip, frames_of, options_of, planned_clips, wants_many
from lfdm_export.errors import AuthenticationError, ServerUnavailableError
from lfdm_export.generate.frame_choice import FrameChoice
from lfdm_export.pictures.clip import Clip
from lfdm_export.pictures.clip_files import ARCHIVES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lfdm_export.client import Client, Settings

PROGRAM = "lfdm-generate"
#: Options that require --url.
_REMOTE = (
    "stream", "tls", "tls_ca", "tls_key", "tls_cert", "tls_name", "token_env", "allow_plain_token", "timeout",
    "priority", "compression",
)  # fmt: skip
_STAGES = {"clips": "clip", "denoise": "denoise", "decode": "decode"}


def add_remote_options(parser: argparse.ArgumentParser) -> None:
    """Add --url and its options."""
    group = parser.add_argument_group("server (instead of BUNDLE)")
    group.add_argument(
        "--url", metavar="HOST:PORT", help="gRPC address of lfdm-serve or Triton, such as localhost:8001"
    )
    group.add_argument("--stream", action="store_true", help="show steps and frames during generation")
    group.add_argument("--timeout", type=float, metavar="S", help="timeout of a clip in seconds (default: 300)")
    group.add_argument("--priority", type=int, metavar="N", help="-1000 to 1000, higher runs first (default: 0)")
    group.add_argument("--tls", action="store_true", help="encrypt; trust public certificate authorities")
    group.add_argument("--tls-ca", metavar="PEM", help="encrypt; trust the certificate authorities in this file")
    group.add_argument("--tls-cert", metavar="PEM", help="certificate of the client, if the server requires one")
    group.add_argument("--tls-key", metavar="PEM", help="private key of the client's certificate")
    group.add_argument(
        "--tls-name", metavar="NAME", help="name in the server's certificate, if it differs from the address"
    )
    group.add_argument("--token-env", metavar="NAME", help="environment variable that holds a bearer token")
    group.add_argument(
        "--allow-plain-token",
        action="store_true",
        help="allow the token without TLS, e.g. where a service mesh encrypts",
    )
    group.add_argument("--compression", choices=("gzip", "deflate"), help="compression of requests and responses")


def check_remote_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Reject invalid combinations: prints the usage and exits with status 2."""
    if (args.bundle is None) == (args.url is None):
        parser.error("give either BUNDLE, to run it here, or --url, to run on a server")
    if args.url is None:
        given = [name for name in _REMOTE if getattr(args, name) is not None and getattr(args, name) is not False]
        if given:
            parser.error(f"--{given[0].replace('_', '-')} is for --url; leave it out")
        return
    for name in ("drive", "cache"):
        if getattr(args, name) is not None:
            parser.error(f"--{name} is for a BUNDLE that runs here; leave out --url")
    if args.threads is not None:
        parser.error("--threads is for a BUNDLE that runs here; leave it out")
    if args.stream and args.motion is not None:
        parser.error("--motion is decoded at once: leave out --stream")
    if frames_of(args) is not None and args.motion is not None:
        parser.error("--frames and --stride are for a BUNDLE that runs here, or for a sampled clip; leave them out")
    if _streams(args) and (args.panels or _is_archive(args)):
        parser.error(
            "a stream brings the frames alone, but --panels, npz and motion need more; leave out --stream, --frames "
            "and --stride"
        )
    if (args.tls_key is None) != (args.tls_cert is None):
        parser.error("--tls-key and --tls-cert belong together: give both, or neither")


def generate_remotely(args: argparse.Namespace) -> int:
    """Generate the clips on the server, save them, and print their files; returns the exit status."""
    # gRPC's log lines say less than this project's errors. gRPC reads the variable on import.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from lfdm_export.client import Client

    settings = _settings(args)
    with Client(args.url, settings) as client:
        known = client.facts().labels if wants_many(args) else ()
        with Bars(quiet=args.quiet, names=_STAGES) as progress:
            making = Making(args, planned_clips(args, known))
            if _streams(args) or len(making.wanted) == 1:
                for planned in making.wanted:
                    making.attempt(
                        planned,
                        functools.partial(_streamed if _streams(args) else _whole, client, args, planned, progress),
                    )
            else:
                _together(client, args, making, progress)
        facts: dict[str, object] = {"server": args.url}
        if making.made:
            model = client.facts()
            if args.motion is None:
                facts = {"sampler": options_of(args).over(model.sampler).sampler, "steps": making.steps, **facts}
        status = making.finish(PROGRAM, facts)
        if making.made:
            say_bars(args, client.facts().preprocessing)
        if making.made and client.facts().trained is False:
            say(args, "the model's weights are untrained: the clip shows that it runs, not what a trained one does")
    return status


def _together(client: Client, args: argparse.Namespace, making: Making, progress: Bars) -> None:
    """Request several clips concurrently, so that the server batches them; a failed clip does not stop the others."""

    def one(planned: PlannedClip) -> Clip:
        if over:
            raise over[0]  # no server: the other clips need not wait for it too
        try:
            return _whole(client, args, planned, None)
        except (AuthenticationError, ServerUnavailableError) as error:
            over.append(error)
            raise

    over: list[Exception] = []
    with ThreadPoolExecutor(client.settings.concurrency, "lfdm-generate") as pool:
        futures = {pool.submit(one, planned): planned for planned in making.wanted}
        try:
            for done, future in enumerate(as_completed(futures)):
                progress("clips", done, len(futures))
                making.attempt(futures[future], future.result)
            progress("clips", len(futures), len(futures))
        except BaseException:  # Ctrl-C, or --debug
            pool.shutdown(wait=False, cancel_futures=True)
            client.close()
            raise


def _settings(args: argparse.Namespace) -> Settings:
    from lfdm_export.client import Settings, Tls, token_from_environment

    tls = None
    if args.tls or any((args.tls_ca, args.tls_key, args.tls_name)):
        tls = Tls(args.tls_ca, args.tls_key, args.tls_cert, args.tls_name)
    return Settings(
        tls=tls,
        token=None if args.token_env is None else token_from_environment(args.token_env),
        plain_token=args.allow_plain_token,
        compression=args.compression,
        timeout=Settings.timeout if args.timeout is None else args.timeout,
    )


def _whole(client: Client, args: argparse.Namespace, planned: PlannedClip, progress: Bars | None) -> Clip:
    if args.motion is not None:
        return client.animate(args.image, args.motion, crop=args.crop)
    more = args.panels or _is_archive(args)
    return client.generate(args.image, warped=more, latent=more, progress=progress, **_request(args, planned))


def _request(args: argparse.Namespace, planned: PlannedClip) -> dict[str, Any]:
    """What `Client.generate` and `Client.stream` take alike."""
    return {
        "crop": args.crop,
        "label": planned.label,
        "text": args.text,
        "text_embedding": _embedding(args),
        "seed": planned.seed,
        "priority": args.priority or 0,
        **options_of(args).given(),
    }


def _streams(args: argparse.Namespace) -> bool:
    """Whether the clips are streamed; only a stream can have some of the frames."""
    return bool(args.stream) or frames_of(args) is not None


def _is_archive(args: argparse.Namespace) -> bool:
    return (args.format or args.out.lower().rpartition(".")[2]) in ARCHIVES


def _streamed(client: Client, args: argparse.Namespace, planned: PlannedClip, progress: Bars) -> Clip:
    from lfdm_export.client import Frames, Progress

    have: set[int] = set()
    steps, total = 0, FrameChoice.of(frames_of(args), client.facts().frames).count
    with client.stream(args.image, frames=frames_of(args), progress_every=1, **_request(args, planned)) as stream:
        for event in stream:
            if isinstance(event, Progress):
                steps = event.steps
                progress("denoise", event.step, steps)
            elif isinstance(event, Frames):
                have.update(event.indices.tolist())
                progress("denoise", steps, steps)
                progress("decode", len(have), total)
        return stream.clip()


def _embedding(args: argparse.Namespace) -> NDArray[np.generic] | None:
    if args.embedding is None:
        return None
    from lfdm_export.generate.arguments import load_embedding

    return load_embedding(args.embedding)
