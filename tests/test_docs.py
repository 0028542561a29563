"""Documents: their code runs, their commands parse, the reference is complete, and the site builds."""

import importlib
import re
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

import bt_hf
import bt_hf.losses
import bt_hf.metrics
import bt_hf.plots
from bt_hf import BradleyTerryConfig, PreferenceLoRAConfig
from code_examples import fenced_blocks, run_blocks

pytest_plugins = ["hub_fixtures", "workplace"]
ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
DOCUMENTS = [ROOT / "README.md", *sorted((DOCS / "guides").glob("*.md"))]
REFERENCE = "\n".join(path.read_text(encoding="utf-8") for path in sorted((DOCS / "reference").glob("*.md")))


def document_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("document", DOCUMENTS, ids=document_id)
def test_code_runs(document: Path, workplace: Callable[[str], Path]) -> None:
    text = document.read_text(encoding="utf-8")
    blocks = list(fenced_blocks(text, "python"))
    assert blocks
    workplace(text)
    run_blocks(blocks, str(document), {"__name__": "__main__"})


def commands(text: str) -> list[list[str]]:
    """Return the arguments of each `bt-hf` in a shell block, on its own or started by accelerate."""
    found = []
    for block in fenced_blocks(text, "bash"):
        for line in block.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for start in (["bt-hf"], ["-m", "bt_hf.cli"]):
                for place in range(len(words)):
                    if words[place : place + len(start)] == start:
                        found.append(words[place + len(start) :])
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=document_id)
def test_commands_parse(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = document.read_text(encoding="utf-8")
    for config in fenced_blocks(text, "yaml"):
        (tmp_path / "taste.yaml").write_text(config.code)
    found = commands(text)
    assert found
    for name, *arguments in found:
        if name in ("lora", "reward"):
            arguments.append("--use_cpu=true")  # else bf16 asks for a GPU
        importlib.import_module(f"bt_hf.cli.{name}").parse(arguments)  # exits with a message if it can't


def test_reference_has_every_public_name() -> None:
    documented = set(re.findall(r"^::: (\S+)$", REFERENCE, re.MULTILINE))
    assert {"bt_hf.losses", "bt_hf.metrics", "bt_hf.plots"} <= documented  # with all that they have
    alone = {name for name in bt_hf.__all__ if getattr(bt_hf, name).__module__ not in documented}
    assert {f"bt_hf.{name}" for name in alone} <= documented
    for path in documented:
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name).__doc__


def test_reference_has_every_command() -> None:
    from bt_hf.cli import COMMANDS

    helps = re.findall(r"^<!-- bt-hf (\S+) --help -->$", REFERENCE, re.MULTILINE)
    assert sorted(helps) == sorted(COMMANDS)


def test_site_builds_without_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mkdocs", reason="make docs installs it")
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    monkeypatch.chdir(ROOT)
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    for config, page in ((BradleyTerryConfig, "rewards"), (PreferenceLoRAConfig, "diffusion")):
        text = (tmp_path / "reference" / f"{page}.html").read_text(encoding="utf-8")
        for name in {name for base in config.__mro__ for name in own_annotations(base)}:
            assert f"<code>{name}</code>" in text


def own_annotations(base: type) -> Iterable[str]:
    return base.__dict__.get("__annotations__", ()) if base.__module__.startswith("bt_hf.") else ()
