"""A Hub on this machine, for the unmodified client of `huggingface_hub`, and faults to put between the two.

It speaks what the client speaks without Xet: accounts, repos of models and of datasets, commits, branches, tags, pull
requests, Git-LFS, and downloads with ranges. As on the Hub, every commit is a state of all files, contents are checked
against their hashes, a private repo does not exist for strangers, and large files live at another host, which must
never see a token.
"""

import asyncio
import base64
import hashlib
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote

import uvicorn
import yaml
from huggingface_hub import ModelCard
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

LFS_SUFFIXES = (".bin", ".parquet", ".pkl", ".png", ".pt", ".safetensors")
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()

DATASETS = "datasets/"  # in front of their names
TOKEN = "hf_" + "wRiTeTokenOfTheTests" * 2  # looks like one, so that everything that looks for tokens finds it
READ_TOKEN = "hf_" + "ReadTokenOfTheTests" * 2
STRANGER = "hf_" + "StrangersTokenOfTests" * 2


# --- What is stored ---


@dataclass(frozen=True)
class File:
    """A file of a commit; the content of a large one is in the store of large files."""

    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """Git's hash of the file, or of the pointer that stands for a large one."""
        data = self.content
        if self.large:
            data = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(data)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class Commit:
    """State of all files, with its parent."""

    files: Mapping[str, File]
    title: str
    parent: str | None

    @property
    def oid(self) -> str:
        tree = "".join(f"{name} {file.oid}\n" for name, file in sorted(self.files.items()))
        return hashlib.sha1(f"{self.parent}\n{self.title}\n{tree}".encode()).hexdigest()


@dataclass
class Repo:
    """Commits, branches, tags and pull requests."""

    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> str | None:
        for names in (self.branches, self.tags, self.pull_requests):
            if revision in names:
                return names[revision]
        return revision if revision in self.commits else None

    def add(self, commit: Commit) -> str:
        self.commits[commit.oid] = commit
        return commit.oid


@dataclass(frozen=True)
class Account:
    """Owner of a token, and the right to write."""

    name: str
    writes: bool = True


# --- Faults ---


@dataclass
class Fault:
    """Fault that happens to some requests.

    Attributes:
        method: Method of the request.
        path: Regular expression that is searched for in its path.
        first: Number of the first matching request that it happens to, from 1.
        times: Number of requests that it happens to.
        status: Answer with this status, and do nothing.
        headers: Headers of that answer.
        body: Body of that answer.
        cut: "before" the request is looked at, "within" its body, or "after" it was done and before the answer.
        keep: Cut the connection after this many bytes of the answer's body.
        corrupt: Change what arrives: "request" or "response".
    """

    method: str
    path: str
    first: int = 1
    times: int = 1
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str = '{"error": "injected"}'
    cut: str | None = None
    keep: int | None = None
    corrupt: str | None = None
    seen: int = 0

    def applies(self, method: str, path: str) -> bool:
        if method != self.method or not re.search(self.path, path):
            return False
        self.seen += 1
        return self.first <= self.seen < self.first + self.times


class _Connections(H11Protocol):
    """Remember the transport of each connection, so that a fault can cut it."""

    open: dict[Any, asyncio.Transport] = {}

    def connection_made(self, transport: Any) -> None:
        self.open[transport.get_extra_info("peername")[:2]] = transport
        super().connection_made(transport)


class _Faulty:
    """App with faults in front of it, and a record of its requests."""

    def __init__(self, app: Any, hub: "Hub") -> None:
        self.app, self.hub = app, hub

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[..., Any]) -> None:
        method, path = scope["method"], scope["path"]
        authorized = any(name == b"authorization" for name, _ in scope["headers"])
        self.hub.requests.append((method, path, authorized))
        fault = next((fault for fault in list(self.hub.faults) if fault.applies(method, path)), None)
        if fault is None:
            return await self.app(scope, receive, send)
        self.hub.injected += 1
        if fault.status is not None:
            await _read(receive)
            headers = {"content-type": "application/json", **fault.headers}
            return await Response(fault.body, fault.status, headers)(scope, receive, send)
        if fault.cut in ("before", "within"):
            if fault.cut == "within":
                await receive()  # the first piece of the body
            return await self._cut(scope)
        if fault.cut == "after":
            await self.app(scope, receive, _ignore)
            return await self._cut(scope)
        if fault.corrupt == "request":
            body = await _read(receive)
            return await self.app(scope, _giving(_damaged(body)), send)
        await self.app(scope, receive, self._altering(scope, send, fault))

    async def _cut(self, scope: Any) -> None:
        _Connections.open[scope["client"]].abort()
        await asyncio.sleep(0.02)  # until the server has noticed

    def _altering(self, scope: Any, send: Callable[..., Any], fault: Fault) -> Callable[..., Any]:
        async def altered(message: Any) -> None:
            if message["type"] == "http.response.body" and message.get("body"):
                if fault.corrupt:
                    message = {**message, "body": _damaged(message["body"])}
                if fault.keep is not None:
                    await send({**message, "body": message["body"][: fault.keep], "more_body": True})
                    await asyncio.sleep(0.02)  # until it is sent
                    return await self._cut(scope)
            await send(message)

        return altered


