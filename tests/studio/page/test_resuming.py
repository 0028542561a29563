"""A studio that is killed in the middle, and a browser that goes on."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from browsing import Visitor, warm_and_cold
from bt_hf.data.clicks import Click, read_clicks


@contextmanager
def command(folder: Path, session: Path, model: str, port: int) -> Iterator[tuple[subprocess.Popen, str]]:
    """Run `bt-hf studio`, and give its process and the address that it prints; it is killed at the end."""
    argv = ["studio", str(folder), "--session", str(session), "--model", model, "--port", str(port), "--no_browser"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bt_hf.cli", *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            found = re.search(r"http://\S+", line)
            if found:
                yield process, found[0]
                break
        else:
            raise AssertionError("".join(lines))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_killed_in_the_middle_it_goes_on_at_the_same_pair(browser: Any, tiny_clip: str, tmp_path: Path) -> None:
    folder, session = warm_and_cold(tmp_path / "things"), tmp_path / "session"
    with command(folder, session, tiny_clip, 0) as (process, address):
        person = Visitor(browser, address)
        for key in ("ArrowLeft", "ArrowRight", "ArrowLeft"):
            person.pair()
            person.pause()
            person.page.keyboard.press(key)
        person.saved(3)
        person.pair()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        person.pause()
        person.page.keyboard.press("ArrowRight")  # with nobody there
        person.page.get_by_role("alert").wait_for()
        assert "does not answer" in person.page.get_by_role("alert").inner_text()
        waiting = person.pair()
    port = int(re.search(r":(\d+)/", address)[1])
    # The same command again: another key, so that the old page says what to do, and keeps its click until then.
    with command(folder, session, tiny_clip, port) as (process, renewed):
        person.page.get_by_role("button", name="Try now").click()
        person.page.get_by_text("Open the address that it printed").wait_for()
        tab = person.open(renewed)
        person.saved(4, tab)
        assert person.pair(tab) == waiting
        person.page.reload()
        person.saved(4)
        assert person.pair() == waiting
        person.close()
    clicks = [answer for answer in read_clicks(session).answers.values() if isinstance(answer, Click)]
    assert [click.choice for click in clicks] == ["left", "right", "left", "right"]
