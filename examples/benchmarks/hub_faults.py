"""Print what users see when publishing and fetching go wrong: the tables of docs/hub.md.

    python examples/benchmarks/hub_faults.py

Runs `tests/hub/test_faults.py`, in which the unmodified client of huggingface_hub talks to a server on 127.0.0.1 that
injects faults. It needs the development tools (`make test` installs them). The tables are written to
`docs/results/hub_faults.json`: what came of each kind of fault, and every fault with its message.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from results import ROOT, Report, make_parser

TEST = "tests/hub/test_faults.py"


def inject(file: Path) -> list[list[str]]:
    """Run the tests; return the fault, what the user sees and what there is after it, for each."""
    command = [sys.executable, "-m", "pytest", "-q", TEST]
    environment = os.environ | {"BT_HF_FAULTS_JSON": str(file), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command[1:])} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(file.read_text(encoding="utf-8"))


def kind(seen: str) -> str:
    """Return the kind of a message: success or the name of the error, at once or after waiting."""
    waited, _, rest = seen.partition("; ") if seen.startswith("asked again") else ("", "", seen)
    name = rest.split(":")[0]
    if not name.endswith("Error"):
        name = "a warning" if "copy in the cache" in rest else "success"
    return f"{name} after waiting" if waited else name


def main() -> None:
    parser = make_parser(__doc__)
    args = parser.parse_args()
    with Report.of_script(__file__, parser, args) as report, tempfile.TemporaryDirectory() as folder:
        faults = report.run("faults", lambda: inject(Path(folder) / "faults.json"))
        columns = ["what the user sees", "what there is after it"]
        report.table("faults", f"{len(faults)} faults of the Hub", columns, [row[:3] for row in faults])
        counts = Counter((name.split(",")[0], kind(seen), after) for name, seen, after in faults)
        rows = [(f"{when}: {sees}", after, count) for (when, sees, after), count in sorted(counts.items())]
        columns = ["what there is after it", "faults"]
        report.table("kinds", "By what the user sees", columns, [*rows, ("all", "", len(faults))])


if __name__ == "__main__":
    main()
