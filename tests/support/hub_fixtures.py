"""Fixtures around `hub_server`, for `pytest_plugins`: a Hub, this process's client talking to it, and no waiting."""

import json
import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfFileSystem, close_session

from hub_server import READ_TOKEN, STRANGER, TOKEN, Account, Hub, serving

_rows: list[tuple[str, str, str]] = []


@pytest.fixture(scope="session")
def faults_seen() -> list[tuple[str, str, str]]:
    """Rows of the table that is printed after the tests: the fault, what the user sees, and what is left after it."""
    return _rows


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _rows:
        return
    if "BT_HF_FAULTS_JSON" in os.environ:  # examples/benchmarks/hub_faults.py asks for them
        Path(os.environ["BT_HF_FAULTS_JSON"]).write_text(json.dumps(_rows), encoding="utf-8")
    terminalreporter.section(f"{len(_rows)} faults of the Hub")
    widths = (34, 60, 40)
    for row in [("fault", "what the user sees", "what there is after it"), *_rows]:
        wrapped = [textwrap.wrap(cell, width) or [""] for cell, width in zip(row, widths, strict=True)]
        for line in range(max(map(len, wrapped))):
            cells = [cell[line] if line < len(cell) else "" for cell in wrapped]
            texts = (f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True))
            terminalreporter.line("  ".join(texts).rstrip())


@pytest.fixture(scope="session")
def served() -> Iterator[Hub]:
    with serving(Hub()) as server:
        yield server


@pytest.fixture
def hub(served: Hub) -> Hub:
    """A Hub without any repo, with an owner, `me`, and a stranger."""
    served.clear()
    served.accounts |= {TOKEN: Account("me"), READ_TOKEN: Account("me", writes=False), STRANGER: Account("you")}
    return served


@pytest.fixture
def online(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Let the client in this process talk to `hub`, with a token and an empty cache, which is returned.

    The environment is read when huggingface_hub is imported, and the other tests are offline.
    """
    cache = tmp_path / "hub-cache"
    for name, value in {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(tmp_path / "no-token"),
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    # Two clients that are made once, with the endpoint of then.
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.endpoint)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    # File systems of datasets are remembered with the endpoint, too.
    HfFileSystem.clear_instance_cache()
    monkeypatch.delenv("HF_HUB_OFFLINE")  # PEFT looks here each time
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    close_session()
    yield cache
    close_session()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record the seconds that the client and we would wait between tries, without waiting."""
    seconds: list[float] = []
    clock = SimpleNamespace(sleep=seconds.append)
    for module in ("huggingface_hub.utils._http", "huggingface_hub.file_download", "bt_hf.hub.retries"):
        monkeypatch.setattr(sys.modules[module], "time", clock)
    return seconds
