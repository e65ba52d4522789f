"""``lfdm-web``: a page for the browser and a video API over HTTP, for one bundle; or a page for a server."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lfdm_export.cli.console import OK, add_common_options, make_parser, run, say
from lfdm_export.cli.ending import orderly
from lfdm_export.cli.plans import add_target_option
from lfdm_export.errors import InputError
from lfdm_export.files.names import user_path
from lfdm_export.machine import CACHE_NAME, user_cache

if TYPE_CHECKING:
    from fastapi import FastAPI

    from lfdm_export.web.app import WebOptions

PROGRAM = "lfdm-web"
# Length of the queue of new connections.
_WAITING = 128
# Seconds that a browser's open connections may keep a server that ends.
_GRACE = 3
_EXAMPLES = """\
  lfdm-web characters                     # then open http://localhost:8080
  lfdm-web --url localhost:8001
  lfdm-web mug --port 9000 --state /var/lib/lfdm --token-env LFDM_TOKEN
  curl -F prompt=nod -F input_reference=@face.jpg http://localhost:8080/v1/videos
"""


@orderly()
def web_main(argv: Sequence[str] | None = None) -> int:
    """Run ``lfdm-web``; returns the exit status (see `lfdm_export.cli`)."""
    parser = make_parser(
        PROGRAM,
        "Serve a bundle as a page for the browser and as a video API, /v1/videos, which clients of OpenAI's interface "
        "speak.",
        _EXAMPLES,
    )
    parser.add_argument(
        "bundle",
        nargs="?",
        metavar="BUNDLE",
        help="a folder, org/name on the Hugging Face hub, or characters: the shipped model; not with --url",
    )
    remote = parser.add_argument_group("the page alone, for a server (instead of BUNDLE)")
    remote.add_argument("--url", metavar="HOST:PORT", help="gRPC port of an lfdm-serve or of Triton")
    remote.add_argument("--server-tls-ca", metavar="PEM", help="encrypt; trust the authorities in this file")
    remote.add_argument("--server-token-env", metavar="NAME", help="environment variable that holds its bearer token")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s, only this machine)"
    )
    parser.add_argument("--port", type=int, default=8080, metavar="N", help="0: any free port (default: %(default)s)")
    parser.add_argument(
        "--state", metavar="DIR", help="folder of the videos, kept after a restart (default: the user's cache)"
    )
    parser.add_argument("--token-env", metavar="NAME", help="environment variable that holds a bearer token")
    parser.add_argument("--no-page", action="store_true", help="serve only the video API")
    parser.add_argument(
        "--queue", type=int, default=32, metavar="N", help="videos that may be queued or running (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads per engine (default: all cores)")
    add_target_option(parser)
    add_common_options(parser)
    args = parser.parse_args(argv)
    if (args.bundle is None) == (args.url is None):
        parser.error("give either BUNDLE, to run it here, or --url, for a page over a server")
    if args.url is not None and (args.no_page or args.state is not None):
        parser.error("--no-page and --state are for a BUNDLE: --url serves the page alone")
    if args.url is None and (args.server_tls_ca is not None or args.server_token_env is not None):
        parser.error("--server-tls-ca and --server-token-env are for --url; leave them out")
    return run(PROGRAM, args, lambda: _serve(args), extra="web")


def _serve(args: argparse.Namespace) -> int:
    import uvicorn

    from lfdm_export.client.settings import token_from_environment
    from lfdm_export.pictures.clips import import_av
    from lfdm_export.web.app import WebOptions
    from lfdm_export.web.connections import Connection

    import_av("serving videos as MP4")
    if args.queue < 1 or not 0 <= args.port < 65536:
        raise InputError(f"found --queue {args.queue} and --port {args.port}, expected 1 or more, and 0 to 65535")
    options = WebOptions(
        token=None if args.token_env is None else token_from_environment(args.token_env), queue=args.queue
    )
    app = _of_bundle(args, options) if args.url is None else _of_server(args, options)
    config = uvicorn.Config(
        app,
        args.host,
        args.port,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=_GRACE,
        http=Connection,
    )
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of each invalid form
    server = uvicorn.Server(config)
    socket = server.config.bind_socket()
    socket.listen(_WAITING)  # from now on connections wait until the start is done
    address = f"http://{args.host}:{socket.getsockname()[1]}"
    if not args.no_page:
        say(args, f"page    {address}")
    if args.url is None:
        say(args, f"videos  {address}/v1/videos")
    mask = os.umask(0o077)  # photographs and clips are their owner's
    try:
        server.run(sockets=[socket])
    finally:
        os.umask(mask)
    return OK


def _of_bundle(args: argparse.Namespace, options: WebOptions) -> FastAPI:
    """The API of a bundle, and the page over the same engines."""
    from lfdm_export.generate.pipeline import Pipeline
    from lfdm_export.web.app import make_app
    from lfdm_export.web.guard import Guard
    from lfdm_export.web.store import Store
    from lfdm_export.web.turns import Turns

    pipeline = Pipeline.open(args.bundle, threads=args.threads, target=args.target)
    say(args, f"target  {pipeline.stages.target}: {pipeline.stages.choice.reason}")
    turns = Turns()
    api = make_app(pipeline, Store(_state(args)), options, turns)
    if args.no_page:
        api.add_middleware(Guard, here=_is_here(args.host))
        return api
    from lfdm_export.web.page.makers import LocalMaker
    from lfdm_export.web.page.site import make_site

    return make_site(LocalMaker(pipeline, turns, args.queue), options, api=api, here=_is_here(args.host))


def _of_server(args: argparse.Namespace, options: WebOptions) -> FastAPI:
    """The page over a server's engines."""
    # gRPC's own lines on stderr say less than our errors do. Read when it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from lfdm_export.client import Client, Settings, Tls, token_from_environment
    from lfdm_export.web.page.makers import RemoteMaker
    from lfdm_export.web.page.site import make_site

    settings = Settings(
        tls=None if args.server_tls_ca is None else Tls(args.server_tls_ca),
        token=None if args.server_token_env is None else token_from_environment(args.server_token_env),
    )
    maker = RemoteMaker(Client(args.url, settings), args.url)
    return make_site(maker, options, api=None, here=_is_here(args.host))


def _is_here(host: str) -> bool:
    return host in ("127.0.0.1", "localhost", "::1")


def _state(args: argparse.Namespace) -> Path:
    if args.state is not None:
        return user_path(args.state)
    cache = user_cache()
    if cache is None:
        raise InputError("there is no home to keep videos in; give --state DIR")
    return cache / CACHE_NAME / "videos"
