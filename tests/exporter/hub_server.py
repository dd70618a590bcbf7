"""A Hugging Face hub on this machine: its endpoints for listing and downloading, with whatever goes wrong on the way.

Folders below `root` are repositories: ORG/REPO is the default branch, ORG/REPO@NAME another revision. Source of the
answers: what huggingface_hub asks for (hf_api.model_info with blobs, /resolve/ with ranges), and the hub's documented
error headers. Knows nothing about headrace.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LFS_FROM = 2000  # bytes; a file of this size or more is stored as git-lfs does
PIECE = 4096  # bytes sent at once


class Hub(BaseHTTPRequestHandler):
    """One server's requests; `serve_hub` makes a class of its own for each."""

    root: Path
    served: list[tuple[str, int, int]]  # file, first byte, bytes sent
    revisions: list[str]  # that files were asked for at
    token: str | None = None  # what must be shown
    gated = False
    ranges = True  # False: a Range is ignored, as some mirrors do
    cut: dict[str, int]  # file → bytes after which the connection is closed, once
    hold: dict[str, int]  # file → bytes after which nothing more comes until `go_on` is set, once
    go_on: threading.Event
    spoil: str | None = None  # a file whose content comes with another last byte
    sizes = True  # False: a mirror that states neither sizes nor hashes
    card: dict[str, Any]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, format: str, *args: object) -> None: ...

    def _answer(self, body: bool) -> None:
        words = self.path.split("?")[0].strip("/").split("/")
        if self.token and self.headers.get("Authorization") != f"Bearer {self.token}":
            if self.gated:
                return self._error(403, "GatedRepo")
            return self._error(401, "RepoNotFound")
        if words[:2] == ["api", "models"] and len(words) in (4, 6):
            return self._list(words[2:4], words[5] if len(words) == 6 else "main", body)
        if len(words) >= 5 and words[2] == "resolve":
            folder = self._folder(words[:2], words[3])
            name = "/".join(words[4:])
            if folder and (folder / name).is_file():
                self.revisions.append(words[3])
                return self._send_file(name, (folder / name).read_bytes(), body)
        return self._error(404, "RepoNotFound")

    def _folder(self, repository: list[str], revision: str) -> Path | None:
        """The folder of a branch or of a commit."""
        name = "/".join(repository)
        for folder in (self.root / repository[0]).glob(f"{repository[1]}*"):
            branch = folder.name.partition("@")[2] or "main"
            if folder.name.partition("@")[0] == repository[1] and revision in (branch, commit_of(name, branch)):
                return folder
        return None

    def _list(self, repository: list[str], revision: str, body: bool) -> None:
        name = "/".join(repository)
        if not (self.root / name).is_dir():
            return self._error(404, "RepoNotFound")
        folder = self._folder(repository, revision)
        if folder is None:
            return self._error(404, "RevisionNotFound")
        branch = folder.name.partition("@")[2] or "main"
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        siblings = [self._sibling(p.relative_to(folder).as_posix(), p.read_bytes()) for p in files]
        info = {"id": name, "sha": commit_of(name, branch), "siblings": siblings, "cardData": self.card}
        return self._send(json.dumps(info).encode(), body)

    def _sibling(self, name: str, data: bytes) -> dict[str, Any]:
        if not self.sizes:
            return {"rfilename": name}
        told: dict[str, Any] = {"rfilename": name, "size": len(data)}
        told["blobId"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        if len(data) >= LFS_FROM:
            told["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return told

    def _send_file(self, name: str, data: bytes, body: bool) -> None:
        if name == self.spoil:
            data = data[:-1] + bytes([data[-1] ^ 1])
        asked, begin = self.headers.get("Range"), 0
        if asked and self.ranges:
            begin = int(asked.removeprefix("bytes=").split("-")[0])
            if begin >= len(data):
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        if not body:
            return
        stop, place = min(self.cut.pop(name, len(data)), len(data)), begin
        hold = self.hold.pop(name, None)
        try:
            while place < stop:
                end = min(place + PIECE, stop)
                self.wfile.write(data[place:end])
                place = end
                if hold is not None and place >= hold:
                    self.go_on.wait()
        except OSError:
            pass  # whoever asked has gone
        self.served.append((name, begin, place - begin))
        if place < len(data):
            self.close_connection = True
            self.connection.close()

    def _error(self, status: int, code: str) -> None:
        self._send(b'{"error": "no"}', True, status, {"X-Error-Code": code})

    def _send(self, data: bytes, body: bool, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


def commit_of(repository: str, branch: str = "main") -> str:
    """The commit a branch is at."""
    return hashlib.sha1(f"{repository}@{branch}".encode()).hexdigest()


@contextmanager
def serve_hub(root: Path) -> Iterator[tuple[str, type[Hub]]]:
    """The address of a hub of the repositories below `root`, and its class, whose attributes say what goes wrong."""
    fresh = {"root": root, "served": [], "revisions": [], "cut": {}, "card": {}, "hold": {}, "go_on": threading.Event()}
    handler = type("TestHub", (Hub,), fresh)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", handler
    finally:
        handler.go_on.set()
        server.shutdown()
        thread.join()
        server.server_close()
