"""Clients of a server: `Client` for synchronous programs, `AsyncClient` for asyncio.

Requires Triton's client (extra `client`); requires neither PyTorch nor ONNX.

Examples:
    >>> from lfdm_export.client import Client
    >>> with Client("localhost:8001") as client:
    ...     client.generate("face.jpg", label="happiness", seed=0).save("happiness.gif")
"""

from lfdm_export.client.asynchronous import AsyncClient
from lfdm_export.client.events import Done, Event, Frames, Preview, Progress
from lfdm_export.client.health import Health
from lfdm_export.client.settings import Retry, Settings, Tls, token_from_environment
from lfdm_export.client.stream import AsyncStream, Stream
from lfdm_export.client.sync import Client
from lfdm_export.protocol.contract import RequestCancelledError
from lfdm_export.protocol.model_facts import ModelFacts

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Client",
    "Done",
    "Event",
    "Frames",
    "Health",
    "ModelFacts",
    "Preview",
    "Progress",
    "RequestCancelledError",
    "Retry",
    "Settings",
    "Stream",
    "Tls",
    "token_from_environment",
]
