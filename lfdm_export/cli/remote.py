"""``lfdm-generate --url``: photograph -> clip, on a server."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from lfdm_export.cli.console import OK, Bars, say
from lfdm_export.clip import Clip

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lfdm_export.client import Client, Settings

#: Options that mean something only with --url.
_REMOTE = (
    "stream", "tls", "tls_ca", "tls_key", "tls_cert", "tls_name", "token_env", "allow_plain_token", "timeout",
    "priority", "compression",
)  # fmt: skip
_STAGES = {"clips": "clip", "denoise": "denoise", "decode": "decode"}


def add_remote_options(parser: argparse.ArgumentParser) -> None:
    """Add --url and what goes with it."""
    group = parser.add_argument_group("server (in place of BUNDLE)")
    group.add_argument(
        "--url", metavar="HOST:PORT", help="gRPC port of an lfdm-serve or of Triton, such as localhost:8001"
    )
    group.add_argument("--stream", action="store_true", help="show the steps and frames as they are made")
    group.add_argument("--timeout", type=float, metavar="S", help="seconds that the clip may take (300)")
    group.add_argument("--priority", type=int, metavar="N", help="-1000 to 1000, higher goes first (0)")
    group.add_argument("--tls", action="store_true", help="encrypt; trust the public authorities")
    group.add_argument("--tls-ca", metavar="PEM", help="encrypt; trust the authorities in this file")
    group.add_argument("--tls-cert", metavar="PEM", help="the client's certificate, where the server asks for one")
    group.add_argument("--tls-key", metavar="PEM", help="its private key")
    group.add_argument(
        "--tls-name", metavar="NAME", help="name in the server's certificate, if it is not the address's"
    )
    group.add_argument("--token-env", metavar="NAME", help="environment variable that holds a bearer token")
    group.add_argument(
        "--allow-plain-token", action="store_true", help="send the token without TLS, as where a service mesh encrypts"
    )
    group.add_argument("--compression", choices=("gzip", "deflate"), help="of what is sent and received")


def check_remote_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse combinations that mean nothing: prints the usage and exits with status 2."""
    if (args.bundle is None) == (args.url is None):
        parser.error("give either BUNDLE, to run it here, or --url, to run on a server")
    if args.url is None:
        given = [name for name in _REMOTE if getattr(args, name) is not None and getattr(args, name) is not False]
        if given:
            parser.error(f"--{given[0].replace('_', '-')} is for --url; leave it out")
        return
    if args.drive is not None:
        parser.error("--drive runs here, with a BUNDLE; leave out --url")
    if args.threads is not None:
        parser.error("--threads is for a BUNDLE that runs here; leave it out")
    if args.stream and (args.panels or _is_archive(args)):
        parser.error("a stream brings the frames alone, but --panels and npz need more; leave out --stream")
    if (args.tls_key is None) != (args.tls_cert is None):
        parser.error("--tls-key and --tls-cert belong together: give both, or neither")


def generate_remotely(args: argparse.Namespace) -> int:
    """Make the clip on the server, save it, say where; returns the exit status."""
    # gRPC's own lines on stderr say less than our errors do. Read when it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from lfdm_export.client import Client

    settings = _settings(args)
    with Client(args.url, settings) as client:
        with Bars(quiet=args.quiet, names=_STAGES) as progress:
            clip = _streamed(client, args, progress) if args.stream else _whole(client, args, progress)
            paths = clip.save(args.out, format=args.format, panels=args.panels, fps=args.fps)
        for path in paths:
            say(args, f"clip  {path}")
        if client.facts().trained is False:
            say(args, "the model's weights are untrained: the clip shows that it runs, not what a trained one does")
    return OK


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


def _whole(client: Client, args: argparse.Namespace, progress: Bars) -> Clip:
    more = args.panels or _is_archive(args)
    return client.generate(
        args.image,
        label=args.label,
        text=args.text,
        text_embedding=_embedding(args),
        sampler=args.sampler,
        steps=args.steps,
        eta=args.eta,
        guidance_scale=args.guidance,
        seed=args.seed or 0,
        warped=more,
        latent=more,
        priority=args.priority or 0,
        progress=progress,
    )


def _is_archive(args: argparse.Namespace) -> bool:
    return (args.format or args.out.lower().rpartition(".")[2]) == "npz"


def _streamed(client: Client, args: argparse.Namespace, progress: Bars) -> Clip:
    from lfdm_export.client import Frames, Progress

    have: set[int] = set()
    steps = 0
    with client.stream(
        args.image,
        label=args.label,
        text=args.text,
        text_embedding=_embedding(args),
        sampler=args.sampler,
        steps=args.steps,
        eta=args.eta,
        guidance_scale=args.guidance,
        seed=args.seed or 0,
        progress_every=1,
        priority=args.priority or 0,
    ) as stream:
        for event in stream:
            if isinstance(event, Progress):
                steps = event.steps
                progress("denoise", event.step, steps)
            elif isinstance(event, Frames):
                have.update(event.indices.tolist())
                progress("denoise", steps, steps)
                progress("decode", len(have), client.facts().frames)
        return stream.clip()


def _embedding(args: argparse.Namespace) -> NDArray[np.generic] | None:
    if args.embedding is None:
        return None
    from lfdm_export.conditions import load_embedding

    return load_embedding(args.embedding)
