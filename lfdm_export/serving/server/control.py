"""A running server's own HTTP interface: readiness, loading and unloading models, small requests."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import AbstractContextManager
from http.client import HTTPResponse
from typing import Any

from lfdm_export.errors import ServerError

#: Name of the header that opens the protected part of the interface.
ADMIN_HEADER = "lfdm-admin"
#: What only who started the server may use: everybody else could unload models, or read any shared memory.
PROTECTED = ("model-repository", "shared-memory", "trace", "logging")


# The server is on this machine, whatever a proxy in the environment is for: one would refuse, or hold the key.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def open_directly(request: str | urllib.request.Request, timeout: float) -> AbstractContextManager[HTTPResponse]:
    """`urllib.request.urlopen`, for servers of this machine: never through a proxy.

    Args:
        request: an address, or a whole request.
        timeout: seconds.

    Raises:
        OSError: it does not answer, or with an error (`urllib.error.HTTPError`).
    """
    answer: HTTPResponse = _DIRECT.open(request, timeout=timeout)
    return answer


class Control:
    """Talks to one server. Nothing but the standard library, so that a watch costs nothing."""

    def __init__(self, url: str, key: str) -> None:
        """Remember where, and the key to the protected part."""
        self._url, self._key = url, key

    def ready(self) -> bool:
        """Whether the server and all its models are ready."""
        return self._answers("v2/health/ready")

    def model_ready(self, model: str) -> bool:
        """Whether a model is ready."""
        return self._answers(f"v2/models/{model}/ready")

    def states(self) -> dict[str, str]:
        """State of each model that was ever loaded: READY, LOADING, UNLOADING or UNAVAILABLE.

        Raises:
            ServerError: the server does not answer.
        """
        index = self._post("v2/repository/index", {}, timeout=10)
        return {str(entry["name"]): str(entry.get("state", "UNAVAILABLE")) for entry in index}

    def load(self, model: str, *, timeout: float = 300) -> None:
        """Load a model, and the ensembles that were waiting for it.

        Raises:
            ServerError: it cannot be loaded, or not in time.
        """
        self._post(f"v2/repository/models/{model}/load", {}, timeout=timeout)

    def unload(self, model: str, *, timeout: float = 60) -> None:
        """Take no more requests for a model; those that it has go on.

        Raises:
            ServerError: the server does not answer.
        """
        body = {"parameters": {"unload_dependents": False}}
        self._post(f"v2/repository/models/{model}/unload", body, timeout=timeout)

    def infer(self, model: str, body: Mapping[str, object], *, timeout: float) -> Any:
        """Send a request in JSON.

        Raises:
            ServerError: it was answered with an error, or not in time.
        """
        return self._post(f"v2/models/{model}/infer", body, timeout=timeout)

    def metric(self, url: str, name: str, model: str) -> float | None:
        """One of our own metrics of a model; None if the page does not have it, or there is no page.

        Args:
            url: of the metrics page.
            name: of the metric.
            model: its label.
        """
        try:
            with open_directly(url, 5) as answer:
                lines = answer.read().decode("utf-8", "replace").splitlines()
        except OSError:
            return None
        start = f'{name}{{model="{model}"}} '
        found = [line for line in lines if line.startswith(start)]
        return float(found[0].removeprefix(start)) if found else None

    def _answers(self, path: str) -> bool:
        try:
            with open_directly(f"{self._url}/{path}", 5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _post(self, path: str, body: Mapping[str, object], *, timeout: float) -> Any:
        request = urllib.request.Request(
            f"{self._url}/{path}", json.dumps(body).encode(), {ADMIN_HEADER: self._key}, method="POST"
        )
        try:
            with open_directly(request, timeout) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise ServerError(_reason(error.read()) or str(error)) from error
        except OSError as error:
            raise ServerError(f"the server at {self._url} does not answer: {error}", "UNAVAILABLE") from error
        return json.loads(text) if text.strip() else {}


def _reason(text: bytes) -> str:
    try:
        return str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        return text.decode("utf-8", "replace")
