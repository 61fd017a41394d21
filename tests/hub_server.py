"""A server on loopback that answers as the Hugging Face hub does, as far as Folio needs it.

with HubServer() as hub:
    hub.use(monkeypatch, tmp_path / "cache")
    hub.add_folder("openai-community/gpt2", folder)
"""

import hashlib
import http.server
import json
import re
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants

LARGE = 1000  # bytes; larger files are served from another host, as the hub does


class HubServer(http.server.ThreadingHTTPServer):
    """files: (repository, revision) -> {file name: contents}.

    The repository of a dataset begins with "datasets/".
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.cdn = f"http://localhost:{self.server_port}/cdn"
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Authorization
        self.ranges: list[str | None] = []  # the Range header of each download of a large file
        self.gated: set[str] = set()  # repositories whose terms must be accepted
        self.interruptions = 0  # how many downloads of large files to break off in the middle
        self.replaced: dict[str, bytes] = {}  # file name -> what is sent instead

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()

    def use(self, monkeypatch, cache: Path) -> None:
        """Point huggingface_hub of this process to the server and to an empty cache.

        huggingface_hub reads the environment when it is imported, so its constants are replaced.
        """
        use_hub(monkeypatch, self.url, cache)

    def add_folder(self, repo: str, folder: Path, revision: str = "main") -> None:
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        self.files[repo, revision] = files

    def paths(self, method: str) -> list[str]:
        return [path for seen, path, _ in self.requests if seen == method]


def use_hub(monkeypatch, url: str, cache: Path) -> None:
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Authorization")))
        if path.startswith("/cdn/"):
            self.send_large(path.removeprefix("/cdn/"))
        elif match := re.fullmatch("/api/(models/|datasets/)(.+?)(?:/(revision|tree)/(.+))?", path):
            kind, name, action, revision = match.groups()
            repo = name if kind == "models/" else kind + name
            self.send_listing(repo, action, revision or "main")
        elif match := re.fullmatch(
            "/(.+)/resolve/([^/]+|refs/.+?|refs/convert/parquet)/(.+)", path
        ):
            self.send_file(*match.groups())
        else:
            self.refuse(404, "")

    def find(self, repo: str, revision: str) -> tuple[dict[str, bytes], str] | None:
        """The files and the commit; None, and an error is sent, if there is no such revision."""
        revisions = {rev: files for (name, rev), files in self.server.files.items() if name == repo}
        if repo in self.server.gated:
            return self.refuse(403, "GatedRepo")
        for rev, files in revisions.items():
            if revision in (rev, commit_of(rev, files)):
                return files, commit_of(rev, files)
        return self.refuse(*((404, "RevisionNotFound") if revisions else (401, "RepoNotFound")))

    def send_listing(self, repo: str, action: str | None, revision: str) -> None:
        if (found := self.find(repo, revision)) is None:
            return
        files, commit = found
        if action == "tree":
            listing = [
                {"type": "file", "path": name, "size": len(data), "oid": digest(data)[:40]}
                for name, data in files.items()
            ]
        else:
            name, siblings = repo.removeprefix("datasets/"), [{"rfilename": file} for file in files]
            listing = {"_id": "0", "id": name, "sha": commit, "siblings": siblings}
        self.send_body(json.dumps(listing).encode(), {"Content-Type": "application/json"})

    def send_file(self, repo: str, revision: str, name: str) -> None:
        if (found := self.find(repo, revision)) is None:
            return
        files, commit = found
        headers = {"X-Repo-Commit": commit}
        if name not in files:
            return self.refuse(404, "EntryNotFound", headers)
        data = files[name]
        if len(data) <= LARGE:
            return self.send_body(data, {**headers, "ETag": f'"{digest(data)[:40]}"'})
        headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{digest(data)}"'}
        headers["Location"] = f"{self.server.cdn}/{digest(data)}/{name}"
        self.send_body(b"", headers, 302)

    def send_large(self, path: str) -> None:
        sha256, _, name = path.partition("/")
        data = next(
            files[name]
            for files in self.server.files.values()
            if name in files and digest(files[name]) == sha256
        )
        data = self.server.replaced.get(name, data)
        wanted = self.headers.get("Range")
        if self.command == "GET":
            self.server.ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "GET" and self.server.interruptions:
            self.server.interruptions -= 1
            self.wfile.write(data[start : start + (len(data) - start) // 2])
            self.close_connection = True
        elif self.command == "GET":
            self.wfile.write(data[start:])

    def send_body(self, data: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self.send_body(b"", {**(headers or {}), "X-Error-Code": code}, status)

    def log_message(self, *_) -> None:
        pass


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def commit_of(revision: str, files: dict[str, bytes]) -> str:
    """40 hexadecimal digits that change with the contents."""
    hashes = [(name, digest(files[name])) for name in sorted(files)]
    return digest(repr((revision, hashes)).encode())[:40]
