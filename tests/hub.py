"""A stand-in of the Hugging Face hub on this machine: what pushing a model, loading it again and reading data
sets ask for."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right"


class Hub:
    """Repositories in memory.

    Attributes:
        files: repository -> branch -> name -> content.
        commits: repository, branch and message of every commit.
        private: repository -> the visibility that was asked for.
        url: where it listens.
        sent: name -> how many bytes of the file have been sent.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, dict[str, bytes]]] = {}
        self.commits: list[tuple[str, str, str]] = []
        self.private: dict[str, str | None] = {}
        self.url = ""
        self.sent: Counter[str] = Counter()

    def sha(self, repository: str, branch: str) -> str:
        names = json.dumps(
            {n: hashlib.sha1(c).hexdigest() for n, c in self.files[repository][branch].items()}
        )
        return hashlib.sha1(names.encode()).hexdigest()

    def branch(self, repository: str, revision: str) -> str | None:
        """The branch that a revision, a branch or its newest commit, names."""
        branches = self.files.get(repository, {})
        return next((b for b in branches if revision in (b, self.sha(repository, b))), None)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[:2] in (["api", "models"], ["api", "datasets"]):
            repository, rest = "/".join(parts[2:4]), parts[4:]
            revision = rest[1] if len(rest) > 1 else "main"
            branch = self.hub.branch(repository, revision)
            if branch is None:
                self._missing("RepoNotFound" if repository not in self.hub.files else "RevisionNotFound")
                return
            files = self.hub.files[repository][branch]
            if rest[2:]:  # there are no folders
                self._missing("EntryNotFound")
                return
            if rest[:1] == ["tree"]:
                tree = [{"type": "file", "path": n, "size": len(c), "oid": ""} for n, c in files.items()]
                self._json(tree)
                return
            siblings = [{"rfilename": name} for name in files]
            self._json({"id": repository, "sha": self.hub.sha(repository, branch), "siblings": siblings})
            return
        parts = parts[1:] if parts[:1] == ["datasets"] else parts
        if parts[2:3] != ["resolve"]:
            self._missing("RepoNotFound")
            return
        repository, (revision, *names) = "/".join(parts[:2]), parts[3:]
        branch = self.hub.branch(repository, revision)
        if branch is None or "/".join(names) not in self.hub.files[repository][branch]:
            self._missing("RepoNotFound" if branch is None else "EntryNotFound")
            return
        content = self.hub.files[repository][branch]["/".join(names)]
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": self.hub.sha(repository, branch),
        }
        code, part = 200, content
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            code, part = 206, content[int(first) : int(last) + 1 if last else None]
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        if self.command == "GET":
            self.hub.sent["/".join(names)] += len(part)
        self._answer(code, part, headers)

    def do_POST(self) -> None:
        body = (
            self.rfile.read(int(self.headers["Content-Length"])) if "Content-Length" in self.headers else b""
        )
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, b"{}", {})
        elif parts == ["api", "validate-yaml"]:
            self._json({"errors": [], "warnings": []})
        elif parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = "/".join(part for part in (asked["organization"] or "me", asked["name"]))
            known = name in self.hub.files
            if not known:
                self.hub.files[name] = {"main": {}}
                self.hub.private[name] = asked.get("visibility")
            self._json({"url": f"{self.hub.url}/{name}"}, 409 if known else 200)
        elif parts[4] == "branch":
            branches = self.hub.files["/".join(parts[2:4])]
            branches.setdefault(parts[5], dict(branches["main"]))
            self._json({})
        elif parts[4] == "preupload":
            files = [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            self._json({"files": files})
        else:
            self._commit("/".join(parts[2:4]), parts[5], body)

    def _commit(self, repository: str, branch: str, body: bytes) -> None:
        files = self.hub.files[repository][branch]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.hub.commits.append((repository, branch, value["summary"]))
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        sha = self.hub.sha(repository, branch)
        self._json({"commitUrl": f"{self.hub.url}/{repository}/commit/{sha}", "commitOid": sha})

    def _missing(self, code: str) -> None:
        self._answer(404, b"{}", {"X-Error-Code": code})

    def _json(self, value: Any, code: int = 200) -> None:
        self._answer(code, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, code: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub without repositories."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
