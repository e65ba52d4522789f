"""What ``/openapi.json`` says beyond the routes' own parameters: bodies, answers, and which route leads to which."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from lfdm_export.pictures.gif import MAX_FPS
from lfdm_export.sampling.tuned import sampler_names
from lfdm_export.web.store import STATUSES
from lfdm_export.web.video_request import LONGEST_PROMPT

_REFUSALS = {
    400: "a parameter, the body or the picture cannot be used; the message says why",
    401: "the token is missing or wrong",
    404: "there is no such video, or its file is gone",
    406: "Accept names no type that the video has",
    409: "the video's status does not allow it",
    413: "the request is too large",
    429: "too many videos wait; see Retry-After",
}
_WHOLE: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": 2**64 - 1}
_OPTIONS: dict[str, Any] = {
    "seed": {**_WHOLE, "description": "of the noise; drawn where it is missing"},
    "steps": {"type": "integer", "minimum": 1, "description": "sampling steps"},
    "sampler": {"type": "string", "enum": list(sampler_names())},
    "eta": {"type": "number", "minimum": 0, "maximum": 1, "description": "share of fresh noise in DDIM"},
    "guidance_scale": {"type": "number", "description": "1: as trained"},
    "fps": {"type": "number", "minimum": 1, "maximum": MAX_FPS},
}
_FIELDS: dict[str, Any] = {
    "prompt": {
        "type": "string",
        "minLength": 1,
        "maxLength": LONGEST_PROMPT,
        "description": "a label of the model, or free text where it has a text encoder",
    },
    "model": {"type": "string"},
    "crop": {"type": "string", "description": "center, face, or X,Y,W,H in pixels"},
    "size": {"type": "string", "description": "WIDTHxHEIGHT of the model"},
    "seconds": {"type": "string", "description": "of the model's clips at that fps"},
    **_OPTIONS,
}
_ENCODED = {"type": "string", "description": "base64, or a data URL"}
_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {**_FIELDS, "input_reference": {"type": "string", "format": "binary"}},
                "required": ["prompt", "input_reference"],
                "additionalProperties": False,
            }
        },
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {
                    **_FIELDS,
                    "extra": {"type": "object", "properties": _OPTIONS, "additionalProperties": False},
                    "input_reference": {
                        "anyOf": [
                            _ENCODED,
                            {"type": "object", "properties": {"image_url": _ENCODED}, "required": ["image_url"]},
                        ]
                    },
                },
                "required": ["prompt", "input_reference"],
                "additionalProperties": False,
            }
        },
    },
}
_ERROR: dict[str, Any] = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}},
            "required": ["message", "type"],
        }
    },
    "required": ["error"],
}
_TEXT_OR_NOTHING = {"type": ["string", "null"]}
_VIDEO: dict[str, Any] = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "pattern": "^video_[0-9a-f]{32}$"},
        "object": {"const": "video"},
        "model": {"type": "string"},
        "status": {"enum": list(STATUSES)},
        "progress": {"type": "integer", "minimum": 0, "maximum": 100},
        "created_at": {"type": "integer"},
        "completed_at": {"type": ["integer", "null"]},
        "prompt": {"type": "string"},
        "seconds": {"type": "string"},
        "size": {"type": "string"},
        "error": {"type": ["object", "null"]},
        "extra": {"type": "object"},
    },
    "required": ["id", "object", "model", "status", "progress", "created_at", "prompt", "seconds", "size", "extra"],
}
_PAGE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "object": {"const": "list"},
        "data": {"type": "array", "items": _VIDEO},
        "has_more": {"type": "boolean"},
        "first_id": _TEXT_OR_NOTHING,
        "last_id": _TEXT_OR_NOTHING,
    },
    "required": ["object", "data", "has_more", "first_id", "last_id"],
}
_DELETED: dict[str, Any] = {
    "type": "object",
    "properties": {"id": {"type": "string"}, "object": {"const": "video.deleted"}, "deleted": {"const": True}},
    "required": ["id", "object", "deleted"],
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}


def answers(found: str, *refused: int) -> dict[int | str, dict[str, Any]]:
    """The answers of a route: 200 with a "video", a "page", "deleted", a "clip" or other "facts", and refusals."""
    content = {
        "video": {"application/json": {"schema": _VIDEO}},
        "page": {"application/json": {"schema": _PAGE}},
        "deleted": {"application/json": {"schema": _DELETED}},
        "clip": {"video/mp4": _BINARY, "image/gif": _BINARY},
        "facts": {"application/json": {"schema": {"type": "object"}}},
    }[found]
    described: dict[int | str, dict[str, Any]] = {200: {"description": found, "content": content}}
    for status in refused:
        described[status] = {"description": _REFUSALS[status], "content": {"application/json": {"schema": _ERROR}}}
    return described


def describe(app: FastAPI, *, with_token: bool) -> None:
    """Let the application's description have the body of a request, links between routes, and the token.

    Args:
        app: with all its routes.
        with_token: whether requests must carry one.
    """

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            described = get_openapi(title=app.title, version=app.version, routes=app.routes)
            operations = [found for path in described["paths"].values() for found in path.values()]
            for operation in operations:
                operation["responses"].pop("422", None)  # FastAPI's own; here it is 400
            create = described["paths"]["/v1/videos"]["post"]
            create["requestBody"] = _BODY
            create["responses"]["200"]["links"] = {
                operation["operationId"]: {
                    "operationId": operation["operationId"],
                    "parameters": {"path.name": "$response.body#/id"},
                }
                for path, methods in described["paths"].items()
                for operation in methods.values()
                if path.startswith("/v1/videos/{name}")
            }
            if with_token:
                described.setdefault("components", {})["securitySchemes"] = {
                    "token": {"type": "http", "scheme": "bearer"}
                }
                for path, methods in described["paths"].items():
                    for operation in methods.values() if path.startswith("/v1/") else ():
                        operation["security"] = [{"token": []}]
            app.openapi_schema = described
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
