"""Fetch images from public web servers: http(s) alone, with limits, and without reaching into private networks."""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal
from urllib.parse import quote, urljoin, urlsplit

from bt_hf.data.images import one_line, short

AllowUrls = bool | Literal["private"]

SECONDS = 30.0  # for one try, from connecting to the last byte
MAX_BYTES = 64 * 2**20
TRIES = 4
PAUSE = 1.0  # seconds before the second try, doubled before each further one
MAX_PAUSE = 60.0  # limit to what a server may ask for with Retry-After
_REDIRECTS = 5
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class UnreachableError(ConnectionError):
    """A server that does not answer or has no time, in which case nothing is known about the image."""


class _Again(Exception):
    """A failure that may pass.

    Attributes:
        pause: Seconds that the server asks to wait, or `None`.
        cut: The server has the image, and sent a part of it.
    """

    def __init__(self, reason: str, pause: float | None = None, cut: bool = False) -> None:
        super().__init__(reason)
        self.pause = pause
        self.cut = cut


def fetch(url: str, allow_urls: AllowUrls) -> bytes:
    """Return the content of a URL.

    Redirects are followed. Connections go straight to addresses that were looked at beforehand; proxies of the
    environment are not used. Network errors and the status codes 429 and 5xx are tried `TRIES` times.

    Args:
        url: An `http` or `https` URL.
        allow_urls: `True` for servers with public addresses, "private" for any.

    Raises:
        ValueError: The image can't be had from there: another scheme, a private address, a status such as 404, more
            than `MAX_BYTES`, or a download that was cut off each time. One line, `reason: detail`.
        UnreachableError: The server can't be reached, or answers 429 or 5xx each time.
    """
    for number in range(TRIES):
        try:
            return _follow(url, allow_urls)
        except _Again as error:
            failure = error
        if number + 1 < TRIES:
            pause = PAUSE * 2**number if failure.pause is None else min(failure.pause, MAX_PAUSE)
            time.sleep(pause)
    if failure.cut:
        raise ValueError(f"download cut off: {short(url)} ({failure}, {TRIES} times)")
    raise UnreachableError(
        f"{short(url)} is unreachable ({failure}, {TRIES} times): no row is dropped for that; try again later"
    )


def _follow(url: str, allow_urls: AllowUrls) -> bytes:
    target = url
    for _ in range(_REDIRECTS + 1):
        with _response(target, allow_urls) as response:
            location = response.getheader("Location")
            if response.status in (301, 302, 303, 307, 308) and location:
                target = urljoin(target, location)
                continue
            return _content(response, target)
    raise ValueError(f"image missing: {short(url)} redirects more than {_REDIRECTS} times")


def _content(response: http.client.HTTPResponse, url: str) -> bytes:
    status = response.status
    if status == 429 or status >= 500:
        asked = response.getheader("Retry-After") or ""
        raise _Again(f"HTTP status {status}", float(asked) if re.fullmatch(r"\d{1,6}", asked) else None)
    if status != 200:
        raise ValueError(f"image missing: {short(url)} gives HTTP status {status}")
    try:
        content = response.read(MAX_BYTES + 1)
    except (http.client.HTTPException, OSError, ValueError) as error:
        raise _Again(one_line(error), cut=True) from error
    if len(content) > MAX_BYTES:
        raise ValueError(f"image too large: {short(url)} has more than {MAX_BYTES // 2**20} MiB")
    if response.length:  # `read` with a size does not tell that less came than was announced
        raise _Again(f"{len(content)} bytes came, {response.length} did not", cut=True)
    return content


@contextmanager
def _response(url: str, allow_urls: AllowUrls) -> Iterator[http.client.HTTPResponse]:
    """Open one URL, without redirects. After `SECONDS` its connection is cut, whatever it is doing."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        host = host if host.isascii() else host.encode("idna").decode()
    except ValueError as error:
        raise ValueError(f"not a URL: {short(url)} ({one_line(error)})") from error
    if parts.scheme not in ("http", "https") or not host or parts.username is not None:
        raise ValueError(f"not a plain web address: {short(url)}, expected http(s)://host/path without a password")
    if re.search(r"[\s\x00-\x1f\x7f\\]", url):
        raise ValueError(f"not a URL: {short(url)} has spaces or control characters")
    secure = parts.scheme == "https"
    port = port or (443 if secure else 80)
    address = _address(host, port, allow_urls, url)
    connection = http.client.HTTPConnection(host, port)  # it gets its socket here, so it never resolves the name again
    expired = threading.Event()
    watch = None
    try:
        connection.sock = _connect(address, host if secure else None)
        # The connection itself forgets its socket at answers that end it.
        watch = threading.Timer(SECONDS, _cut, [connection.sock, expired])
        watch.daemon = True
        watch.start()
        path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._") + (
            "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~-._?") if parts.query else ""
        )
        # Identity, as a small compressed answer may hold a huge file.
        connection.request("GET", path, headers={"User-Agent": "bt-hf", "Accept-Encoding": "identity"})
        response = connection.getresponse()
    except (http.client.HTTPException, OSError, ValueError) as error:
        if watch is not None:
            watch.cancel()
        connection.close()
        raise _Again(f"no end after {SECONDS:g} s" if expired.is_set() else one_line(error)) from error
    try:
        yield response
        if expired.is_set():
            raise _Again(f"no end after {SECONDS:g} s")
    except _Again as error:
        if error.cut and expired.is_set():  # slow, and so an outage
            raise _Again(f"no end after {SECONDS:g} s") from error
        raise
    finally:
        watch.cancel()
        response.close()
        connection.close()


def _address(host: str, port: int, allow_urls: AllowUrls, url: str) -> tuple[str, int]:
    """Resolve a host to an address that may be connected to."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise _Again(f"{host} has no address: {one_line(error)}") from error
    addresses = [str(entry[4][0]) for entry in found]
    private = [address for address in addresses if not is_public(address)]
    if private and allow_urls != "private":
        raise ValueError(
            f"private address: {short(url)} leads to {private[0]}; pass allow_urls='private' if that is your server"
        )
    return addresses[0], port


def is_public(address: str) -> bool:
    """True if an IP address is reachable from the whole internet, also where it wraps another one.

    Example:
        >>> is_public("1.1.1.1"), is_public("::ffff:127.0.0.1"), is_public("169.254.169.254")
        (True, False, False)
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        wrapped = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in _NAT64:
            wrapped.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        inner = [one for one in wrapped if one is not None]
        if inner:
            return all(is_public(str(one)) for one in inner)
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _connect(address: tuple[str, int], host: str | None) -> socket.socket:
    plain = socket.create_connection(address, timeout=SECONDS / 2)
    if host is None:
        return plain
    try:
        return ssl.create_default_context().wrap_socket(plain, server_hostname=host)
    except BaseException:
        plain.close()
        raise


def _cut(connected: socket.socket, expired: threading.Event) -> None:
    expired.set()
    with suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)
