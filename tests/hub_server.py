"""A local model hub: the part of the real one's interface that huggingface_hub uses, with its refusals."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants


@dataclass
class Hub:
    """Repositories with a folder per revision. `asked` has the requested paths; files in `cut` break off once."""

    url: str = ""
    repositories: dict[str, dict[str, Path]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cut: set[str] = field(default_factory=set)
    asked: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, repo: str, folder: Path, revision: str = "main") -> str:
        """Publishes a folder; returns its commit."""
        commit = hashlib.sha1(f"{repo}{folder}".encode()).hexdigest()
        self.repositories.setdefault(repo, {}).update({revision: folder, commit: folder})
        return commit

    def files(self) -> list[str]:
        """The names of the files whose contents were requested."""
        return [
            path.split("/resolve/")[1].split("/", 1)[1]
            for verb, path, _ in self.asked
            if verb == "GET" and "/resolve/" in path
        ]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path, self.headers.get("Range", "")))
        if path.startswith("/api/models/"):
            owner, name, *rest = path.removeprefix("/api/models/").split("/")
            kind, revision = (*rest, "", "main")[:2] if rest else ("", "main")
        elif path.count("/") > 4:
            owner, name, kind, revision, *within = path.strip("/").split("/")
        else:
            self._refuse(404, "EntryNotFound")
            return
        repo = f"{owner}/{name}"
        revisions = self.hub.repositories.get(repo)
        if revisions is None:
            self._refuse(401, "RepoNotFound")
        elif revision not in revisions:
            self._refuse(404, "RevisionNotFound")
        elif kind in ("", "revision"):
            commit = next(c for c, folder in revisions.items() if len(c) == 40 and folder == revisions[revision])
            self._json({"id": repo, "sha": commit, "siblings": [], "private": False, "tags": []})
        elif kind == "tree":
            folder = revisions[revision]
            found = sorted(f for f in folder.rglob("*") if f.is_file())
            listed = [
                {"type": "file", "path": str(f.relative_to(folder)), "size": f.stat().st_size, "oid": _digest(f)}
                for f in found
            ]
            self._json(listed)
        elif repo in self.hub.gated:
            self._refuse(403, "GatedRepo")
        else:
            self._send(revisions[revision] / "/".join(within), revision)

    def _send(self, file: Path, commit: str) -> None:
        if not file.is_file():
            self._refuse(404, "EntryNotFound")
            return
        content = file.read_bytes()
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{_digest(file)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        if file.name in self.hub.cut:
            self.hub.cut.remove(file.name)
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(content[start:])

    def _json(self, value: object) -> None:
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _refuse(self, status: int, word: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", word)
        self.send_header("X-Error-Message", word)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Runs a hub until the block ends."""
    hub = Hub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def use(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Points huggingface_hub in this process at this hub, with its cache in a folder."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
