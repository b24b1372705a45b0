"""A proxy on loopback that stands between a client and an HTTP server, and fails as networks and servers do."""

import http.client
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from types import TracebackType
from urllib.parse import urlsplit

HOST = "127.0.0.1"
CODES = {400: "ExpiredToken", 403: "AccessDenied"}  # as S3 calls them


@dataclass(frozen=True)
class Fault:
    """What happens to one answer.

    Args:
        delay: seconds before anything is sent.
        status: answer this instead.
        cut: close the connection when half of the body is sent.
        corrupt: flip one bit of the body.
        gone: close the port, and open it again after so many seconds.
    """

    delay: float = 0.0
    status: int | None = None
    cut: bool = False
    corrupt: bool = False
    gone: float = 0.0


Plan = Callable[[str, int], Fault | None]


class FaultProxy:
    """Context of a running proxy.

    Args:
        target: address of the server, such as ``http://127.0.0.1:5000``.
        plan: the fault of the ``n``-th GET of a path, counted from 0; None for none.
        refuse: the status that a request of a method and a path gets instead of its answer, such as 403; None for none.
    """

    def __init__(
        self,
        target: str,
        plan: Plan = lambda path, n: None,
        refuse: Callable[[str, str], int | None] = lambda method, path: None,
    ):
        self.refuse = refuse
        self.refused: Counter[str] = Counter()
        self.target = urlsplit(target).netloc
        self.plan = plan
        self.gets: Counter[str] = Counter()
        self.injected: Counter[Fault] = Counter()
        self._lock = Lock()
        self._stopped = Event()
        self._server = self._open(0)

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self._server.server_port}"

    def __enter__(self) -> "FaultProxy":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop; what is still being answered is dropped."""
        self._stopped.set()
        self._close()

    def fault(self, path: str) -> Fault:
        """Count a GET; its fault."""
        with self._lock:
            fault = self.plan(path, self.gets[path]) or Fault()
            self.gets[path] += 1
            if fault != Fault():
                self.injected[fault] += 1
        if fault.gone:
            Thread(target=self._be_gone, args=(fault.gone,), daemon=True).start()
        return fault

    def wait(self, seconds: float) -> bool:
        """Wait; whether the proxy has been stopped meanwhile."""
        return self._stopped.wait(seconds)

    def _be_gone(self, seconds: float) -> None:
        port = self._server.server_port
        self._close()
        if not self.wait(seconds):
            self._server = self._open(port)

    def _open(self, port: int) -> ThreadingHTTPServer:
        server = _Server((HOST, port), type("Handler", (_Handler,), {"proxy": self}))
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server

    def _close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Clients that go away are part of the plan."""


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultProxy

    def do_GET(self) -> None:
        fault = self.proxy.fault(urlsplit(self.path).path) if self.command == "GET" else Fault()
        if self.proxy.wait(fault.delay) or fault.gone:
            return
        if fault.status is not None:
            self.send_error(fault.status)
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        refusal = self.proxy.refuse(self.command, self.path)
        if refusal is not None:
            self.proxy.refused[self.command] += 1
            self.send_response(refusal)
            answer = f"<Error><Code>{CODES.get(refusal, 'Other')}</Code><Message>Refused</Message></Error>".encode()
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer)
            return
        connection = http.client.HTTPConnection(self.proxy.target, timeout=60)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        data = answer.read()
        if fault.corrupt:
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            # Not all servers send a checksum of their own.
            if name.lower() != "transfer-encoding" and not name.lower().startswith("x-amz-checksum"):
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault.cut else data)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass
