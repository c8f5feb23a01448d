# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""A small Hub over HTTP, in memory: repositories, commits, tags, large files, tokens; and faults on demand.

It answers what `huggingface_hub` asks when it creates repositories, commits, lists and downloads. Programs meet it through
`HF_ENDPOINT`; `environment` has the variables.
"""

import base64
import hashlib
import http.server
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml


LICENSES = {"apache-2.0", "mit", "cc-by-nc-4.0", "openrail", "other", "unknown"}
TASKS = {"unconditional-image-generation", "text-to-image", "image-to-image", "image-classification"}
LARGE = (".safetensors", ".png", ".bin", ".pt", ".pkl")


def metadata_errors(card: str) -> list[str]:
    """What the Hub would refuse in a model card's YAML block."""
    block = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    if block is None:
        return ["no metadata"]
    try:
        data = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [f"no YAML: {error}"]
    errors = []
    for key, known in (("license", LICENSES), ("pipeline_tag", TASKS)):
        if key in data and data[key] not in known:
            errors.append(f"unknown {key} {data[key]}")
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        errors.append("tags must be strings")
    names = [*data.get("datasets", []), *([data["base_model"]] if "base_model" in data else [])]
    errors += [f"{name} is no id" for name in names if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)]
    for model in data.get("model-index", []):
        for result in model["results"]:
            if not (result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]):
                errors.append("a result lacks its task or dataset")
            if not all(metric["type"] and metric["value"] is not None for metric in result["metrics"]):
                errors.append("a metric lacks its type or value")
    return errors


class Repository:
    def __init__(self, private: bool):
        self.private = private
        self.commits: list[tuple[str, str, dict[str, bytes]]] = []  # id, message, files
        self.refs: dict[str, str] = {}
        self.count = 0  # of commits, those too that are squashed
        self.commit("initial commit", {".gitattributes": b""})

    def commit(self, message: str, files: dict[str, bytes]) -> str:
        self.count += 1
        oid = hashlib.sha1(f"{id(self)} {self.count} {message}".encode()).hexdigest()
        self.commits.append((oid, message, files))
        self.refs["main"] = oid
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes] | None:
        oid = self.refs.get(revision, revision)
        return next((files for known, _, files in self.commits if known == oid), None)


