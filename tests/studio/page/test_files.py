"""Files of the page: complete, offline, within its own policy, and vendored libraries with their licences."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "bt_hf" / "studio" / "page"
OURS = sorted(path for path in PAGE.iterdir() if path.suffix in (".css", ".html", ".js"))
VENDORED = sorted((PAGE / "vendor").glob("*.mjs"))


@pytest.mark.parametrize("path", OURS + VENDORED, ids=lambda path: path.name)
def test_imports_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"""^(?:import|export) [^;]*?from\s*["']([^"']+)["']""", text, re.MULTILINE):
        assert name.startswith("./"), f"{name} is not a file of the page"
        assert (path.parent / name).is_file(), name
    for name in re.findall(r"""(?:src|href)="(page/[^"]+)""", text):
        assert (PAGE.parent / name).is_file(), name


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_nothing_is_loaded_from_elsewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?:https?:)?//[\w-]+\.\w", re.sub(r"^\s*//.*", "", text, flags=re.MULTILINE))
    # Nothing that the policy of the page forbids: inline scripts, styles and handlers, eval, markup from text.
    assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\son\w+=\"|\bstyle=\"", text) or path.suffix == ".js"
    assert not re.search(r"\beval\(|new Function|innerHTML|outerHTML|insertAdjacentHTML|dangerously", text)


def test_vendored_libraries_have_their_licences() -> None:
    table = (PAGE / "vendor" / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `([^`]+)` ", table, re.MULTILINE))
    assert named == {path.name for path in VENDORED}
    assert "MIT" in (PAGE / "vendor" / "LICENSE-preact.txt").read_text(encoding="utf-8")
    assert "Apache License" in (PAGE.parents[2] / "LICENSE").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350
