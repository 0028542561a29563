"""A web server for images on this machine, which fails in the ways that servers do."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ImageServer:
    """Serves `content` at /ok.png; other paths fail.

    Attributes:
        url: Its address, such as http://127.0.0.1:1234.
        asked: How often each path was asked for.
    """

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.asked: Counter[str] = Counter()
        self.stop = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.lstrip("/").split("?")[0]
                server.asked[path] += 1
                getattr(self, f"_{path.split('.')[0].replace('-', '_')}", self._gone)()

            def _send(self, status: int, content: bytes = b"", announced: int | None = None, **headers: str) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(content) if announced is None else announced))
                self.end_headers()
                self.wfile.write(content)

            def _ok(self) -> None:
                self._send(200, server.content)

            def _gone(self) -> None:
                self._send(404)

            def _forbidden(self) -> None:
                self._send(403)

            def _busy(self) -> None:
                self._send(429, Retry_After="0")

            def _broken(self) -> None:
                self._send(503)

            def _twice(self) -> None:  # well at the third try
                self._send(*((503,) if server.asked["twice.png"] < 3 else (200, server.content)))

            def _cut(self) -> None:
                self._send(200, server.content[:20], len(server.content))

            def _endless(self) -> None:
                self._send(200, b"", 10**12)
                while not server.stop.is_set():
                    self.wfile.write(b"\0" * 2**16)

            def _slow(self) -> None:
                self._send(200, b"", 1000)
                while not server.stop.wait(0.05):
                    self.wfile.write(b"\0")

            def _moved(self) -> None:
                self._send(302, Location="/ok.png")

            def _circle(self) -> None:
                self._send(302, Location="/circle.png")

            def _file(self) -> None:
                self._send(302, Location="file:///etc/passwd")

            def log_message(self, *arguments: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"


@contextmanager
def image_server(content: bytes) -> Iterator[ImageServer]:
    """Run a server in a thread."""
    server = ImageServer(content)
    thread = threading.Thread(target=server.http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop.set()
        server.http.shutdown()
        server.http.server_close()