async def _read(receive: Callable[[], Awaitable[Any]]) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


def _giving(body: bytes) -> Callable[[], Awaitable[Any]]:
    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


async def _ignore(message: Any) -> None:
    pass


def _damaged(body: bytes) -> bytes:
    return body[:-1] + bytes([body[-1] ^ 1])


# --- The Hub ---


class Refusal(Exception):
    """Answer with an error, and with the headers from which the client makes its exception."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        self.response = JSONResponse(
            {"error": message},
            status,
            {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})},
        )


class Hub:
    """Accounts, repos and large files, and the app that serves them."""

    def __init__(self) -> None:
        self.endpoint = self.storage = ""
        self.clear()
        self.app = _Faulty(
            Starlette(
                routes=[
                    Route("/api/whoami-v2", self.whoami),
                    Route("/api/validate-yaml", self.validate_yaml, methods=["POST"]),
                    Route("/api/repos/create", self.create, methods=["POST"]),
                    Route("/storage/{sha256}", self.upload, methods=["PUT"]),
                    Route("/storage/{sha256}", self.stored, methods=["GET", "HEAD"]),
                    *self._routes("/api/datasets", "/" + DATASETS),
                    *self._routes("/api/models", "/"),
                ],
                exception_handlers={Refusal: lambda request, refusal: refusal.response},
            ),
            self,
        )

    def _routes(self, api: str, files: str) -> list[Route]:
        """Routes of one type of repo."""
        repo, files = api + "/{owner}/{name}", files + "{owner}/{name}"
        return [
            Route(repo, self.info),
            Route(repo + "/revision/{revision:path}", self.info),
            Route(repo + "/refs", self.refs),
            Route(repo + "/tree/{revision:path}", self.tree),
            Route(repo + "/paths-info/{revision:path}", self.paths_info, methods=["POST"]),
            Route(repo + "/preupload/{revision:path}", self.preupload, methods=["POST"]),
            Route(repo + "/commit/{revision:path}", self.commit, methods=["POST"]),
            Route(repo + "/branch/{branch:path}", self.branch, methods=["POST"]),
            Route(repo + "/tag/{revision:path}", self.tag, methods=["POST"]),
            Route(files + ".git/info/lfs/objects/batch", self.batch, methods=["POST"]),
            Route(files + "/resolve/{rest:path}", self.resolve, methods=["GET", "HEAD"]),
        ]

    def clear(self) -> None:
        """Forget everything."""
        self.accounts: dict[str, Account] = {}
        self.repos: dict[str, Repo] = {}  # "owner/name", and for datasets "datasets/owner/name"
        self.large: dict[str, bytes] = {}  # SHA-256 -> content
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, bool]] = []  # method, path, True if there was a token
        self.injected = 0
        self.secret = secrets.token_hex(8)  # in the addresses that the storage accepts

    # Read by tests

    def state(self, repo_id: str) -> dict[str, dict[str, str]] | None:
        """Each branch, tag and pull request with the SHA-256 of its files; `None` if there is no such repo."""
        if repo_id not in self.repos:
            return None
        repo = self.repos[repo_id]
        names = {**repo.branches, **repo.tags, **repo.pull_requests}
        return {
            name: {path: file.sha256 for path, file in repo.commits[oid].files.items()} for name, oid in names.items()
        }

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Return the contents at a revision, by name."""
        repo = self.repos[repo_id]
        commit = repo.commits[repo.find(revision) or ""]
        return {path: file.content for path, file in commit.files.items() if path != ".gitattributes"}

    def titles(self, repo_id: str, revision: str = "main") -> list[str]:
        """List the titles of the commits, newest first, without the one that made the repo."""
        repo, found = self.repos[repo_id], []
        oid = repo.find(revision)
        while oid is not None and (commit := repo.commits[oid]).parent is not None:
            found.append(commit.title)
            oid = commit.parent
        return found

    def put(self, repo_id: str, files: Mapping[str, bytes] | Path, private: bool = False) -> str:
        """Commit files without any client."""
        if isinstance(files, Path):
            folder = files
            files = {
                path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
            }
        repo = self.repos.setdefault(repo_id, Repo(private))
        stored = {path: File(content, path.endswith(LFS_SUFFIXES)) for path, content in files.items()}
        parent = repo.branches.get("main")
        oid = repo.add(Commit({**({} if parent is None else repo.commits[parent].files), **stored}, "put", parent))
        repo.branches["main"] = oid
        return oid

    def everything(self) -> bytes:
        """Join everything that was ever stored, to search it."""
        commits = [commit for repo in self.repos.values() for commit in repo.commits.values()]
        parts = [content for commit in commits for file in commit.files.values() for content in (file.content,)]
        return b"\n".join([*parts, *self.large.values(), *(commit.title.encode() for commit in commits)])

    # Authorization

    def account(self, request: Request) -> Account | None:
        header = request.headers.get("authorization")
        if header is None:
            return None
        account = self.accounts.get(header.removeprefix("Bearer "))
        if account is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return account

    def repo_of(self, request: Request, write: bool = False) -> tuple[str, Repo]:
        repo_id = "{owner}/{name}".format(**request.path_params)
        if request.url.path.startswith(("/api/" + DATASETS, "/" + DATASETS)):
            repo_id = DATASETS + repo_id
        account, repo = self.account(request), self.repos.get(repo_id)
        owned = account is not None and account.name == request.path_params["owner"]
        if repo is None or (repo.private and not owned):
            raise Refusal(401 if account is None else 404, "Repository not found", "RepoNotFound")
        if write and account is None:
            raise Refusal(401, "Invalid username or password.")
        if write and not (owned and account is not None and account.writes):
            raise Refusal(403, "You don't have the rights to write here")
        return repo_id, repo

    def commit_of(self, repo: Repo, revision: str) -> tuple[str, Commit]:
        oid = repo.find(unquote(revision))
        if oid is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, repo.commits[oid]

    # Endpoints

    async def whoami(self, request: Request) -> Response:
        account = self.account(request)
        if account is None:
            raise Refusal(401, "Invalid username or password.")
        return JSONResponse({"type": "user", "name": account.name, "orgs": []})

    async def validate_yaml(self, request: Request) -> Response:
        self.account(request)
        content = (await request.json())["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            data = yaml.safe_load(match[1]) if match else {}
        except yaml.YAMLError as error:
            return JSONResponse({"errors": [{"message": str(error)}], "warnings": []}, 400)
        errors = []
        for key, kind in (
            ("tags", list),
            ("base_model", (str, list)),
            ("license", (str, list)),
            ("model-index", list),
        ):
            if key in data and not isinstance(data[key], kind):
                errors.append({"message": f'"{key}" is of the wrong type'})
        base = data.get("base_model")
        if isinstance(base, str) and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
            errors.append({"message": '"base_model" with value "' + base + '" is not valid'})
        return JSONResponse({"errors": errors, "warnings": []}, 400 if errors else 200)

    async def create(self, request: Request) -> Response:
        account, wanted = self.account(request), await request.json()
        if account is None:
            raise Refusal(401, "Invalid username or password.")
        owner = wanted.get("organization") or account.name
        if owner != account.name or not account.writes:
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        name = f"{owner}/{wanted['name']}"
        repo_id = (DATASETS if wanted.get("type") == "dataset" else "") + name
        answer = {"url": f"{self.endpoint}/{repo_id}", "name": name}
        if repo_id in self.repos:
            return JSONResponse({"error": "You already created this model repo", **answer}, 409)
        repo = Repo(private=wanted.get("visibility") == "private")
        repo.branches["main"] = repo.add(Commit({".gitattributes": File(GIT_ATTRIBUTES, False)}, "initial", None))
        self.repos[repo_id] = repo
        return JSONResponse(answer)

    async def info(self, request: Request) -> Response:
        repo_id, repo = self.repo_of(request)
        oid, commit = self.commit_of(repo, request.path_params.get("revision", "main"))
        siblings = [
            {"rfilename": path, "size": len(file.content), "blobId": file.oid}
            | ({"lfs": {"sha256": file.sha256, "size": len(file.content), "pointerSize": 128}} if file.large else {})
            for path, file in sorted(commit.files.items())
        ]
        if "blobs" not in request.query_params:
            siblings = [{"rfilename": sibling["rfilename"]} for sibling in siblings]
        name = repo_id.removeprefix(DATASETS)
        known = {"id": name, "sha": oid, "private": repo.private, "gated": False, "tags": [], "siblings": siblings}
        if "README.md" in commit.files:
            card = commit.files["README.md"].content.decode(errors="replace")
            known["cardData"] = ModelCard(card, ignore_metadata_errors=True).data.to_dict()
        return JSONResponse(known)

    async def refs(self, request: Request) -> Response:
        _, repo = self.repo_of(request)

        def listed(names: Mapping[str, str], prefix: str) -> list[dict[str, str]]:
            return [{"name": name, "ref": prefix + name, "targetCommit": oid} for name, oid in names.items()]

        branches, tags = listed(repo.branches, "refs/heads/"), listed(repo.tags, "refs/tags/")
        pulls = listed(repo.pull_requests, "")
        return JSONResponse({"branches": branches, "tags": tags, "converts": [], "pullRequests": pulls})

    async def tree(self, request: Request) -> Response:
        _, repo = self.repo_of(request)
        commit, folder = self._split(repo, request.path_params["revision"])[1:]
        if folder and not any(path.startswith(f"{folder}/") for path in commit.files):
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        start = f"{folder}/" if folder else ""
        inside = {path: file for path, file in commit.files.items() if path.startswith(start)}
        entries = [entry for entry in _entries(inside) + _folders(inside) if entry["path"].startswith(start)]
        if request.query_params.get("recursive", "false").lower() == "true":
            return JSONResponse(entries)
        return JSONResponse([entry for entry in entries if "/" not in entry["path"].removeprefix(start)])

    async def paths_info(self, request: Request) -> Response:
        _, repo = self.repo_of(request)
        _, commit = self.commit_of(repo, request.path_params["revision"])
        content = await request.body()
        wanted = json.loads(content)["paths"] if content.startswith(b"{") else parse_qs(content.decode())["paths"]
        entries = _entries(commit.files) + _folders(commit.files)
        return JSONResponse([entry for entry in entries if entry["path"] in wanted])

    def _split(self, repo: Repo, rest: str) -> tuple[str, Commit, str]:
        """Split "revision/path" at the longest known revision: its commit id, its commit, and the path."""
        parts = unquote(rest).split("/")
        for count in range(len(parts), 0, -1):
            if (oid := repo.find("/".join(parts[:count]))) is not None:
                return oid, repo.commits[oid], "/".join(parts[count:])
        raise Refusal(404, f"Invalid rev id: {parts[0]}", "RevisionNotFound")

    async def preupload(self, request: Request) -> Response:
        _, repo = self.repo_of(request, write="create_pr" not in request.query_params)
        _, commit = self.commit_of(repo, request.path_params["revision"])
        files = []
        for wanted in (await request.json())["files"]:
            large, old = wanted["path"].endswith(LFS_SUFFIXES), commit.files.get(wanted["path"])
            files.append(
                {
                    "path": wanted["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": None if old is None else old.sha256 if old.large else old.oid,
                }
            )
        return JSONResponse({"files": files})

    async def batch(self, request: Request) -> Response:
        self.repo_of(request)
        objects = []
        for wanted in (await request.json())["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.large:
                entry["actions"] = {"upload": {"href": f"{self.storage}/{wanted['oid']}?signed={self.secret}"}}
            objects.append(entry)
        return JSONResponse({"transfer": "basic", "objects": objects})

    async def upload(self, request: Request) -> Response:
        self._check_storage(request)
        content = await request.body()
        if hashlib.sha256(content).hexdigest() != request.path_params["sha256"]:
            raise Refusal(400, "The content does not have the SHA-256 that was announced")
        self.large[request.path_params["sha256"]] = content
        return Response()

    def _check_storage(self, request: Request) -> None:
        if "authorization" in request.headers:
            raise Refusal(400, "A token was sent to the storage")
        if request.query_params.get("signed") != self.secret:
            raise Refusal(403, "The signature is wrong")

    async def commit(self, request: Request) -> Response:
        as_pull_request = "create_pr" in request.query_params
        repo_id, repo = self.repo_of(request, write=not as_pull_request)
        account = self.account(request)
        if account is None or not account.writes:
            raise Refusal(403, "You need a token that may write")
        branch = unquote(request.path_params["revision"])
        names = repo.pull_requests if branch in repo.pull_requests else repo.branches
        if branch not in names:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        lines = [json.loads(line) for line in (await request.body()).splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, names[branch]):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[names[branch]].files)
        for line in lines[1:]:
            self._apply(line["key"], line["value"], files)
        oid = repo.add(Commit(files, header["summary"], names[branch]))
        url = None
        if as_pull_request:
            number = len(repo.pull_requests) + 1
            repo.pull_requests[f"refs/pr/{number}"] = oid
            url = f"{self.endpoint}/{repo_id}/discussions/{number}"
        else:
            names[branch] = oid
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.endpoint}/{repo_id}/commit/{oid}"}
        return JSONResponse({**answer, "pullRequestUrl": url})

    def _apply(self, key: str, value: Mapping[str, Any], files: dict[str, File]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = File(base64.b64decode(value["content"]), large=False)
        elif key == "lfsFile":
            content = self.large.get(value["oid"])
            if content is None or len(content) != value["size"]:
                raise Refusal(400, f"The large file {path} was not uploaded")
            files[path] = File(content, large=True)
        elif key == "deletedFile":
            if path not in files:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            del files[path]
        else:
            raise Refusal(400, f"Unknown operation {key}")

    async def branch(self, request: Request) -> Response:
        _, repo = self.repo_of(request, write=True)
        name = unquote(request.path_params["branch"])
        if name in repo.branches:
            raise Refusal(409, f"Reference already exists: {name}")
        start, _ = self.commit_of(repo, (await request.json()).get("startingPoint", "main"))
        repo.branches[name] = start
        return Response()

    async def tag(self, request: Request) -> Response:
        _, repo = self.repo_of(request, write=True)
        oid, _ = self.commit_of(repo, request.path_params["revision"])
        name = (await request.json())["tag"]
        if name in repo.tags:
            raise Refusal(409, f"Tag reference exists already: {name}")
        repo.tags[name] = oid
        return Response()

    async def resolve(self, request: Request) -> Response:
        _, repo = self.repo_of(request)
        oid, commit, path = self._split(repo, request.path_params["rest"])
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        file = commit.files[path]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if not file.large:
            return _content(request, file.content, headers)
        self.large.setdefault(file.sha256, file.content)
        headers |= {"X-Linked-Size": str(len(file.content)), "X-Linked-Etag": f'"{file.sha256}"'}
        return RedirectResponse(f"{self.storage}/{file.sha256}?signed={self.secret}", 302, headers)

    async def stored(self, request: Request) -> Response:
        self._check_storage(request)
        sha256 = request.path_params["sha256"]
        return _content(request, self.large[sha256], {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"})


def _entries(files: Mapping[str, File]) -> list[dict[str, Any]]:
    return [
        {"type": "file", "path": path, "size": len(file.content), "oid": file.oid}
        | ({"lfs": {"oid": file.sha256, "size": len(file.content), "pointerSize": 128}} if file.large else {})
        for path, file in sorted(files.items())
    ]


def _folders(files: Mapping[str, File]) -> list[dict[str, Any]]:
    found = {parent.as_posix() for path in files for parent in PurePosixPath(path).parents} - {"."}
    return [{"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(found)]


def _content(request: Request, content: bytes, headers: Mapping[str, str]) -> Response:
    """Answer with a content, or with the range of it that is asked for."""
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if wanted is None:
        return Response(content, headers=headers)
    start, stop = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
    if start > stop:
        return Response(status_code=416, headers={"Content-Range": f"bytes */{len(content)}"})
    headers = {**headers, "Content-Range": f"bytes {start}-{stop}/{len(content)}"}
    return Response(content[start : stop + 1], 206, headers)


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve a hub on a free port of 127.0.0.1; large files at `localhost`, which is another host to the client."""
    # Named, as asyncio turns Nagle's algorithm off for TCP by name only: each answer would wait 40 ms.
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        hub.endpoint, hub.storage = f"http://127.0.0.1:{port}", f"http://localhost:{port}/storage"
        config = uvicorn.Config(
            hub.app, http=_Connections, lifespan="off", log_level="critical", timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        try:
            yield hub
        finally:
            server.should_exit = True
            thread.join()


def environment(hub: Hub, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    """Return the environment of a fresh process that talks to `hub` as any user's would."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON", "PYTEST"))}
    kept |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    return kept | ({"HF_TOKEN": token} if token else {})