class Hub:
    """The server's state. `repositories` and `requests` may be read, and `faults` set, by a test.

    Attributes:
        tokens: name, role (`write`, `read`) and organisations of each.
        faults: `(pattern, status)`: the next request whose `METHOD path` has `pattern` gets that status; with status None
            the connection is cut half way through the request's body.
    """

    def __init__(self):
        self.tokens: dict[str, tuple[str, str, list[str]]] = {}
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[tuple[str, int | None]] = []
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self.url = ""

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Variables of a process that knows no other Hub than this one."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "ACCELERATE", "HUGGING", "PYTEST"))}
        kept |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "2"}
        kept |= {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return kept | ({"HF_TOKEN": token} if token else {})


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status: int, content: bytes | dict | list | None = None, **headers):
        if not isinstance(content, bytes):
            content = b"" if content is None else json.dumps(content).encode()
            headers.setdefault("Content_Type", "application/json")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status: int, code: str = "", message: str = ""):
        headers = {"X_Error_Code": code} if code else {}
        self.answer(status, {"error": message}, **headers, **({"X_Error_Message": message} if message else {}))

    def handle_request(self):
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        with self.hub.lock:
            self.hub.requests.append(request)
            fault = next((fault for fault in self.hub.faults if re.search(fault[0], request)), None)
            if fault is not None:
                self.hub.faults.remove(fault)
        if fault is not None:
            if fault[1] is None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
                self.close_connection = True
                self.connection.close()
                return
            self.body()
            self.refuse(fault[1], message="as the test wants it")
            return
        content = self.body()
        with self.hub.lock:
            self.route(path, content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def user(self):
        return self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def route(self, path: str, content: bytes):
        if "/gated/" in path:
            return self.refuse(403, "GatedRepo")
        if path == "/api/whoami-v2":
            return self.whoami()
        if path == "/api/repos/create":
            return self.create(json.loads(content))
        if path == "/api/validate-yaml":
            errors = metadata_errors(json.loads(content)["content"])
            return self.answer(400 if errors else 200, {"errors": [{"message": e} for e in errors], "warnings": []})
        if found := re.fullmatch(r"/large/(\w+)", path):
            self.hub.large[found[1]] = content
            return self.answer(200 if hashlib.sha256(content).hexdigest() == found[1] else 400)
        patterns = (
            r"/api/models/(?P<id>[^/]+/[^/]+)(/(?P<what>[\w-]+)(/(?P<revision>[^/]+)(/(?P<file>.*))?)?)?",
            r"/(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/(?P<what>batch)",
            r"/(?P<id>[^/]+/[^/]+)/(?P<what>resolve)/(?P<revision>[^/]+)/(?P<file>.*)",
        )
        found = next((match for pattern in patterns if (match := re.fullmatch(pattern, path))), None)
        parts = found.groupdict() if found else {}
        repository = self.hub.repositories.get(parts.get("id", ""))
        if repository is None or (repository.private and self.user() is None):
            return self.refuse(404 if self.user() else 401, "RepoNotFound")
        what = parts["what"] or "revision"
        if what in ("preupload", "commit", "batch", "tag", "super-squash") and not self.may_write(parts["id"]):
            return self.refuse(403, message="Forbidden: you need write access")
        files = repository.files(parts.get("revision") or "main")
        if files is None and what != "tag":
            return self.refuse(404, "RevisionNotFound")
        method = getattr(self, f"do_{what.replace('-', '_')}", None)
        return method(repository, files, parts, content) if method else self.refuse(404, message=f"no {what}")

    def may_write(self, repo_id: str) -> bool:
        name, role, organisations = self.user() or ("", "", [])
        return role == "write" and repo_id.split("/")[0] in (name, *organisations)

    def whoami(self):
        if self.user() is None:
            return self.refuse(401, message="Invalid credentials in Authorization header")
        name, role, organisations = self.user()
        token = {"accessToken": {"role": role, "displayName": "test"}}
        self.answer(200, {"type": "user", "name": name, "auth": token, "orgs": [{"name": o} for o in organisations]})

    def create(self, wanted: dict):
        if self.user() is None:
            return self.refuse(401, message="Invalid credentials in Authorization header")
        repo_id = f"{wanted.get('organization') or self.user()[0]}/{wanted['name']}"
        if not self.may_write(repo_id):
            return self.refuse(403, message="You don't have the rights to create a model under this namespace")
        known = repo_id in self.hub.repositories
        if not known:
            private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            self.hub.repositories[repo_id] = Repository(private)
        self.answer(409 if known else 200, {"url": f"{self.hub.url}/{repo_id}", "id": repo_id, "name": repo_id})

    def do_revision(self, repository: Repository, files: dict, parts: dict, content: bytes):
        revision = parts.get("revision") or "main"
        answer = {"id": parts["id"], "modelId": parts["id"], "sha": repository.refs.get(revision, revision)}
        answer |= {"private": repository.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        self.answer(200, answer | {"tags": [], "siblings": [{"rfilename": path} for path in files]})

    def do_tree(self, repository: Repository, files: dict, parts: dict, content: bytes):
        entries = []
        for path, data in files.items():
            entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            if path.endswith(LARGE):
                oid = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
            entries.append(entry)
        self.answer(200, entries)

    def do_resolve(self, repository: Repository, files: dict, parts: dict, content: bytes):
        data = files.get(parts["file"])
        if data is None:
            return self.refuse(404, "EntryNotFound")
        commit = repository.refs.get(parts["revision"], parts["revision"])
        etag = hashlib.sha256(data).hexdigest() if parts["file"].endswith(LARGE) else hashlib.sha1(data).hexdigest()
        self.answer(200, data, ETag=f'"{etag}"', X_Repo_Commit=commit, Content_Type="application/octet-stream")

    def do_preupload(self, repository: Repository, files: dict, parts: dict, content: bytes):
        answer = []
        for file in json.loads(content)["files"]:
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            entry = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}
            if (data := files.get(file["path"])) is not None:
                blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
                entry["oid"] = hashlib.sha256(data).hexdigest() if mode == "lfs" else blob
            answer.append(entry)
        self.answer(200, {"files": answer})

    def do_batch(self, repository: Repository, files: dict, parts: dict, content: bytes):
        objects = []
        for wanted in json.loads(content)["objects"]:
            href = f"{self.hub.url}/large/{wanted['oid']}?X-Amz-Signature=signed-address"
            upload = {} if wanted["oid"] in self.hub.large else {"actions": {"upload": {"href": href}}}
            objects.append({**wanted, **upload})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def do_commit(self, repository: Repository, files: dict, parts: dict, content: bytes):
        files, header = dict(files), {}
        for line in map(json.loads, content.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                header = value
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        oid = repository.commit(header["summary"], files)
        url = f"{self.hub.url}/{parts['id']}/commit/{oid}"
        self.answer(200, {"commitUrl": url, "commitOid": oid, "hookOutput": ""})

    def do_super_squash(self, repository: Repository, files: dict, parts: dict, content: bytes):
        repository.commits.clear()
        repository.commit(json.loads(content)["message"], files)
        self.answer(200, {})

    def do_refs(self, repository: Repository, files: dict, parts: dict, content: bytes):
        refs = [{"name": n, "ref": f"refs/{n}", "targetCommit": oid} for n, oid in repository.refs.items()]
        is_tag = [ref["name"] != "main" for ref in refs]
        branches, tags = ([ref for ref, tag in zip(refs, is_tag) if tag == wanted] for wanted in (False, True))
        self.answer(200, {"branches": branches, "converts": [], "tags": tags})

    def do_tag(self, repository: Repository, files: dict, parts: dict, content: bytes):
        if self.command == "DELETE":
            repository.refs.pop(parts["revision"])
            return self.answer(200, {})
        tag = json.loads(content)["tag"]
        if tag in repository.refs:
            return self.refuse(409, message="Tag reference exists already")
        repository.refs[tag] = repository.refs.get(parts["revision"], parts["revision"])
        self.answer(200, {})


@contextmanager
def serve() -> Iterator[Hub]:
    """A running Hub on a free port of this machine."""
    hub = Hub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
