"""A small Hugging Face Hub on loopback: repositories in memory, with the requests of huggingface_hub and datasets."""

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from threading import Thread
from urllib.parse import unquote

import yaml
from huggingface_hub import HfFileSystem, constants, file_download, utils

TOKEN = "hf_secretOfTheTests"


class Hub:
    """Repositories by kind and name, ``datasets/USER/NAME`` or ``models/USER/NAME``.

    Each is a list of commits, one mapping of paths to bytes per commit. ``fails`` answers every request with 413, which
    is not tried again.
    """

    def __init__(self):
        self.repositories, self.private, self.fails, self.requests = {}, set(), False, []

    def commit(self, repository, files, deleted=()):
        commits = self.repositories.setdefault(repository, [{}])
        commits.append({**{path: data for path, data in commits[-1].items() if path not in deleted}, **files})
        return sha(len(commits) - 1)


def sha(number):
    return f"{number:040x}"


def entry(path, data):
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


def folder(path):
    return {"type": "directory", "path": path, "oid": "0" * 40}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.answer(lambda hub, path, **found: self.posted(hub, path, body, **found))

    def do_GET(self):
        self.answer(self.got)

    do_HEAD = do_GET

    def answer(self, method):
        hub, path = self.server.hub, unquote(self.path.partition("?")[0]).strip("/")
        hub.requests.append(f"{self.command} {path}")
        if hub.fails:
            return self.send(413, b"", {})
        try:
            status, value, headers = method(hub, path)
        except LookupError:
            there = any(name.removeprefix("models/") in path for name in hub.repositories)
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound" if there else "RepoNotFound"})
        return self.send(status, value if isinstance(value, bytes) else json.dumps(value).encode(), headers)

    def send(self, status, data, headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def allowed(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def posted(self, hub, path, body):
        if not self.allowed and "paths-info" not in path:
            return 401, {"error": "Invalid credentials"}, {}
        if path == "api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('type', 'model')}s/{asked['organization']}/{asked['name']}"
            if name in hub.repositories:
                return 409, {"url": f"{self.server.url}/{name}"}, {}
            hub.commit(name, {})
            hub.private |= {name} if asked.get("private") or asked.get("visibility") == "private" else set()
            return 200, {"url": f"{self.server.url}/{name}"}, {}
        if path == "api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        repository, action, revision, _ = self.found(hub, path)
        if action == "preupload":
            files = [{"path": one["path"], "uploadMode": "regular"} for one in json.loads(body)["files"]]
            return 200, {"files": [{**one, "shouldIgnore": False} for one in files]}, {}
        if action == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            added = {
                one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in lines if one["key"] == "file"
            }
            deleted = [one["value"]["path"] for one in lines if one["key"] == "deletedFile"]
            oid = hub.commit(repository, added, deleted)
            url = f"{self.server.url}/{repository}/commit/{oid}"
            return 200, {"commitUrl": url, "commitOid": oid, "success": True}, {}
        if action == "paths-info":
            files = hub.repositories[repository][revision]
            asked = re.findall(rb"paths=([^&]*)", body) or [one.encode() for one in json.loads(body)["paths"]]
            names = [unquote(one.decode()) for one in asked]
            folders = [one for one in names if any(file.startswith(f"{one}/") for file in files)]
            return (
                200,
                [entry(one, files[one]) for one in names if one in files] + [folder(one) for one in folders],
                {},
            )
        raise LookupError(path)

    def found(self, hub, path):
        """The repository, the action, the number of the revision, and the rest of a path of the API."""
        match = re.fullmatch(r"(?:api/)?((?:datasets/|models/)?[^/]+/[^/]+)(?:/([\w-]+)(?:/([^/]+)(?:/(.*))?)?)?", path)
        name = match[1] if match[1].startswith(("datasets/", "models/")) else f"models/{match[1]}"
        last = len(hub.repositories[name]) - 1
        revision = last if match[3] in (None, "main") else int(match[3], 16)
        hub.repositories[name][revision]
        return name, match[2], revision, match[4] or ""

    def got(self, hub, path):
        repository, action, revision, rest = self.found(hub, path)
        if repository in hub.private and not self.allowed:
            return 401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        files = hub.repositories[repository][revision]
        if action in (None, "revision"):
            named = [{"rfilename": one} for one in files]
            head = yaml.safe_load(files.get("README.md", b"---\n---").split(b"---")[1])
            known = {"id": repository.partition("/")[2], "sha": sha(revision), "siblings": named, "cardData": head}
            return 200, {**known, "tags": []}, {}
        if action == "tree":
            prefix = f"{rest}/" if rest else ""
            below = {name: data for name, data in files.items() if name.startswith(prefix)}
            if rest and not below:
                raise LookupError(path)
            deep = "recursive=true" in self.path.lower()
            folders = {str(one) for name in below for one in PurePosixPath(name).parents} - {".", rest}
            listed = [entry(*one) for one in below.items()] + [folder(one) for one in sorted(folders)]
            return 200, [one for one in listed if deep or "/" not in one["path"].removeprefix(prefix)], {}
        if action == "resolve":
            data, total = files[rest], len(files[rest])
            headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": sha(revision)}
            if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(asked[1]), min(int(asked[2] or total - 1), total - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{total}"
                return 206, data[first : last + 1], headers
            return 200, data, headers
        raise LookupError(path)


@contextmanager
def serving(patch, cache):
    """Serve a Hub and let huggingface_hub and datasets use it, with a cache of their own; yield it."""
    import datasets

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub, server.url = Hub(), f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for module in (constants, file_download):
        patch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)  # of newer versions in one alone
    patch.setattr(constants, "ENDPOINT", server.url)
    patch.setattr(datasets.config, "HF_ENDPOINT", server.url)
    for name, value in {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}.items():
        patch.setenv(name, value)
    for module in (constants, datasets.config):
        patch.setattr(module, "HF_HUB_OFFLINE", False)  # the other tests are offline
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    HfFileSystem.clear_instance_cache()
    forget = getattr(utils, "reset_sessions", None) or utils.close_session  # of versions before 1, and from there
    forget()  # sessions of other tests are offline, whatever is patched
    try:
        yield server.hub
    finally:
        forget()
        server.shutdown()
        server.server_close()
        thread.join()
        HfFileSystem.clear_instance_cache()
