"""Safety of the page: who may ask, from where, and what a browser may do with the answer."""

import asyncio
import hmac
import ipaddress
import secrets
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

# A page of ours loads its own files, shows its own pictures, and talks to its own server; nothing else.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "font-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SHORTEST_PASSWORD = 8
_WAIT = 1.0  # seconds after a wrong password
_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_LOGIN = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>bt_hf studio</title>
<link rel="stylesheet" href="/page/base.css"></head>
<body><main class="empty"><h1>bt_hf studio</h1>{text}</main></body></html>"""
_OPEN_URL = "<p>Open the address that <code>bt-hf studio</code> has printed: it holds the key to this page.</p>"
_PASSWORD = """{problem}<form method="post" action="/login"><label>Password
<input type="password" name="password" autocomplete="current-password" autofocus required></label>
<button class="button">Open</button></form>"""


@dataclass
class Guard:
    """Rules of who may ask.

    Args:
        host: Address that the server listens at.
        port: Its port.
        password: Asked of whoever comes without the token; needed where `host` is not loopback.
        names: Further names of this server, such as that of a proxy before it.
        token: Key in the printed address, and in the cookie.

    Raises:
        ValueError: `host` is not loopback and there is no password, or it is too short.
    """

    host: str
    port: int
    password: str | None = None
    names: tuple[str, ...] = ()
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32))

    def __post_init__(self) -> None:
        if self.password is not None and len(self.password) < SHORTEST_PASSWORD:
            raise ValueError(f"--password should have at least {SHORTEST_PASSWORD} characters")
        if not self.local and self.password is None:
            raise ValueError(
                f"--host {self.host} lets every machine that reaches this one open the page, see the images and "
                "click: give it a --password, or leave --host out to stay on this machine"
            )
        self._failures = asyncio.Lock()

    @property
    def local(self) -> bool:
        """True if only programs of this machine can connect."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def cookie(self) -> str:
        """Name of the cookie; browsers send cookies of one host to all of its ports."""
        return f"bt_hf_studio_{self.port}"

    @property
    def address(self) -> str:
        """Address to open."""
        host = self.host if self.local else "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/?token={self.token}"

    def knows_host(self, header: str) -> bool:
        """True if the `Host` of a request is one of ours: a name of an attacker that leads here is not."""
        try:
            found = urlsplit(f"//{header}")
            name, port = found.hostname, found.port
        except ValueError:
            return False
        if name is None or found.username is not None or found.path or found.query or found.fragment:
            return False
        if name in self.names:
            return True
        if port != self.port:
            return False
        if self.local:
            return name in LOOPBACK or name == self.host
        if name in (*LOOPBACK, self.host, socket.gethostname().lower(), f"{socket.gethostname().lower()}.local"):
            return True
        try:  # an address of digits belongs to nobody's domain
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def same_origin(self, headers: Headers) -> bool:
        """True if a request that changes something comes from our own page."""
        try:
            origin = urlsplit(headers.get("origin", ""))
        except ValueError:
            return False
        return origin.scheme in ("http", "https") and origin.netloc.lower() == headers.get("host", "").lower()

    def has_key(self, request: Request) -> bool:
        """True if a request has the cookie."""
        return equal(request.cookies.get(self.cookie, ""), self.token)

    async def opens(self, password: str) -> bool:
        """True if it is the password; a wrong one takes a second, one after the other, and nobody else waits."""
        if self.password is not None and equal(password, self.password):
            return True
        async with self._failures:
            await asyncio.sleep(_WAIT)
        return False

    def let_in(self) -> Response:
        """Return the answer that sets the cookie and leads to the page."""
        response = RedirectResponse("/", status_code=303)
        response.set_cookie(self.cookie, self.token, httponly=True, samesite="strict", path="/", max_age=30 * 86400)
        return response

    def ask(self, status: int = 401, problem: str = "") -> Response:
        """Return the page that says how to get in."""
        shown = f"<p role='alert'>{problem}</p>" if problem else ""
        text = _OPEN_URL if self.password is None else _PASSWORD.format(problem=shown)
        return HTMLResponse(_LOGIN.format(text=text), status_code=status)


def equal(one: str, other: str) -> bool:
    """Compare secrets in a time that does not tell how much of them is right."""
    return hmac.compare_digest(one.encode("utf-8", "replace"), other.encode())


class Gate:
    """ASGI middleware that lets through only what a `Guard` allows, and adds the headers.

    Args:
        app: The application.
        guard: The rules.
    """

    def __init__(self, app: Any, guard: Guard) -> None:
        self.app, self.guard = app, guard

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Answer, or pass on."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                if "cache-control" not in headers:
                    headers["Cache-Control"] = "no-store"
            await send(message)

        refused = self._refuse(Request(scope))
        await (refused or self.app)(scope, receive, send_with_headers)

    def _refuse(self, request: Request) -> Response | None:
        guard, headers = self.guard, request.headers
        if not guard.knows_host(headers.get("host", "")):
            return problem(421, "this name is not one of the studio's: open the address that bt-hf studio has printed")
        if request.method not in ("GET", "HEAD", "POST"):
            return problem(405, "only GET and POST are known here")
        if request.method == "POST" and not guard.same_origin(headers):
            return problem(403, "this request comes from another page than the studio's")
        if headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
            return problem(403, "this request comes from another page than the studio's")
        if request.url.path.startswith("/page/"):  # files of the page itself, which hold nothing of the person
            return None
        if request.url.path == "/login" and request.method == "POST" and guard.password is not None:
            return None
        token = request.query_params.get("token")
        if request.url.path == "/" and token is not None:
            return guard.let_in() if equal(token, guard.token) else guard.ask()
        if not guard.has_key(request):
            if request.url.path.startswith("/api/"):
                return problem(401, "open the address that bt-hf studio has printed: this page has no key")
            return guard.ask()
        return None


def problem(status: int, text: str) -> Response:
    """Return an error as JSON; one about a body that is too large also ends the connection, which may bring more."""
    return JSONResponse(
        {"error": text}, status_code=status, headers={"Connection": "close"} if status == 413 else None
    )
