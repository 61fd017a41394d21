"""Downloads of one small file, with a real server on loopback."""

import hashlib
import http.server
import threading
import time

import pytest

from data.download import RETRIES, DownloadError, download

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
            self.send_response(plan)
            self.send_header("Retry-After", "3600")  # seconds; download() must not wait for them
            return self.end_headers()
        if plan == "silence":
            return time.sleep(3)
        body = b"<html>Please log in</html>" if plan == "html" else self.server.body
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:CUT] if plan == "cut" else body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr("data.download.TIMEOUTS", (10.0, 0.5))
    monkeypatch.setattr("data.download.RETRIES", RETRIES.new(backoff_factor=0.01))


@pytest.mark.parametrize(
    "plans", [["whole"], [500, "whole"], [503, 429, "whole"], ["silence", "whole"]], ids=str
)
def test_temporary_failures_are_retried(plans):
    assert download(Server(*plans).url, SHA256) == BODY


@pytest.mark.parametrize(
    ("plans", "message", "num_requests"),
    [
        ([404], "404 .*Not Found", 1),
        ([500], "500 .*Internal Server Error", 3),
        (["html"], "wrong SHA-256", 1),
        (["cut"], "IncompleteRead", 1),
    ],
    ids=str,
)
def test_permanent_failures_are_one_line(plans, message, num_requests):
    server = Server(*plans)
    with pytest.raises(DownloadError, match=message) as error:
        download(server.url, SHA256)
    assert server.num_requests == num_requests
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("host", ["127.0.0.1:9", "no-such-host.invalid"])
def test_without_a_network_there_is_no_retry(host):
    start = time.monotonic()
    with pytest.raises(DownloadError, match=f"^no connection to {host}$"):
        download(f"http://{host}/file", SHA256)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTPS_PROXY", "socks5://127.0.0.1:9"), ("HTTPS_PROXY", "http://"),
        ("REQUESTS_CA_BUNDLE", "/nowhere"),
    ],
)  # fmt: skip
def test_a_proxy_or_certificates_that_cannot_be_used_are_one_line(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("NO_PROXY", "")
    with pytest.raises(DownloadError, match=r"^no-such-host\.invalid: "):
        download("https://no-such-host.invalid/file", SHA256)
