"""Downloads of one small file, with a real server on loopback."""

import hashlib
import http.server
import sys
import threading
import time

import pytest

from configurator import FolioError
from data.download import DownloadError, download

BODY = bytes(range(256)) * 1600  # 409,600 bytes
CUT = 200_000  # bytes that are sent before a connection is lost
SHA256 = hashlib.sha256(BODY).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Answers request number i according to plans[i]; the last plan is repeated.

    A plan is an HTTP error status, or "whole", "html", "cut" or "silence".
    """

    daemon_threads = True

    def __init__(self, *plans: int | str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plans, self.body, self.num_requests = list(plans), BODY, 0
        self.pause = 0.0  # seconds before each answer
        self.url = f"http://127.0.0.1:{self.server_port}/file"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        plan = self.server.plans[min(self.server.num_requests, len(self.server.plans) - 1)]
        self.server.num_requests += 1
        time.sleep(self.server.pause)
        if isinstance(plan, int):
            return self.send_error(plan)
        if plan == "silence":
            return time.sleep(3)
        body = b"<html>Please log in</html>" if plan == "html" else self.server.body
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:CUT] if plan == "cut" else body)

    def log_message(self, *_) -> None:
        pass


def fetch(server: Server, path, sha256: str = SHA256):
    return download(server.url, path, sha256, read_timeout=0.5, backoff=0.01)


@pytest.mark.parametrize(
    "plans",
    [["whole"], [500, "whole"], [503, 429, "whole"], ["cut", "whole"], ["silence", "whole"]],
    ids=str,
)
def test_temporary_failures_are_retried(plans, tmp_path):
    path = fetch(Server(*plans), tmp_path / "file")
    assert path.read_bytes() == BODY
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("plans", "message", "num_requests"),
    [
        ([404], "HTTP 404", 1),
        ([500], r"HTTP 500 .*\(3 attempts\)", 3),
        (["html"], "wrong SHA-256", 1),
        (["cut"], r"connection was lost \(3 attempts\)", 3),
    ],
    ids=str,
)
def test_permanent_failures_are_one_line_and_leave_no_file(plans, message, num_requests, tmp_path):
    server = Server(*plans)
    with pytest.raises(DownloadError, match=message):
        fetch(server, tmp_path / "file")
    assert server.num_requests == num_requests
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_another_hash_is_refused(tmp_path):
    server = Server("whole")
    with pytest.raises(DownloadError, match="wrong SHA-256"):
        fetch(server, tmp_path / "file", sha256="0" * 64)
    assert list(tmp_path.iterdir()) == []
    assert server.num_requests == 1


@pytest.mark.parametrize("host", ["127.0.0.1:9", "no-such-host.invalid"])
def test_without_a_network_there_is_no_retry(tmp_path, host):
    start = time.monotonic()
    with pytest.raises(DownloadError, match=f"^no connection to {host}$"):
        download(f"http://{host}/file", tmp_path / "file", SHA256)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTPS_PROXY", "socks5://127.0.0.1:9"), ("HTTPS_PROXY", "http://"),
        ("REQUESTS_CA_BUNDLE", "/nowhere"),
    ],
)  # fmt: skip
def test_a_proxy_or_certificates_that_cannot_be_used_are_one_line(
    tmp_path, monkeypatch, name, value
):
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("NO_PROXY", "")
    with pytest.raises(DownloadError, match=r"^no-such-host\.invalid: "):
        download("https://no-such-host.invalid/file", tmp_path / "file", SHA256)


def test_an_existing_file_stays_if_the_download_fails(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(DownloadError):
        fetch(Server(404), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot limit the size of a file")
def test_a_full_disk_is_one_line(tmp_path):
    import resource

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    server = Server("whole")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(FolioError, match="File too large"):
            fetch(server, tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(tmp_path.iterdir()) == []
