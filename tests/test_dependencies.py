"""Declared dependencies: every import is declared, and every floor is the version that `make floor` installs."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Extras that each part of bt_hf may import from, beside the dependencies: the others do without.
OPTIONAL = {
    "plots": ["plots"],
    "diffusion": ["diffusion"],
    "cli": ["diffusion"],
    "reward": ["search"],
    "studio": ["studio"],
}
# Tools that `make floor` does without: no version of theirs meets a user.
TOOLS = {
    *("build", "mypy", "ruff", "resvg-py", "mkdocs", "mkdocs-material", "mkdocstrings", "sentence-transformers"),
    *("axe-playwright-python", "playwright", "torchao"),
}


def declared(requirements: list[str]) -> dict[str, Requirement]:
    """Return requirements by name, but for `bt-hf[...]`, which stands for extras that are listed themselves."""
    found = {canonicalize_name(Requirement(text).name): Requirement(text) for text in requirements}
    return {name: requirement for name, requirement in found.items() if name != "bt-hf"}


def pins(file: str) -> dict[str, Version]:
    """Return the versions of a constraints file."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("#")[0].strip().split("==") for line in lines if "==" in line.split("#")[0]]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def imported(source: str) -> set[str]:
    """Return the top-level packages that a source imports from other distributions, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names - {"bt_hf"}


DEPENDENCIES = declared(PROJECT["dependencies"])
ALL = DEPENDENCIES | declared([text for extra in EXTRAS.values() for text in extra])
FLOORS = {
    name: Version(specifier.version)
    for name, requirement in ALL.items()
    for specifier in requirement.specifier
    if specifier.operator == ">=" and name not in TOOLS
}


@pytest.mark.parametrize(
    "file", sorted((ROOT / "bt_hf").rglob("*.py")), ids=lambda file: file.relative_to(ROOT).as_posix()
)
def test_every_import_is_declared(file: Path) -> None:
    part = file.relative_to(ROOT / "bt_hf").parts[0]
    allowed = {*DEPENDENCIES, *declared([text for extra in OPTIONAL.get(part, []) for text in EXTRAS[extra]])}
    providers = packages_distributions()
    for name in imported(file.read_text(encoding="utf-8")):
        found = {canonicalize_name(provider) for provider in providers.get(name, [name])}
        assert found & allowed, f"{file.name} imports {name}, which pyproject.toml does not declare for bt_hf/{part}."


def test_every_dependency_is_imported() -> None:
    names = set().union(*(imported(file.read_text(encoding="utf-8")) for file in (ROOT / "bt_hf").rglob("*.py")))
    providers = packages_distributions()
    used = {canonicalize_name(provider) for name in names for provider in providers.get(name, [name])}
    assert set(DEPENDENCIES) <= used, "declared, but imported nowhere in bt_hf"


def test_rule_finds_imports_inside_functions() -> None:
    source = (
        "import os\nfrom PIL import Image\nfrom . import x\ndef f():\n    import yaml.nodes\n    import bt_hf.data\n"
    )
    assert imported(source) == {"PIL", "yaml"}


@pytest.mark.parametrize("name", sorted(FLOORS))
def test_floor_is_installed_by_make_floor(name: str) -> None:
    if name == "torch":  # one build for both environments: an older one would be gigabytes more
        assert pins("constraints-floor.txt")[name] == pins("constraints.txt")[name]
    else:
        assert pins("constraints-floor.txt")[name] == FLOORS[name]
    assert pins("constraints.txt")[name] in ALL[name].specifier


def test_every_dependency_has_its_reason() -> None:
    block = re.search(r"^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert block is not None
    assert [line for line in block[1].splitlines() if not re.search(r'",\s+# \S', line)] == []
