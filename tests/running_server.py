"""A real server on a small bundle, started by `lfdm-serve`, and helpers for requests."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton

from lfdm_export.protocol.contract import CLIP_MODEL, STREAM_INPUTS, WireTensor
from lfdm_export.serving.server.control import open_directly

#: gRPC options for a local server: ignore a proxy in the environment.
DIRECT = [("grpc.enable_http_proxy", 0)]
#: Timeout of requests, in seconds.
DEADLINE = 120.0
_SPECS: Mapping[str, WireTensor] = {spec.name: spec for spec in STREAM_INPUTS}


def tensor(spec: WireTensor, value: Any) -> np.ndarray:
    """Convert a plain value to the array of a tensor."""
    if isinstance(value, np.ndarray):
        return value
    values = value if isinstance(value, list) else [value]
    return np.array([one.encode() if isinstance(one, str) else one for one in values], spec.dtype)


def inputs_of(values: Mapping[str, Any]) -> list[triton.InferInput]:
    """Return a request's inputs for tritonclient; converts numbers and strings to the types of the contract."""
    found = []
    for name, value in values.items():
        spec = _SPECS[name]
        array = tensor(spec, value)
        made = triton.InferInput(name, list(array.shape), spec.datatype)
        made.set_data_from_numpy(array)
        found.append(made)
    return found


def json_input(name: str, value: Any) -> dict[str, Any]:
    """Return an input in Triton's JSON format."""
    array = np.asarray(value if isinstance(value, list) else [value])
    datatype = _SPECS[name].datatype
    return {"name": name, "datatype": datatype, "shape": list(array.shape), "data": array.ravel().tolist()}


@dataclass
class RunningServer:
    """Addresses of a running server, and helpers for requests."""

    grpc: str
    http: str
    metrics_url: str

    def client(self) -> triton.InferenceServerClient:
        """Return a new gRPC client."""
        return triton.InferenceServerClient(self.grpc, channel_args=DIRECT)

    def infer(
        self,
        client: triton.InferenceServerClient,
        values: Mapping[str, Any],
        outputs: Sequence[str] = ("frames",),
        *,
        model: str = CLIP_MODEL,
        **options: Any,
    ) -> dict[str, np.ndarray]:
        """Send one request over gRPC, and return the requested outputs."""
        asked = [triton.InferRequestedOutput(name) for name in outputs]
        result = client.infer(
            model, inputs_of(values), outputs=asked, client_timeout=options.pop("client_timeout", DEADLINE), **options
        )
        return {name: result.as_numpy(name) for name in outputs}

    def post(self, model: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> tuple[int, Any]:
        """Send a request in JSON, and return status and response."""
        request = urllib.request.Request(
            f"{self.http}/v2/models/{model}/infer", json.dumps(body).encode(), dict(headers or {})
        )
        try:
            with open_directly(request, DEADLINE) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def metrics(self) -> dict[str, float]:
        """Return the metrics page: values by name with labels; this project's metrics as reported so far."""
        with open_directly(self.metrics_url, DEADLINE) as answer:
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}

    def metric(self, name: str, **labels: str) -> float:
        """Return one value of the metrics page; 0 if missing."""
        text = ",".join(f'{label}="{value}"' for label, value in labels.items())
        return self.metrics().get(f"{name}{{{text}}}", 0)

    def answered(self, client: triton.InferenceServerClient, model: str) -> int:
        """Return the number of a model's successful requests, which the server itself counts without delay."""
        statistics = client.get_inference_statistics(model).model_stats[0].inference_stats
        return int(statistics.success.count)


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds; fails after `DEADLINE` seconds."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"not within {DEADLINE:.0f} s: {what}"
        time.sleep(0.05)


class ServeCommand:
    """``lfdm-serve`` in its own process."""

    def __init__(self, bundle: Path, *options: str) -> None:
        """Start the server and wait until it reports that it is ready."""
        code = "import sys; from lfdm_export.cli import serve_main; sys.exit(serve_main())"
        ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(bundle), *ports, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        self.errors: list[str] = []
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()
        self.said: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.rstrip())
            if self.said[-1] == "ready":
                break
        text = "\n".join(self.said)
        assert self.said[-1:] == ["ready"], f"lfdm-serve did not start: {text}\n{self.stop()}"
        found = {name: re.search(rf"^{name} +(\S+)$", text, re.MULTILINE) for name in ("gRPC", "HTTP", "metrics")}
        self.server = RunningServer(*(match.group(1) for match in found.values() if match is not None))

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self.errors.extend(line.rstrip() for line in self.process.stderr)

    def stop(self) -> str:
        """Stop the server as a terminal does, and return its stderr."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(120)
        self._reader.join(10)
        return "\n".join(self.errors)
