"""Without an optional dependency, each public name and command works or names the extra that installs it."""

import subprocess
import sys

import pytest

import bt_hf
from bt_hf.cli import COMMANDS

WITHOUT = """
import sys
sys.modules["{module}"] = None
"""


def run(module: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a Python that has no such module."""
    code = WITHOUT.format(module=module) + code
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


IMPORT = """
import bt_hf
for name in bt_hf.__all__:
    try:
        getattr(bt_hf, name)
    except ImportError as error:
        print(error)
"""


def test_public_names_without_diffusers() -> None:
    done = run("diffusers", IMPORT)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert "PreferenceLoRATrainer: diffusers is not installed: run `pip install 'bt-hf[diffusion]'`." in said
    assert all("pip install 'bt-hf[diffusion]'" in line for line in said)
    assert len(said) < len(bt_hf.__all__) / 2


def test_public_names_without_matplotlib() -> None:
    done = run("matplotlib", IMPORT)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_another_missing_module_is_told_as_it_is() -> None:
    done = run("peft", "import bt_hf; bt_hf.BradleyTerryTrainer")
    assert "No module named 'peft'" in done.stderr or "import of peft halted" in done.stderr


PLOT = """
from bt_hf import plots
try:
    plots.plot_reliability([1.0] * 100)
except ImportError as error:
    print(error)
"""


def test_plots_without_matplotlib() -> None:
    assert "bt-hf[plots]" in run("matplotlib", PLOT).stdout


REQUIRED = {
    "lora": ["--model", "m", "--dataset", "d"],
    "pairs": ["m", "--scorer", "s", "--prompts", __file__],
}


@pytest.mark.parametrize("command", sorted(REQUIRED))
def test_commands_without_diffusers(command: str) -> None:
    assert command in COMMANDS
    done = run("diffusers", f"from bt_hf.cli import main; sys.exit(main({[command, *REQUIRED[command]]}))")
    assert done.returncode == 2
    assert "diffusers is not installed: run `pip install 'bt-hf[diffusion]'`." in done.stderr
    # torchao, where it is installed, has lines of its own to say as it is imported.
    lines = done.stderr.strip().splitlines()
    assert [line for line in lines if line.startswith("bt-hf")] == lines[-1:]
    assert "Traceback" not in done.stderr
