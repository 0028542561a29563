"""The studio in a real browser: a server of this process, and Debian's chromium driven by Playwright."""

import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from bt_hf.studio.app import build_app
from bt_hf.studio.security import Guard
from bt_hf.studio.server import Studio, bind, open_studio
from tiny_images import png

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
COLOURS = {"red": (220, 40, 30), "orange": (230, 140, 40), "blue": (30, 60, 210), "cyan": (40, 190, 210)}
BLINK = 0.2  # seconds between two clicks; the page takes faster ones for a double click


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Start a browser without a window; the test is skipped where none is installed."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser found (tried {', '.join(BROWSERS)}): apt-get install chromium")
    with sync_playwright() as playwright:
        # The sandbox needs a user other than root; the page is ours.
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


def warm_and_cold(folder: Path, prompts: int = 4) -> Path:
    """Write images of two warm and two cold colours for each prompt."""
    folder.mkdir(parents=True)
    for prompt in range(prompts):
        for name, colour in COLOURS.items():
            shade = tuple(int(part * (1 - 0.12 * prompt)) for part in colour)
            (folder / f"{'abcdefgh'[prompt]} thing {list(COLOURS).index(name)}.png").write_bytes(png(shade, (48, 48)))
    return folder


def colourfulness(image: Image.Image) -> float:
    """Mean over the pixels of the largest minus the smallest of red, green and blue."""
    pixels = np.asarray(image.convert("RGB"), dtype=float)
    return float((pixels.max(2) - pixels.min(2)).mean())


@dataclass
class Served:
    """A studio that is open.

    Attributes:
        studio: Its parts.
        address: With the key.
    """

    studio: Studio
    address: str

    @property
    def answers(self) -> list[Any]:
        """Clicks and judgements that the server holds."""
        return list(self.studio.session.log.answers.values())

    def colourfulness(self, number: int) -> float:
        """Colourfulness of an image."""
        return colourfulness(self.studio.desk.pool.read(number))


@contextmanager
def serve(source: str | None, session: Path, model: str | None = None, **options: Any) -> Iterator[Served]:
    """Open a studio on a free port, in a thread."""
    listening = bind("127.0.0.1", 0)
    guard = Guard("127.0.0.1", listening.getsockname()[1])
    studio = open_studio(source, session, guard, model=model, **options)
    config = uvicorn.Config(build_app(studio.desk, guard), log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield Served(studio, guard.address)
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        listening.close()
        studio.close()


class Visitor:
    """A person at the page.

    Args:
        browser: Their browser.
        address: Address that the studio printed.
        options: Of the browser's context, such as `viewport`.
    """

    def __init__(self, browser: Browser, address: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(20_000)
        self.errors: list[str] = []
        self.page = self.open(address)

    def open(self, address: str) -> Page:
        """Open a tab; whatever its scripts complain about is in `errors`."""
        page = self.context.new_page()
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on(
            "console",
            lambda message: (
                self.errors.append(message.text)
                if message.type == "error" and "Failed to load resource" not in message.text
                else None
            ),
        )
        page.goto(address)
        page.wait_for_selector("main h1")
        return page

    def pair(self, page: Page | None = None) -> tuple[int, int]:
        """Numbers of the two images on the page, once both are shown."""
        page = page or self.page
        page.wait_for_function("() => document.querySelectorAll('.stage .picture-frame img').length === 2")
        urls = page.eval_on_selector_all(".stage .picture-frame img", "all => all.map(one => one.src)")
        left, right = (int(url.split("/api/images/")[1].split("?")[0]) for url in urls)
        return left, right

    def saved(self, count: int, page: Page | None = None) -> None:
        """Wait until the page says that so many clicks are saved."""
        text = f"{count} click{'' if count == 1 else 's'}"
        (page or self.page).locator(".saved[data-unsent='0']", has_text=re.compile(f"^{text}$")).wait_for()

    def pause(self) -> None:
        """Wait for as long as a person needs at least."""
        time.sleep(BLINK)

    def close(self) -> None:
        """Close all tabs; a script that failed in any of them fails here."""
        self.context.close()
        assert self.errors == []
