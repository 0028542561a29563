"""The shape of the library, as rules that fail: which file may import which, and what `import bt_hf` may cost."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).parents[1] / "bt_hf"

# The house: its floors from the ground up. What stands on one floor does not import each other, and never upwards.
WINGS = [
    "losses data metrics",
    "hub plots evaluate_modules",
    "training",
    "reward diffusion",
    "studio",
    "cli",
    "__init__",
]
# The floors inside each wing, in the same way; folders are wings in a wing.
ROOMS = {
    "cli": [
        "errors",
        "config_file dispatch options",
        "__init__",
        "__main__ pairs pull push score training",
        "lora reward studio",
    ],
    "data": [
        "__init__ atomic fingerprint images",
        "judgements urls verified",
        "cache",
        "places",
        "archives clicks formats tables",
        "rows survey",
        "judged_folders recognition streaming",
        "conversion reading",
        "checks",
        "pairs",
    ],
    "diffusion": [
        "quantization",
        "__init__ beta callbacks collator kto losses origin pipeline_config summary",
        "config",
        "families rate safeguard",
        "drawing encoder errors interfaces pair_loss",
        "against_base cache card validation_images",
        "loading reference",
        "generation lora_trainer",
        "guided trainer",
    ],
    "diffusion.families": ["__init__ schedules", "base", "sd sd3", "flux qwen sana sdxl wan z_image", "flux2"],
    "diffusion.generation": ["__init__ pair_folder", "candidates", "generate"],
    "diffusion.guided": ["__init__ config prompts rewards sampling", "callbacks", "card", "trainer"],
    "evaluate_modules": ["__init__ base", "preference_accuracy preference_calibration preference_log_loss"],
    "hub": [
        "__init__ contract patterns",
        "card_sections interfaces peft_configs retries",
        "facts privacy tensors",
        "cards checks",
        "loading pairs pull",
        "push",
    ],
    "metrics": ["columns", "intervals", "comparison scores", "__init__"],
    "plots": ["style", "curves sheet", "__init__"],
    "reward": [
        "__init__ config fitting frozen_prefix inputs laplace library lora preprocess running verdict",
        "encoders posterior",
        "against_base asking card collator taste",
        "cache embedder words",
        "scorer",
        "trainer",
        "cross_validation",
    ],
    "studio": [
        "__init__ errors jobs judging page pictures sources telling",
        "fields security session",
        "pool",
        "embeddings questions",
        "drawer learner training",
        "sharing",
        "desk",
        "app",
        "server",
    ],
    "training": [
        "__init__ adapters arguments dataloaders finite first_step learnt lock lora_options option_checks precision",
        "resume sharding shutdown",
        "optimizers trainer_options",
        "config output",
        "saving",
        "publishing",
        "trainer",
    ],
}
SLOW_IMPORTS = ["torch", "transformers", "diffusers", "trl"]

FILES = sorted(PACKAGE.rglob("*.py"))
all_files = pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())


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


def floors_of(wing: str) -> dict[str, int]:
    """Floor of each room of a wing, "" for the whole house."""
    floors = ROOMS[wing] if wing else WINGS
    return {room: floor for floor, rooms in enumerate(floors) for room in rooms.split()}


def steps(importer: str, imported: str) -> tuple[str, str, str]:
    """The innermost wing that two modules share, and their rooms in it, which are the same inside one room."""
    ours, theirs = (f"{module}.__init__".split(".")[1:] for module in (importer, imported))
    wing: list[str] = []
    while ours[0] == theirs[0] and ".".join([*wing, ours[0]]) in ROOMS:
        wing.append(ours[0])
        ours, theirs = ours[1:], theirs[1:]
    known = floors_of(".".join(wing))
    # `from bt_hf import losses` names a room, `from bt_hf import BradleyTerryTrainer` a name of `__init__`.
    return ".".join(wing), ours[0], theirs[0] if theirs[0] in known else "__init__"


def forbidden_imports(source: str, module: str) -> list[str]:
    """The imports of a source that do not go downwards."""
    found = []
    for name in imported_modules(source, module):
        if name.split(".")[0] != "bt_hf":
            continue
        wing, ours, theirs = steps(module, name)
        floors = floors_of(wing)
        if ours != theirs and floors[theirs] >= floors[ours]:
            found.append(name)
    return found


def run_python(code: str) -> Any:
    """Run code in a fresh interpreter and return what it printed, as JSON."""
    run = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@all_files
def test_every_file_has_a_floor(file: Path) -> None:
    wing: list[str] = []
    for room in file.relative_to(PACKAGE).with_suffix("").parts:
        name = ".".join(wing)
        if name and name not in ROOMS:
            return  # inside a folder that counts as one room
        assert room in floors_of(name), f"{file} has no floor: add {room!r} to {name or 'WINGS'} in {__file__}."
        wing.append(room)


def test_every_floor_has_its_rooms() -> None:
    for wing in ["", *ROOMS]:
        folder = PACKAGE.joinpath(*wing.split(".")) if wing else PACKAGE
        for room in floors_of(wing):
            assert (folder / room).is_dir() or (folder / f"{room}.py").is_file(), f"{wing}.{room} does not exist"


@all_files
def test_imports_go_downwards(file: Path) -> None:
    module = module_of(file)
    forbidden = forbidden_imports(file.read_text(encoding="utf-8"), module)
    assert not forbidden, f"{module} may import lower floors only, not {forbidden}."


def test_the_map_in_the_documents_is_current() -> None:
    run = subprocess.run(
        [sys.executable, "docs/draw_architecture.py", "--check"], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


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
        ("bt_hf.reward.config", "from .trainer import x", ["bt_hf.reward.trainer.x"]),
        ("bt_hf.diffusion.families.base", "from bt_hf.diffusion.families import sd", ["bt_hf.diffusion.families.sd"]),
        ("bt_hf.diffusion.families.sd", "from bt_hf.diffusion.config import x", []),
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


def test_files_that_are_mentioned_exist() -> None:
    """A move must not leave a document, comment or docstring behind that names the old place."""
    root = PACKAGE.parent
    named = re.compile(r"\b(?:bt_hf|tests|examples|docs)/[\w/.-]+\.(?:py|md|yaml)\b")
    sources = [path for folder in ("bt_hf", "docs", "examples", "tests") for path in (root / folder).rglob("*.py")]
    sources += [
        *root.glob("*.md"),
        *(path for folder in ("docs", "examples") for path in (root / folder).rglob("*.md")),
    ]
    missing = {
        f"{source.relative_to(root)}: {name}"
        for source in sources
        for name in named.findall(source.read_text(encoding="utf-8"))
        if not (root / name).exists()
    }
    assert not missing
