"""Start a script in two processes on CPUs, by `accelerate launch` and a config of `examples/accelerate/`."""

import atexit
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]
CONFIGS = ROOT / "examples" / "accelerate"


def launch(script: str | Path, *arguments: object, config: Path = CONFIGS / "two_cpu_processes.yaml") -> str:
    """Run `script` (of this folder, or an absolute path) in two processes.

    Returns:
        What they printed.

    Raises:
        AssertionError: One failed; with the end of what they said.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_processes", "2", "--mixed_precision", "no", str(SUPPORT / script), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{SUPPORT}", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-10_000:]
    return run.stdout


def write_threads_at_exit(folder: Path) -> None:
    """In a launched script, before it makes a trainer: write down which threads live on when Python ends.

    On Linux, the only one that names the threads of libraries.
    """

    def write() -> None:
        names = []
        for task in Path("/proc/self/task").glob("*"):
            with suppress(OSError):  # it has ended meanwhile
                names.append((task / "comm").read_text())
        (folder / f"threads-{os.environ['RANK']}.txt").write_text("".join(names))

    atexit.register(write)


def threads_at_exit(folder: Path) -> list[str]:
    """Names of the threads that both processes wrote down."""
    names = [(folder / f"threads-{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    return [*names[0], *names[1]]
