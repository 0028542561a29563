"""Start a script in two processes on CPUs, by `accelerate launch` and a config of `examples/accelerate/`."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
CONFIGS = TESTS.parent / "examples" / "accelerate"


def launch(script: str | Path, *arguments: object, config: Path = CONFIGS / "two_cpu_processes.yaml") -> str:
    """Run `script` (of this folder, or an absolute path) in two processes.

    Returns:
        What they printed.

    Raises:
        AssertionError: One failed; with the end of what they said.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_processes", "2", "--mixed_precision", "no", str(TESTS / script), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-10_000:]
    return run.stdout
