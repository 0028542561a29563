"""A browser and a studio on a small folder, for the tests of the page."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import browsing
import tiny_models


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with browsing.open_browser() as browser:
        yield browser


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.save(tmp_path_factory.mktemp("base") / "clip")


@pytest.fixture
def served(browser: Any, tiny_clip: str, tmp_path: Path) -> Iterator[Any]:
    folder = browsing.warm_and_cold(tmp_path / "things")
    with browsing.serve(str(folder), tmp_path / "session", tiny_clip) as served:
        yield served


@pytest.fixture
def visit(browser: Any, served: Any) -> Iterator[Callable[..., Any]]:
    visitors = []

    def visit(**options: Any) -> Any:
        visitors.append(browsing.Visitor(browser, served.address, **options))
        return visitors[-1]

    yield visit
    for visitor in visitors:
        visitor.close()
