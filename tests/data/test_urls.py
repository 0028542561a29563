"""Fetching: only from where it may, within limits, and an outage is not a missing image."""

import socket
from collections.abc import Iterator

import pytest
from datasets import Dataset

from bt_hf.data import urls
from bt_hf.data.formats import PreferenceDataError
from bt_hf.data.images import to_rgb
from bt_hf.data.pairs import load_preference_pairs
from bt_hf.data.urls import UnreachableError, fetch, is_public
from image_server import ImageServer, image_server
from tiny_images import png


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "PAUSE", 0.0)


@pytest.fixture(scope="module")
def server() -> Iterator[ImageServer]:
    with image_server(png("red")) as server:
        yield server


def test_content_and_redirects(server: ImageServer) -> None:
    for path in ("ok.png", "moved.png", "ok.png?a=b c".replace(" ", "%20")):
        assert fetch(f"{server.url}/{path}", "private") == png("red")


@pytest.mark.parametrize("path", ["busy.png", "broken.png"])
def test_an_outage_is_tried_again_and_is_not_a_missing_image(server: ImageServer, path: str) -> None:
    before = server.asked[path]
    with pytest.raises(UnreachableError, match=r"unreachable \(HTTP status (429|503), 4 times\)"):
        fetch(f"{server.url}/{path}", "private")
    assert server.asked[path] - before == urls.TRIES
    assert fetch(f"{server.url}/twice.png", "private") == png("red")


@pytest.mark.parametrize(
    ("path", "message", "times"),
    [
        ("gone.png", "image missing: .* HTTP status 404", 1),
        ("forbidden.png", "image missing: .* HTTP status 403", 1),
        ("cut.png", "download cut off: .*20 bytes came", 4),
        ("circle.png", "image missing: .* redirects more than 5 times", 6),
        ("file.png", "not a plain web address: 'file:///etc/passwd'", 1),
        ("endless.png", "image too large: .* more than 1 MiB", 1),
    ],
)
def test_bad_images(server: ImageServer, path: str, message: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "MAX_BYTES", 2**20)
    before = server.asked[path]
    with pytest.raises(ValueError, match=message):
        fetch(f"{server.url}/{path}", "private")
    assert server.asked[path] - before == times


def test_a_slow_server_is_an_outage(server: ImageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "SECONDS", 0.2)
    monkeypatch.setattr(urls, "TRIES", 1)
    with pytest.raises(UnreachableError, match=r"no end after 0\.2 s"):
        fetch(f"{server.url}/slow.png", "private")


def test_closed_ports_and_unknown_hosts_are_outages(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(UnreachableError, match="unreachable"):
            fetch(f"http://127.0.0.1:{closed.getsockname()[1]}/a.png", "private")

    def unknown(*arguments: object, **options: object) -> None:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(UnreachableError, match="has no address"):
        fetch("http://images.example/a.png", True)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "0", "[::1]", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]"]
)
def test_private_hosts_are_refused_before_anything_is_sent(server: ImageServer, host: str) -> None:
    port = server.url.rpartition(":")[2]
    before = server.asked.total()
    with pytest.raises(ValueError, match="private address: .*allow_urls='private'"):
        fetch(f"http://{host}:{port}/ok.png", True)
    assert server.asked.total() == before


def test_private_hosts_are_refused_after_redirects_and_for_any_of_their_addresses(
    server: ImageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo

    def resolve(host: str, *arguments: object, **options: object) -> list:
        public = real("1.1.1.1", *arguments, **options)
        return public + real("10.0.0.7", *arguments, **options) if host == "mixed.example" else public

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(ValueError, match=r"leads to 10\.0\.0\.7"):
        fetch("http://mixed.example/a.png", True)
    # The name resolves to a public address, whose part the server on this machine plays.
    address = server.http.server_address
    connect = socket.create_connection
    monkeypatch.setattr(socket, "create_connection", lambda _, timeout: connect(address[:2], timeout))
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *a, **o: real("1.1.1.1" if host == "a.example" else host, *a, **o)
    )
    assert fetch("http://a.example/moved.png", True) == png("red")
    monkeypatch.setattr(urls, "urljoin", lambda base, location: "http://169.254.169.254/latest/meta-data")
    with pytest.raises(ValueError, match=r"leads to 169\.254\.169\.254"):
        fetch("http://a.example/moved.png", True)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "10.1.2.3",
        "100.64.0.1",
        "127.9.9.9",
        "169.254.169.254",
        "172.16.0.1",
        "192.168.1.1",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::ffff:10.0.0.1",
        "fc00::1",
        "fe80::1",
        "fe80::1%eth0",
        "ff02::1",
        "64:ff9b::a00:1",
        "2002:7f00:1::",
        "::127.0.0.1",
    ],
)
def test_private_addresses(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://a.example/a.png",
        "http://",
        "http:///a.png",
        "http://u:p@a.example/a.png",
        "http://a.example:x/a.png",
        "http://a.example/a b.png",
        "http://a.example/\r\nX: y",
        "http://[::1/a.png",
        "http://a..example/a.png",
    ],
)
def test_what_is_not_a_plain_url(url: str) -> None:
    with pytest.raises((ValueError, UnreachableError)) as caught:
        fetch(url, True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_with_urls(server: ImageServer, streaming: bool) -> None:
    def rows(*names: str) -> Dataset:
        return Dataset.from_dict(
            {
                "prompt": list(names),
                "chosen": [f"{server.url}/{name}.png" for name in names],
                "rejected": [png("blue")] * len(names),
            }
        )

    def load(data: Dataset, **options: object) -> list:
        return list(load_preference_pairs(data, streaming=streaming, **options))

    (row,) = load(rows("ok"), allow_urls="private")
    assert to_rgb(row["chosen"]).getpixel((0, 0)) == (255, 0, 0)
    before = server.asked.total()
    with pytest.raises(
        PreferenceDataError, match="row 0 of the dataset: image at an address: chosen .*allow_urls=True"
    ):
        load(rows("ok"))
    with pytest.raises(PreferenceDataError, match="row 0 of the dataset: private address: chosen"):
        load(rows("ok"), allow_urls=True)
    assert server.asked.total() == before
    for bad, reason in (("gone", "image missing"), ("cut", "download cut off")):
        with pytest.raises(PreferenceDataError, match=f"row 1 of the dataset: {reason}: chosen 'http"):
            load(rows("ok", bad), allow_urls="private")
        assert [row["prompt"] for row in load(rows("ok", bad), allow_urls="private", on_bad_rows="drop")] == ["ok"]
    with pytest.raises(UnreachableError):
        load(rows("ok", "broken"), allow_urls="private", on_bad_rows="drop")
