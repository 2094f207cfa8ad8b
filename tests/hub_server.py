"""A stand-in of the Hugging Face Hub's HTTP API for its real client: repositories, branches, uploads and commits."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_a-token-that-must-not-be-seen"
_ROUTES: list[tuple[str, re.Pattern[str], str]] = [
    ("POST", re.compile(r"/api/repos/create"), "create"),
    ("POST", re.compile(r"/api/validate-yaml"), "validate"),
    ("POST", re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)"), "branch"),
    ("POST", re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)"), "preupload"),
    ("POST", re.compile(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch"), "batch"),
    ("PUT", re.compile(r"/blobs/(?P<oid>[0-9a-f]+)"), "upload"),
    ("POST", re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)"), "commit"),
    ("GET", re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)"), "info"),
    ("GET", re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)"), "info"),
    ("GET", re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/.*)?"), "tree"),
    ("GET", re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)"), "file"),
    ("HEAD", re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)"), "file"),
]


@dataclass
class Hub:
    """What it holds, what it was asked, and which requests it answers badly."""

    endpoint: str = ""
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    """Repository -> branch -> name -> content."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, str, str]] = field(default_factory=list)
    """Repository, branch and summary."""
    requests: list[str] = field(default_factory=list)
    fault: Callable[[str, int], int | None] = lambda request, seen: None  # noqa: ARG005
    """Given "METHOD /path" and how many of them came before: the status of an error."""

    def use(self, environment: Any) -> None:
        """Name it in the environment of a process that has not imported the client."""
        environment.update(HF_ENDPOINT=self.endpoint, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="0")


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    """Within it the server runs."""
    hub, lock = Hub(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.partition("?")[0]
            with lock:
                seen = hub.requests.count(f"{self.command} {path}")
                hub.requests.append(f"{self.command} {path}")
                status = hub.fault(f"{self.command} {path}", seen)
                if status is None and f"Bearer {TOKEN}" != self.headers.get("Authorization") and "/blobs/" not in path:
                    status = 401
                status, answer = (status, b"{}") if status else self.route(path, body)
            self.send_response_only(status)
            for name, value in {
                "Content-Length": str(len(answer)),
                "X-Repo-Commit": "c" * 40,
                "ETag": f'"{hashlib.sha1(answer).hexdigest()}"',
                "Content-Type": "application/json",
            }.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer)

        do_GET = do_PUT = do_POST = do_HEAD = handle_any  # noqa: N815

        def route(self, path: str, body: bytes) -> tuple[int, bytes]:
            for method, pattern, name in _ROUTES:
                if method == self.command and (match := pattern.fullmatch(path)):
                    result = _ACTS[name](hub, body, **match.groupdict())
                    if isinstance(result, tuple):
                        return result[0], json.dumps(result[1]).encode()
                    if isinstance(result, int):
                        return result, b"{}"
                    return 200, result if isinstance(result, bytes) else json.dumps(result).encode()
            return 404, b"{}"

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.daemon_threads = True
        hub.endpoint = f"http://127.0.0.1:{httpd.server_address[1]}"
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            httpd.shutdown()
            thread.join()


def _create(hub: Hub, body: bytes) -> Any:
    asked = json.loads(body)
    name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
    answer = {"url": f"{hub.endpoint}/{name}", "name": name, "id": name}
    if name in hub.repositories:
        return 409, answer
    hub.repositories[name] = {"main": {".gitattributes": b"*.safetensors filter=lfs\n"}}
    return answer


def _validate(hub: Hub, body: bytes) -> Any:  # noqa: ARG001
    return {"errors": [], "warnings": []}


def _branch(hub: Hub, body: bytes, repo: str, revision: str) -> Any:  # noqa: ARG001
    if repo not in hub.repositories:
        return 404
    if revision in hub.repositories[repo]:
        return 409
    hub.repositories[repo][revision] = dict(hub.repositories[repo]["main"])
    return {}


def _preupload(hub: Hub, body: bytes, repo: str, revision: str) -> Any:
    if revision not in hub.repositories.get(repo, {}):
        return 404
    files = json.loads(body)["files"]
    return {
        "files": [
            {
                "path": one["path"],
                "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for one in files
        ]
    }


def _batch(hub: Hub, body: bytes, repo: str) -> Any:  # noqa: ARG001
    objects = []
    for one in json.loads(body)["objects"]:
        known = one["oid"] in hub.blobs
        upload = {"upload": {"href": f"{hub.endpoint}/blobs/{one['oid']}", "header": {}}}
        objects.append({"oid": one["oid"], "size": one["size"], **({} if known else {"actions": upload})})
    return {"transfer": "basic", "objects": objects}


def _upload(hub: Hub, body: bytes, oid: str) -> Any:
    if hashlib.sha256(body).hexdigest() != oid:
        return 400
    hub.blobs[oid] = body
    return b""


def _commit(hub: Hub, body: bytes, repo: str, revision: str) -> Any:
    branch = hub.repositories[repo].get(revision)
    if branch is None:
        return 404
    lines = [json.loads(line) for line in body.splitlines()]
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            branch[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            branch[value["path"]] = hub.blobs[value["oid"]]
        elif line["key"] == "deletedFile":
            del branch[value["path"]]
        elif line["key"] == "header":
            hub.commits.append((repo, revision, value["summary"]))
    return {"commitUrl": f"{hub.endpoint}/{repo}/commit/{'c' * 40}", "commitOid": "c" * 40, "success": True}


def _info(hub: Hub, body: bytes, repo: str, revision: str = "main") -> Any:  # noqa: ARG001
    branch = hub.repositories.get(repo, {}).get(revision)
    if branch is None:
        return 404
    files = [{"rfilename": name, "size": len(data)} for name, data in branch.items()]
    return {"id": repo, "modelId": repo, "sha": "c" * 40, "siblings": files, "tags": [], "private": True}


def _tree(hub: Hub, body: bytes, repo: str, revision: str) -> Any:  # noqa: ARG001
    branch = hub.repositories.get(repo, {}).get(revision)
    if branch is None:
        return 404
    return [
        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        for name, data in branch.items()
    ]


def _file(hub: Hub, body: bytes, repo: str, revision: str, name: str) -> Any:  # noqa: ARG001
    branches = hub.repositories.get(repo, {})
    branch = branches.get(revision) or next((one for one in branches.values() if name in one), {})
    return branch.get(name, 404)


_ACTS: dict[str, Callable[..., Any]] = {
    "create": _create,
    "validate": _validate,
    "branch": _branch,
    "preupload": _preupload,
    "batch": _batch,
    "upload": _upload,
    "commit": _commit,
    "info": _info,
    "tree": _tree,
    "file": _file,
}
