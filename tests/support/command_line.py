"""Helpers for tests of the command line."""

from pathlib import Path
from typing import NamedTuple

import pytest

from bt_hf.cli import main

RED, BLUE = (220, 40, 40), (40, 40, 220)
PROMPT = "a red house"


class Workplace(NamedTuple):
    """A base model, pairs, pictures, and a reward that `bt-hf reward` trained with them."""

    model: str
    pairs: str
    images: Path
    reward: Path
    printed: str


def lines_of_error(capsys: pytest.CaptureFixture[str], *argv: object) -> list[str]:
    assert main([str(argument) for argument in argv]) == 2
    return capsys.readouterr().err.splitlines()
