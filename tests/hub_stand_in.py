"""The part of the Hugging Face hub's API that repositories of models need, on loopback: making, committing, reading."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Files = dict[str, bytes]


class Hub:
    """Repositories by name, branches by name inside, files by name inside those."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Files]] = {}
        self.private: dict[str, bool] = {}
        self.asked: list[str] = []  # "METHOD path"
        self.endpoint = ""

    def revision(self, files: Files) -> str:
        """A commit's name: forty hexadecimal digits."""
        return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()

    def found(self, name: str, revision: str) -> Files | None:
        """The files of a branch or of a commit."""
        branches = self.repositories.get(name, {})
        named = {self.revision(files): files for files in branches.values()} | branches
        return named.get(revision)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, value: Any = None, headers: dict[str, str] | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value or {}).encode()
        self.send_response(status)
        for key, text in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self) -> None:
        self.hub.asked.append(f"POST {self.path}")
        body = self._body()
        if self.headers.get("Authorization") != "Bearer hf_stand_in":
            return self._answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name in self.hub.repositories:
                return self._answer(409, {"error": "You already created this model repo"})
            self.hub.repositories[name], self.hub.private[name] = (
                {"main": {}},
                (
                    asked.get("private") is True or asked.get("visibility") == "private"  # by the client's release
                ),
            )
            return self._answer(200, {"url": f"{self.hub.endpoint}/{name}"})
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/(.+)/branch/(.+)", self.path):
            branches = self.hub.repositories[found[1]]
            branches.setdefault(found[2], dict(branches["main"]))
            return self._answer(200)
        if found := re.fullmatch(r"/api/models/(.+)/preupload/(.+)", self.path):
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            return self._answer(200, {"files": [file | {"shouldIgnore": False} for file in files]})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^?]+).*", self.path):
            files = self.hub.repositories[found[1]][found[2]]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = self.hub.revision(files)
            url = f"{self.hub.endpoint}/{found[1]}/commit/{commit}"
            return self._answer(200, {"commitUrl": url, "commitOid": commit, "success": True})
        return self._answer(404, {"error": f"nothing at {self.path}"})

    def do_GET(self) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^?]+))?(?:\?.*)?", self.path):
            files = self.hub.found(found[1], found[2] or "main")
            if files is None:
                return self._missing(found[1])
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            told = {"id": found[1], "modelId": found[1], "sha": self.hub.revision(files), "siblings": siblings}
            return self._answer(200, told | {"private": self.hub.private[found[1]], "tags": [], "downloads": 0})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^?]+).*", self.path):
            files = self.hub.found(found[1], found[2])
            if files is None:
                return self._missing(found[1])
            listed = [{"type": "file", "path": n, "size": len(d), "oid": _oid(d)} for n, d in files.items()]
            return self._answer(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path):
            files = self.hub.found(found[1], found[2])
            if files is None or found[3] not in files:
                return self._missing(found[1])
            data = files[found[3]]
            return self._answer(200, data, {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": self.hub.revision(files)})
        return self._missing(self.path)

    do_HEAD = do_GET

    def _missing(self, name: str) -> None:
        code = "RevisionNotFound" if name in self.hub.repositories else "RepoNotFound"
        self._answer(404, {"error": "not found"}, {"X-Error-Code": code, "X-Error-Message": "not found"})


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def hub_stand_in() -> Iterator[Hub]:
    """Inside, the hub is there; its `endpoint` is what HF_ENDPOINT has to say, and HF_TOKEN hf_stand_in."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
