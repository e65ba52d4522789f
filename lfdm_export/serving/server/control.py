"""Control of a running server: readiness, loading and unloading models, small requests."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from http.client import HTTPResponse
from typing import Any

from lfdm_export.client.settings import import_grpc, import_protocol
from lfdm_export.client.wire import infer_request
from lfdm_export.errors import ServerError
from lfdm_export.protocol.contract import Array, WireTensor

# The server is on this machine: a proxy named in the environment must not be used for it.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def open_directly(request: str | urllib.request.Request, timeout: float) -> AbstractContextManager[HTTPResponse]:
    """`urllib.request.urlopen` without a proxy, for servers on this machine.

    Args:
        request: a URL or a request.
        timeout: seconds.

    Raises:
        OSError: no answer, or an HTTP error (`urllib.error.HTTPError`).
    """
    answer: HTTPResponse = _DIRECT.open(request, timeout=timeout)
    return answer


class Control:
    """A client of one server process over its private socket, which no other user can reach. It is thread-safe."""

    def __init__(self, target: str) -> None:
        """Prepare the channel, which connects at the first call.

        Args:
            target: gRPC address of the socket.

        Raises:
            MissingDependencyError: gRPC or Triton's client is not installed.
        """
        self._grpc, (self._messages, stubs) = import_grpc(), import_protocol()
        options = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 200))
        self._channel = self._grpc.insecure_channel(target, options)
        self._stub = stubs.GRPCInferenceServiceStub(self._channel)

    def close(self) -> None:
        """End all calls."""
        self._channel.close()

    def ready(self) -> bool:
        """Whether the server and all its models are ready."""
        try:
            return bool(self._stub.ServerReady(self._messages.ServerReadyRequest(), timeout=5).ready)
        except self._grpc.RpcError:
            return False

    def model_ready(self, model: str) -> bool:
        """Whether a model is ready."""
        try:
            return bool(self._stub.ModelReady(self._messages.ModelReadyRequest(name=model), timeout=5).ready)
        except self._grpc.RpcError:
            return False

    def load(self, model: str, *, timeout: float = 300) -> None:
        """Load a model, and the ensembles that wait for it.

        Raises:
            ServerError: the model cannot be loaded in time.
        """
        self._ask("RepositoryModelLoad", self._messages.RepositoryModelLoadRequest(model_name=model), timeout)

    def unload(self, model: str, *, timeout: float = 60) -> None:
        """Accept no more requests for a model; those in flight continue.

        Raises:
            ServerError: the server does not answer.
        """
        request = self._messages.RepositoryModelUnloadRequest(model_name=model)
        request.parameters["unload_dependents"].bool_param = False
        self._ask("RepositoryModelUnload", request, timeout)

    def infer(self, model: str, inputs: Sequence[WireTensor], tensors: Mapping[str, Array], *, timeout: float) -> Any:
        """Send an inference request, and return Triton's response.

        Raises:
            ServerError: the answer is an error, or does not come in time.
        """
        return self._ask("ModelInfer", infer_request(model, inputs, tensors), timeout)

    def _ask(self, method: str, request: Any, timeout: float) -> Any:
        try:
            return getattr(self._stub, method)(request, timeout=timeout)
        except self._grpc.RpcError as error:
            raise ServerError(error.details() or error.code().name, error.code().name) from error
        except ValueError as error:  # the channel is closed
            raise ServerError(f"the server is being stopped ({error})", "CANCELLED") from error
