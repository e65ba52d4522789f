"""``lfdm-web``: a video API over HTTP for one bundle."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lfdm_export.cli.console import OK, add_common_options, make_parser, run, say
from lfdm_export.cli.ending import orderly
from lfdm_export.cli.plans import add_target_option
from lfdm_export.errors import InputError
from lfdm_export.files.names import user_path
from lfdm_export.machine import CACHE_NAME, user_cache

PROGRAM = "lfdm-web"
# Length of the queue of new connections.
_WAITING = 128
_EXAMPLES = """\
  lfdm-web characters
  lfdm-web mug --port 9000 --state /var/lib/lfdm --token-env LFDM_TOKEN
  curl -F prompt=nod -F input_reference=@face.jpg http://localhost:8080/v1/videos
"""


@orderly()
def web_main(argv: Sequence[str] | None = None) -> int:
    """Run ``lfdm-web``; returns the exit status (see `lfdm_export.cli`)."""
    parser = make_parser(
        PROGRAM, "Serve a bundle as a video API, /v1/videos, which clients of OpenAI's interface speak.", _EXAMPLES
    )
    parser.add_argument(
        "bundle", metavar="BUNDLE", help="a folder, org/name on the Hugging Face hub, or characters: the shipped model"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s, only this machine)"
    )
    parser.add_argument("--port", type=int, default=8080, metavar="N", help="0: any free port (default: %(default)s)")
    parser.add_argument(
        "--state", metavar="DIR", help="folder of the videos, kept after a restart (default: the user's cache)"
    )
    parser.add_argument("--token-env", metavar="NAME", help="environment variable that holds a bearer token")
    parser.add_argument(
        "--queue", type=int, default=32, metavar="N", help="videos that may be queued or running (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads per engine (default: all cores)")
    add_target_option(parser)
    add_common_options(parser)
    args = parser.parse_args(argv)
    return run(PROGRAM, args, lambda: _serve(args), extra="web")


def _serve(args: argparse.Namespace) -> int:
    import uvicorn

    from lfdm_export.client.settings import token_from_environment
    from lfdm_export.generate.pipeline import Pipeline
    from lfdm_export.pictures.clips import import_av
    from lfdm_export.web.app import WebOptions, make_app
    from lfdm_export.web.store import Store

    import_av("serving videos as MP4")
    if args.queue < 1 or not 0 <= args.port < 65536:
        raise InputError(f"found --queue {args.queue} and --port {args.port}, expected 1 or more, and 0 to 65535")
    options = WebOptions(
        token=None if args.token_env is None else token_from_environment(args.token_env), queue=args.queue
    )
    pipeline = Pipeline.open(args.bundle, threads=args.threads, target=args.target)
    say(args, f"target  {pipeline.stages.target}: {pipeline.stages.choice.reason}")
    app = make_app(pipeline, Store(_state(args)), options)
    server = uvicorn.Server(uvicorn.Config(app, args.host, args.port, log_level="warning", server_header=False))
    socket = server.config.bind_socket()
    socket.listen(_WAITING)  # from now on connections wait until the start is done
    say(args, f"videos  http://{args.host}:{socket.getsockname()[1]}/v1/videos")
    server.run(sockets=[socket])
    return OK


def _state(args: argparse.Namespace) -> Path:
    if args.state is not None:
        return user_path(args.state)
    cache = user_cache()
    if cache is None:
        raise InputError("there is no home to keep videos in; give --state DIR")
    return cache / CACHE_NAME / "videos"
