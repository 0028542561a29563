"""A studio on eight pictures, served for the tests of a file."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from studio_page import Client, make_desk, serving, write_images


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    """A client of a studio on sixteen pictures of four prompts, in `tmp_path / "images"`."""
    with serving(make_desk(write_images(tmp_path / "images"), tmp_path / "session")) as client:
        yield client
