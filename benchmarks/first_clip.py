"""A stranger's first clip: time and megabytes from ``pip install`` to a GIF, in an empty environment with an empty
cache.

    python benchmarks/first_clip.py [--extras run web]

The wheel is built first and does not count. Then, per extra: a virtual environment; ``pip install`` with a cache of
its own, so that everything is downloaded; the first clip of the shipped model, in a home of its own: `run` by
`lfdm-generate`, `web` by the video API of `lfdm-web`. Downloaded megabytes are those of all packages' files, installed
ones those that the environment grew by. Results go to benchmarks/results/first_clip.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine

_ROOT = Path(__file__).resolve().parents[1]
_PHOTO = _ROOT / "docs" / "character.png"
#: What a stranger's shell does not have.
_FOREIGN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "XDG_CACHE_HOME", "PIP_CACHE_DIR", "PIP_NO_CACHE_DIR")
_POLL = 0.05


def main() -> int:
    """Measure and print."""
    arguments = _arguments()
    result = machine.at_start() | {"first_clip": {}}
    with tempfile.TemporaryDirectory(prefix="lfdm-first-") as folder:
        build: list[str | Path] = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, _ROOT]
        subprocess.run(build, check=True)
        (wheel,) = Path(folder).glob("lfdm_export-*.whl")
        for extra in arguments.extras:
            place = Path(folder) / extra
            place.mkdir()
            found = result["first_clip"][extra] = _first_clip(place, wheel, extra)
            print(
                f"{extra}: {found['install_s']:.1f} s to install, {found['clip_s']:.1f} s to the GIF, "
                f"{found['install_s'] + found['clip_s']:.1f} s in all; {found['downloaded_mb']:.0f} MB downloaded, "
                f"{found['installed_mb']:.0f} MB installed",
                flush=True,
            )
    machine.write_json(arguments.out, result)
    return 0


def _first_clip(place: Path, wheel: Path, extra: str) -> dict[str, float]:
    """Seconds and megabytes, by name."""
    variables = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
    home, cache, downloads, environment = (place / name for name in ("home", "cache", "downloads", "environment"))
    home.mkdir()
    variables |= {"HOME": str(home), "PIP_CACHE_DIR": str(cache)}
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    empty = _megabytes(environment)
    began = time.perf_counter()
    install: list[str | Path] = [environment / "bin" / "python", "-m", "pip", "install", "-q"]
    requested: list[str | Path] = ["-c", _ROOT / "constraints.txt", f"{wheel}[{extra}]"]
    subprocess.run([*install, *requested], check=True, env=variables, cwd=home)
    installed = time.perf_counter()
    gif = home / "nod.gif"
    (_by_server if extra == "web" else _by_command)(environment / "bin", variables, gif)
    ended = time.perf_counter()
    # Once more, for the sizes alone: pip's cache does not keep what some servers send.
    download: list[str | Path] = [install[0], "-m", "pip", "download", "-q", "-d", downloads]
    subprocess.run([*download, *requested], check=True, env=variables, cwd=home)
    if not gif.read_bytes().startswith(b"GIF89a"):
        raise SystemExit(f"{gif} is no GIF")
    return {
        "install_s": installed - began,
        "clip_s": ended - installed,
        "downloaded_mb": _megabytes(downloads),
        "installed_mb": _megabytes(environment) - empty,
        "home_mb": _megabytes(home),
    }


def _by_command(programs: Path, variables: dict[str, str], gif: Path) -> None:
    """The command of the ten-minute start."""
    command: list[str | Path] = [programs / "lfdm-generate", "characters", "--image", _PHOTO, "--label", "nod"]
    subprocess.run([*command, "--out", gif, "-q"], check=True, env=variables, cwd=gif.parent)


def _by_server(programs: Path, variables: dict[str, str], gif: Path) -> None:
    """Start the server, request a video, wait for it, download it as GIF."""
    command: list[str | Path] = [programs / "lfdm-web", "characters", "--port", "0"]
    process = subprocess.Popen(
        command, env=variables, cwd=gif.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    try:
        said = ""
        for line in process.stdout:
            said += line
            found = re.search(r"(http://\S+)/v1/videos", said)
            if found:
                break
        else:
            raise SystemExit(f"the server did not start: {said}")
        videos, boundary = f"{found[1]}/v1/videos", uuid.uuid4().hex
        video = json.loads(_ask(videos, _form(boundary), f"multipart/form-data; boundary={boundary}"))
        while video["status"] in ("queued", "in_progress"):
            time.sleep(_POLL)
            video = json.loads(_ask(f"{videos}/{video['id']}"))
        if video["status"] != "completed":
            raise SystemExit(f"the video {video['status']}: {video['error']}")
        gif.write_bytes(_ask(f"{videos}/{video['id']}/content", accept="image/gif"))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _form(boundary: str) -> bytes:
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nnod\r\n'
    part = f'--{boundary}\r\nContent-Disposition: form-data; name="input_reference"; filename="a.png"\r\n\r\n'
    return head.encode() + part.encode() + _PHOTO.read_bytes() + f"\r\n--{boundary}--\r\n".encode()


def _ask(url: str, body: bytes | None = None, kind: str = "", *, accept: str = "*/*") -> bytes:
    headers = {"Accept": accept, **({"Content-Type": kind} if kind else {})}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, body, headers), timeout=600) as answer:
        content: bytes = answer.read()
    return content


def _megabytes(folder: Path) -> float:
    """Size of all files below a folder, links not followed."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()) / 1e6


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extras", nargs="+", choices=("run", "web"), default=["run", "web"])
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "first_clip.json")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
