"""Attacks on the page, each by a real client on a real port."""

import io
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from bt_hf.studio.security import Guard
from studio_page import Client, make_desk, photo, serving, write_images

MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)>"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A studio on photographs with metadata, under a prompt of markup; uploads are on. Nothing here may change it."""
    folder = tmp_path_factory.mktemp("studio")
    images = folder / "images"
    images.mkdir()
    for number in range(3):
        photo(images / f"{number}.jpg", (640 + number, 480))
    (folder / "secret.txt").write_text("SECRET-FILE")
    desk = make_desk(images, folder / "session", prompt=MARKUP, uploads=True)
    with serving(desk) as client:
        yield client


@pytest.fixture(scope="module")
def pair(page: Client) -> str:
    return page.get("/api/state")["queue"][0]["id"]


def clicks_of(page: Client) -> int:
    return page.get("/api/state")["clicks"]


# --- Who may ask ---


def test_the_cookie_is_for_this_page_alone(page: Client) -> None:
    cookie = page.entered.headers["Set-Cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert page.entered.headers["Location"] == "/"


@pytest.mark.parametrize("path", ["/", "/api/state", "/api/images/0", "/api/taste", "/api/export", "/api/nothing"])
def test_without_the_key_nothing_is_told(page: Client, path: str) -> None:
    for headers in ({"Cookie": "other=1"}, {"Cookie": f"{page.cookie}x"}, {"Cookie": f"{page.cookie.split('=')[0]}="}):
        reply = page.request("GET", path, headers=headers)
        assert reply.status == 401
        assert b"script" not in reply.content


def test_a_guessed_token_opens_nothing(page: Client) -> None:
    token = page.address.split("token=")[1]
    assert len(token) >= 43  # 32 random bytes
    for guess in ("", "a", token[:-1], token + "a", token.swapcase(), "%00", "%ff%fe"):
        reply = page.request("GET", f"/?token={guess}", headers={"Cookie": ""})
        assert reply.status == 401
        assert "Set-Cookie" not in reply.headers


def test_tokens_differ() -> None:
    assert len({Guard("127.0.0.1", 1).token for _ in range(100)}) == 100


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example:{port}", "127.0.0.1:1", "127.0.0.1", "", "[::1",
     "localhost:{port}@evil.example", "a@127.0.0.1:{port}", "127.0.0.1:{port}/x", "0x7f000001:{port}"],
)  # fmt: skip
def test_another_name_that_leads_here_is_refused(page: Client, host: str) -> None:
    """DNS rebinding: the browser of a visitor of `evil.example` connects to this server."""
    host = host.format(port=page.host.split(":")[1])
    for path in ("/api/state", "/", page.address.split(page.host)[1]):
        answer = page.raw(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nCookie: {page.cookie}\r\n\r\n".encode())
        assert answer.startswith((b"HTTP/1.1 421", b"HTTP/1.1 400")), answer
        assert b"queue" not in answer
        assert b"set-cookie" not in answer.lower()


def test_a_request_without_a_host_is_refused(page: Client) -> None:
    answer = page.raw(f"GET /api/state HTTP/1.0\r\nCookie: {page.cookie}\r\n\r\n".encode())
    assert answer.split()[1] in (b"400", b"421")


@pytest.mark.parametrize("name", ["localhost:{port}", "LOCALHOST:{port}", "[::1]:{port}"])
def test_other_names_of_this_machine_are_fine(page: Client, name: str) -> None:
    host = name.format(port=page.host.split(":")[1])
    assert page.request("GET", "/api/taste", headers={"Host": host}).status == 200


@pytest.mark.parametrize(
    "origin", [None, "null", "http://evil.example", "http://127.0.0.1", "http://127.0.0.1:1", "file://", "http://"]
)
@pytest.mark.parametrize("path", ["/api/clicks", "/api/undo", "/api/jobs", "/api/jobs/stop", "/api/ab", "/login"])
def test_a_post_from_another_page_does_nothing(page: Client, pair: str, path: str, origin: str | None) -> None:
    before = clicks_of(page)
    body = f'{{"id": "x", "pair": "{pair}", "choice": "left"}}'.encode()
    headers = {**JSON, **({} if origin is None else {"Origin": origin})}
    assert page.request("POST", path, body, headers).status == 403
    assert clicks_of(page) == before


def test_a_form_of_another_page_is_not_json(page: Client, pair: str) -> None:
    """Browsers send these three types across sites without asking; a lax check of the origin must not be all."""
    body = f'{{"id": "x", "pair": "{pair}", "choice": "left"}}'.encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        headers = {"Origin": f"http://{page.host}", "Content-Type": kind}
        assert page.request("POST", "/api/clicks", body, headers).status == 415


def test_images_are_not_for_other_pages(page: Client) -> None:
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    assert page.request("GET", "/api/images/0", headers=headers).status == 403
    assert page.request("GET", "/api/images/0").headers["Cross-Origin-Resource-Policy"] == "same-origin"


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods_are_refused(page: Client, method: str) -> None:
    assert page.request(method, "/api/state", headers={"Origin": f"http://{page.host}"}).status in (400, 405)


# --- What they get ---


@pytest.mark.parametrize("path", ["/", "/api/state", "/api/images/0", "/api/nothing", "/page/nothing.js"])
def test_every_answer_binds_the_browser(page: Client, path: str) -> None:
    headers = page.request("GET", path).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"  # the token stands in the first address
    assert "Access-Control-Allow-Origin" not in headers


TRAVERSALS = [
    "../secret.txt", "..%2fsecret.txt", "%2e%2e/%2e%2e/secret.txt", "....//secret.txt", "..%5csecret.txt",
    "%2e%2e%2f%2e%2e%2f%2e%2e%2fetc/passwd", "/etc/passwd", "//etc/passwd", "..%00/secret.txt",
    "%252e%252e/secret.txt",
    "0/../../secret.txt", "0%00", "0.png", "-1", "1e1", "٣", "99999999999999999999", "session.json", "clicks.jsonl",
]  # fmt: skip


@pytest.mark.parametrize("base", ["/api/images/", "/api/drawings/", "/page/", "/", "/page/../", "/api/"])
def test_no_path_leads_to_another_file(page: Client, base: str) -> None:
    for name in TRAVERSALS:
        target = f"{base}{name}".encode()
        head = f"Host: {page.host}\r\nCookie: {page.cookie}\r\n\r\n"
        answer = page.raw(b"GET " + target + b" HTTP/1.1\r\n" + head.encode())
        assert answer.split(b" ", 2)[1] in (b"400", b"401", b"403", b"404", b"405"), (target, answer[:200])
        for secret in (b"SECRET", b"root:", b"bt_hf studio 1", b'"asked"'):
            assert secret not in answer


def test_images_of_numbers_that_are_not_there(page: Client) -> None:
    for number in ("3", "77", "999999999"):
        assert page.request("GET", f"/api/images/{number}").status == 404


def test_pictures_carry_their_pixels_alone(page: Client) -> None:
    """Place, comment and description of a photograph stay on the disk that it came from."""
    for size in ("", "?size=256", "?size=64", "?size=9999"):
        content = page.request("GET", f"/api/images/1{size}").content
        assert b"SECRET" not in content
        with Image.open(io.BytesIO(content)) as image:
            assert not image.getexif()
            assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
            image.load()


def test_stored_pictures_carry_their_pixels_alone(page: Client, tmp_path_factory: pytest.TempPathFactory) -> None:
    stored = list(tmp_path_factory.getbasetemp().glob("studio*/session/images/*"))
    assert stored
    for file in stored:
        assert b"SECRET" not in file.read_bytes()
        assert b"Exif" not in file.read_bytes()


def test_captions_are_text(page: Client) -> None:
    reply = page.request("GET", "/api/state")
    assert reply.headers["Content-Type"] == "application/json"
    assert reply.json["queue"][0]["prompt"] == MARKUP
    assert MARKUP.encode() not in page.request("GET", "/").content


def test_errors_do_not_repeat_markup_as_html(page: Client) -> None:
    reply = page.click("x", MARKUP)
    assert reply.status == 409
    assert reply.headers["Content-Type"] == "application/json"


# --- What they send ---


def upload(page: Client, content: bytes, kind: str = "image/png", query: str = "") -> "object":
    return page.request(
        "POST", f"/api/images{query}", content, {"Origin": f"http://{page.host}", "Content-Type": kind}
    )


def test_an_upload_is_encoded_anew(page: Client, tmp_path: Path) -> None:
    reply = upload(page, photo(tmp_path / "p.jpg").read_bytes(), "image/jpeg", "?prompt=a%20b&name=%3Cb%3E..%2F..%2Fx")
    assert reply.status == 200
    content = page.request("GET", f"/api/images/{reply.json['image']}").content
    assert b"SECRET" not in content
    assert Image.open(io.BytesIO(content)).size == (640, 480)


def test_uploads_are_bounded(page: Client) -> None:
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")  # 400 million pixels in 50 kB
    assert upload(page, bomb.getvalue()).status == 400
    assert upload(page, b"not an image").status == 400
    assert upload(page, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").status == 400  # Ghostscript would run
    assert upload(page, b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml").status == 400
    assert upload(page, b"x", "text/plain").status == 415
    head = f"POST /api/images HTTP/1.1\r\nHost: {page.host}\r\nCookie: {page.cookie}\r\nContent-Type: image/png\r\n"
    head += f"Origin: http://{page.host}\r\n"
    assert page.raw(f"{head}Content-Length: 99999999999\r\n\r\n".encode()).split()[1] == b"413"
    assert page.raw(f"{head}Content-Length: -1\r\n\r\n".encode()).split()[1] == b"400"


def test_an_upload_without_an_end_is_cut_off(page: Client) -> None:
    head = f"POST /api/images HTTP/1.1\r\nHost: {page.host}\r\nCookie: {page.cookie}\r\nContent-Type: image/png\r\n"
    head += f"Origin: http://{page.host}\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk, sent = b"%x\r\n" % (1 << 20) + bytes(1 << 20) + b"\r\n", 0
    with socket.create_connection(("127.0.0.1", int(page.host.split(":")[1])), timeout=20) as connection:
        connection.sendall(head.encode())
        try:
            while sent < 200:
                connection.sendall(chunk)
                sent += 1
        except OSError:
            pass
    assert sent < 100


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"nan", b'"x"', b"{", b"\xff\xfe", b"[" * 60_000, b'{"id": 5}', b'{"id": ""}', b'{"id": "x"}',
     b'{"id": "x", "pair": "p", "choice": "sideways"}', b'{"id": "x", "pair": ["p"], "choice": "left"}',
     b'{"id": "x", "pair": "p", "choice": "left", "seconds": "long"}',
     b'{"id": "x", "pair": "p", "choice": "left", "seconds": NaN}'],
)  # fmt: skip
def test_bad_bodies_are_errors_of_one_line(page: Client, body: bytes) -> None:
    reply = page.request("POST", "/api/clicks", body, {**JSON, "Origin": f"http://{page.host}"})
    assert reply.status == 400
    assert "\n" not in reply.json["error"]


def test_bodies_are_bounded(page: Client) -> None:
    body = b'{"id": "' + b"x" * 70_000 + b'"}'
    assert page.request("POST", "/api/clicks", body, {**JSON, "Origin": f"http://{page.host}"}).status == 413


# --- Beyond this machine ---


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "studio.example"])
def test_other_machines_need_a_password(host: str) -> None:
    with pytest.raises(ValueError, match=r"--host .* every machine that reaches this one .* --password"):
        Guard(host, 1)
    with pytest.raises(ValueError, match="at least 8"):
        Guard(host, 1, "short")
    assert not Guard(host, 1, "long enough").local


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1"])
def test_this_machine_needs_none(host: str) -> None:
    assert Guard(host, 1).local


def test_the_password_opens_the_page(tmp_path: Path) -> None:
    desk = make_desk(write_images(tmp_path / "images", 1, 2), tmp_path / "session", start=False)
    with serving(desk, "0.0.0.0", password="correct horse") as page:
        origin = {"Origin": f"http://{page.host}", "Content-Type": "application/x-www-form-urlencoded", "Cookie": ""}
        asked = page.request("GET", "/", headers={"Cookie": ""})
        assert asked.status == 401
        assert b'type="password"' in asked.content
        began = time.monotonic()
        wrong = page.request("POST", "/login", b"password=wrong+horse", origin)
        assert time.monotonic() - began > 0.9  # so many guesses a second, and no more
        assert wrong.status == 403
        assert "Set-Cookie" not in wrong.headers
        right = page.request("POST", "/login", b"password=correct+horse", origin)
        assert right.status == 303
        page.cookie = right.headers["Set-Cookie"].split(";")[0]
        assert page.get("/api/state")["images"] == 2
        # A name that an attacker leads here has no cookie, and is refused before it could ask for the password.
        host = f"evil.example:{page.host.split(':')[1]}"
        assert page.request("GET", "/", headers={"Host": host}).status == 421
