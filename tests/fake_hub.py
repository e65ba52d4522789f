"""A local Hugging Face hub: the parts of its API that download and publish bundles."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Repository:
    """One repository: its commits, branches and tags."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Files, branch: str = "main") -> str:
        text = f"{len(self.commits)} {branch} {sorted(files)}"
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid] = dict(files)
        self.refs[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


class FakeHub:
    """The hub: repositories by name, and the received requests."""

    def __init__(self, token: str = "secret") -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.token = token
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fetched(self) -> list[str]:
        """Files whose content was requested."""
        reads = [request for request in self.requests if re.match("GET .*/resolve/", request)]
        return [request.rpartition("/resolve/")[2].partition("/")[2] for request in reads]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET")

    def do_HEAD(self) -> None:
        self._serve("HEAD")

    def do_POST(self) -> None:
        self._serve("POST")

    def _serve(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{method} {path}")
        writes = {
            "/api/repos/create": self._create,
            "/api/validate-yaml": self._validate,
        }
        if path in writes:
            writes[path](json.loads(body))
            return
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/(.+))?", path) or re.fullmatch(
            r"/([^/]+/[^/]+)/(resolve)/(.+)", path
        )
        repository = self.hub.repositories.get(found[1]) if found else None
        known = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if found is None or repository is None or (repository.private and not known):
            self._refuse(404 if known else 401, "RepoNotFound")
            return
        if method == "POST" and not known:
            self._refuse(403, "")
            return
        what, rest = found[2] or "revision", found[3] or "main"
        if what == "resolve":
            self._file(repository, *rest.split("/", 1))
        else:
            getattr(self, f"_{what}")(found[1], repository, rest, body)

    # --- Reading

    def _revision(self, name: str, repository: Repository, revision: str, _: bytes) -> None:
        oid = repository.resolve(revision)
        if oid is None:
            self._refuse(404, "RevisionNotFound")
            return
        siblings = [{"rfilename": file} for file in repository.commits[oid]]
        self._json({"id": name, "modelId": name, "sha": oid, "private": repository.private, "siblings": siblings})

    def _tree(self, name: str, repository: Repository, revision: str, _: bytes) -> None:
        oid = repository.resolve(revision)
        if oid is None:
            self._refuse(404, "RevisionNotFound")
            return
        files = repository.commits[oid].items()
        self._json([{"type": "file", "path": path, "size": len(data), "oid": _etag(data)} for path, data in files])

    def _file(self, repository: Repository, revision: str, path: str) -> None:
        oid = repository.resolve(revision)
        if oid is None:
            self._refuse(404, "RevisionNotFound")
            return
        data = repository.commits[oid].get(path)
        if data is None:
            self._refuse(404, "EntryNotFound", {"X-Repo-Commit": oid})
            return
        headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        self._answer(200, data, headers)

    # --- Writing

    def _create(self, wanted: dict[str, Any]) -> None:
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._refuse(401, "")
            return
        name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
        status = 409 if name in self.hub.repositories else 200
        if status == 200:
            private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            self.hub.repositories[name] = Repository(private)
            self.hub.repositories[name].commit({".gitattributes": b""})
        self._json({"url": f"{self.hub.address}/{name}", "id": name, "name": name}, status)

    def _validate(self, _: dict[str, Any]) -> None:
        self._json({"errors": [], "warnings": []})

    def _branch(self, name: str, repository: Repository, branch: str, _: bytes) -> None:
        status = 409 if branch in repository.refs else 200
        repository.refs.setdefault(branch, repository.refs["main"])
        self._json({}, status)

    def _preupload(self, name: str, repository: Repository, revision: str, body: bytes) -> None:
        files = [
            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
        ]
        self._json({"files": files})

    def _commit(self, name: str, repository: Repository, revision: str, body: bytes) -> None:
        files = dict(repository.commits[repository.refs[revision]])
        for line in body.splitlines():
            one = json.loads(line)
            if one["key"] == "file":
                assert one["value"]["encoding"] == "base64"
                files[one["value"]["path"]] = base64.b64decode(one["value"]["content"])
            elif one["key"] == "deletedFile":
                del files[one["value"]["path"]]
        oid = repository.commit(files, revision)
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.address}/{name}/commit/{oid}"})

    # --- Answers

    def _json(self, plain: object, status: int = 200) -> None:
        self._answer(status, json.dumps(plain).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        told = {**({"X-Error-Code": code} if code else {}), **(headers or {})}
        self._answer(status, json.dumps({"error": code or "refused"}).encode(), told)

    def _answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _etag(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
