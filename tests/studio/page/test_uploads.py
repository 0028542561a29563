"""Pictures of the person's own, from an empty studio to a pair."""

from pathlib import Path
from typing import Any

from browsing import Visitor, serve
from tiny_images import png


def test_from_no_picture_to_a_pair(browser: Any, tiny_clip: str, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(png("red", (40, 40)))
    (tmp_path / "blue.png").write_bytes(png("blue", (40, 40)))
    (tmp_path / "notes.png").write_text("not a picture")
    with serve(None, tmp_path / "session", tiny_clip, uploads=True) as served:
        person = Visitor(browser, served.address)
        page = person.page
        assert page.locator("h1").inner_text() == "There are too few pictures yet"
        page.get_by_label("Prompt").fill("my garden")
        page.get_by_label("Pictures", exact=True).set_input_files(
            [tmp_path / f"{name}.png" for name in ("red", "notes", "blue")]
        )
        page.get_by_role("alert").filter(has_text="notes.png").wait_for()
        assert set(person.pair()) == {0, 1}
        assert page.locator("h1").inner_text() == "my garden"
        page.get_by_label("Prompt").blur()  # arrows move the cursor there
        person.pause()
        page.keyboard.press("ArrowLeft")
        person.saved(1)
        page.get_by_text("You have compared every pair there is.").wait_for()
        person.close()
