"""A SIGKILL, or a disk that is full, before each write of each kind of saving: there is the old state or the new one.

    python tests/test_kills.py            # some of the writes of each kind, as the tests do
    python tests/test_kills.py --long     # all of them; minutes

The kinds, and what is asked of each, are in tests/support/kill_kinds.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "support" / "kill_kinds.py"
COMMAND = [sys.executable, "-W", "ignore", str(SCRIPT)]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "OMP_NUM_THREADS": "1",
}
KINDS = {
    "reward over old", "lora over old", "new folder", "card", "checkpoint", "best adapter", "cache", "pair folder",
    "pull",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    done = subprocess.run(COMMAND, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"kind"')]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_after_each_fault_there_is_the_old_state_or_the_new(rows: list[dict[str, Any]], kind: str) -> None:
    found = [row for row in rows if row["kind"] == kind]
    assert {row["fault"] for row in found} >= {"kill"}
    for row in found:
        assert not row["problems"], "\n".join(row["problems"])
        assert row["touches"] > 5
    assert found[0]["seen"].keys() == {"old", "new"}  # the faults reached from before the save to its end


if __name__ == "__main__":
    sys.exit(subprocess.run([*COMMAND, *sys.argv[1:]], env=ENVIRONMENT).returncode)
