"""The shape of the library, as rules that fail: which file may import which, and what `import bt_hf` may cost."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).parents[1] / "bt_hf"

# A file imports its own part (the file, or everything in its folder) and parts of lower floors, nothing else.
FLOORS = {
    "losses": 0,
    "data": 0,
    "metrics": 0,
    "hub": 1,
    "plots": 1,
    "evaluate_modules": 1,
    "training": 2,
    "reward": 3,
    "diffusion": 3,
    "cli": 4,
    "__init__": 5,
}
SLOW_IMPORTS = ["torch", "transformers", "diffusers", "trl"]

FILES = sorted(PACKAGE.rglob("*.py"))
all_files = pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())


def part_of(module: str) -> str:
    """The part that a module belongs to: `bt_hf.reward.scorer` -> `reward`, `bt_hf` -> `__init__`."""
    return (module.split(".") + ["__init__"])[1]


def module_of(file: Path) -> str:
    """The module that a file is, packages with their `__init__`: bt_hf/data/pairs.py -> `bt_hf.data.pairs`."""
    return ".".join(("bt_hf", *file.relative_to(PACKAGE).with_suffix("").parts))


def imported_modules(source: str, module: str) -> Iterator[str]:
    """Every module that a source imports, wherever the import stands: also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            origin = ".".join(base + ([node.module] if node.module else []))
            # `from bt_hf import data` may name a module, `from bt_hf.data.checks import load` may not: both stay right
            # as a part is decided by the second component.
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def forbidden_imports(source: str, module: str) -> list[str]:
    """The imports of a source that do not go downwards."""
    part = part_of(module)
    return [
        name
        for name in imported_modules(source, module)
        if name.split(".")[0] == "bt_hf" and part_of(name) != part and FLOORS.get(part_of(name), 5) >= FLOORS[part]
    ]


def run_python(code: str) -> Any:
    """Run code in a fresh interpreter and return what it printed, as JSON."""
    run = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@all_files
def test_every_file_has_a_floor(file: Path) -> None:
    part = part_of(module_of(file))
    assert part in FLOORS, f"bt_hf/{file.relative_to(PACKAGE)} has no floor: add {part!r} to FLOORS in {__file__}."


@all_files
def test_imports_go_downwards(file: Path) -> None:
    module = module_of(file)
    forbidden = forbidden_imports(file.read_text(encoding="utf-8"), module)
    assert not forbidden, f"{module} (floor {FLOORS[part_of(module)]}) may import lower floors only, not {forbidden}."


def test_plots_leaves_pyplot_alone() -> None:
    """Pyplot keeps global state and picks a screen: a library draws on `matplotlib.figure.Figure` instead."""
    file = PACKAGE / "plots" / "curves.py"
    names = list(imported_modules(file.read_text(encoding="utf-8"), "bt_hf.plots.curves"))
    assert not [name for name in names if "pyplot" in name or "pylab" in name]


@pytest.mark.parametrize(
    ("module", "source", "forbidden"),
    [
        ("bt_hf.training.trainer", "from bt_hf.losses import bradley_terry_loss", []),
        ("bt_hf.reward.trainer", "from bt_hf import data\nfrom .config import BradleyTerryConfig", []),
        ("bt_hf.losses", "def f():\n    from bt_hf import training", ["bt_hf.training"]),
        ("bt_hf.data.pairs", "import bt_hf.metrics", ["bt_hf.metrics"]),
        ("bt_hf.diffusion.trainer", "from ..reward.scorer import x", ["bt_hf.reward.scorer.x"]),
        ("bt_hf.reward.scorer", "from bt_hf.diffusion import noise", ["bt_hf.diffusion.noise"]),
        ("bt_hf.cli.score", "from bt_hf import PreferenceScorer", ["bt_hf.PreferenceScorer"]),
    ],
)
def test_rule_finds_upward_imports(module: str, source: str, forbidden: list[str]) -> None:
    assert forbidden_imports(source, module) == forbidden


def test_import_is_instant() -> None:
    loaded = run_python(f"import bt_hf, json, sys; print(json.dumps([m for m in {SLOW_IMPORTS} if m in sys.modules]))")
    assert loaded == []


def test_public_names_are_sorted_and_resolve() -> None:
    code = "import bt_hf, json; [getattr(bt_hf, name) for name in bt_hf.__all__]; print(json.dumps(bt_hf.__all__))"
    names = run_python(code)
    assert names == sorted(set(names))
