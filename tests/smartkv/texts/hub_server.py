"""A hub of data sets on the loopback interface: what `datasets` and `huggingface_hub` ask of one that they stream."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

Repositories = dict[str, dict[str, bytes]]  # repository -> path -> content
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub_server(repositories: Repositories) -> Iterator[str]:
    """Serve data sets; yields the endpoint, for HF_ENDPOINT."""

    class Handler(_Handler):
        served = repositories

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: ClassVar[Repositories] = {}
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            self._json(match[1], lambda files: {
                "id": match[1], "sha": COMMIT, "private": False, "gated": False, "tags": [], "downloads": 0, "likes": 0,
                "siblings": [{"rfilename": name} for name in files],
            })  # fmt: skip
        elif match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/[^/]+(?:/(.*))?", path):
            below = f"{match[2]}/" if match[2] else ""
            self._json(match[1], lambda files: _tree(files, below, "recursive=true" in self.path.lower()))
        elif match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._file(self.served.get(match[1], {}).get(match[2]))
        else:
            self._send(404, b"{}")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        match = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/[^/]+", unquote(urlsplit(self.path).path))
        if match is None:
            self._send(404, b"{}")
            return
        asked = re.findall(r"paths=([^&]+)", body.decode()) or json.loads(body or b"{}").get("paths", [])
        wanted = [unquote(path) for path in asked]
        self._json(match[1], lambda files: [entry for entry in _tree(files, "", True) if entry["path"] in wanted])

    def _json(self, repository: str, answer: Any) -> None:
        if repository not in self.served:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        self._send(200, json.dumps(answer(self.served[repository])).encode(), {"Content-Type": "application/json"})

    def _file(self, content: bytes | None) -> None:
        if content is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        headers = {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            self._send(200, content, headers)
            return
        first, last = int(span[1]), min(int(span[2] or len(content) - 1), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._send(206, content[first : last + 1], headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _tree(files: dict[str, bytes], below: str, recursive: bool) -> list[dict[str, Any]]:
    """Entries of a folder as the hub lists them."""
    entries: dict[str, dict[str, Any]] = {}
    for path, content in files.items():
        if not path.startswith(below):
            continue
        parts = path.removeprefix(below).split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            folder = below + "/".join(parts[:depth])
            entries[folder] = {"type": "directory", "path": folder, "oid": _digest(folder.encode()), "size": 0}
        if recursive or len(parts) == 1:
            entries[path] = {"type": "file", "path": path, "oid": _digest(content), "size": len(content)}
    return list(entries.values())
