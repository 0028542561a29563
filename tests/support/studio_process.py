"""Studios in processes of their own, which a test may kill.

As a program, it imports what a studio needs once, and forks a server for each line on its standard input:

    PORT IMAGES SESSION

Port 0 is any; the answer is `PID ADDRESS`, or `- MESSAGE` if the studio refused to open.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Fork a server for each line."""
    import bt_hf.studio.server as server  # seconds
    from bt_hf.reward.scorer import PreferenceScorer
    from tiny_models import build

    scorer = PreferenceScorer(*build("clip"))
    server.PreferenceScorer.from_pretrained = lambda name: scorer  # type: ignore[assignment]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            port, images, session = line.split()
            _serve(server, images, session, int(port))


def _serve(server: Any, images: str, session: str, port: int) -> None:
    from bt_hf.studio.security import Guard

    try:
        listening = server.bind("127.0.0.1", port)
        guard = Guard("127.0.0.1", listening.getsockname()[1], token="t" * 43)
        studio = server.open_studio(images, Path(session), guard)
    except (OSError, ValueError) as error:
        print(f"- {error}", flush=True)
        os._exit(1)
    print(f"{os.getpid()} {guard.address}", flush=True)
    server.serve(studio, listening, browser=False, say=lambda text: None)
    os._exit(0)


class Studios:
    """Program that serves studios."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        assert self._read() == "ready"

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def start(self, folder: Path, port: int = 0, session: str = "session") -> tuple[int, str]:
        """Start a server on `images` and a session in a folder; return its process id and its address.

        Raises:
            ValueError: It refused to open; the message is its own.
        """
        assert self.process.stdin is not None
        print(port, folder / "images", folder / session, file=self.process.stdin, flush=True)
        pid, rest = self._read().split(" ", 1)
        if pid == "-":
            raise ValueError(rest)
        self.started.append(int(pid))
        return int(pid), rest

    def close(self) -> None:
        """End the program, and servers that are left."""
        for pid in self.started:
            end(pid)
        self.process.communicate(timeout=30)


def end(pid: int, how: int = signal.SIGKILL) -> None:
    """End a server that `Studios` has started, and wait until the system has taken its files and port back.

    Interrupted as it begins, a server first waits for its background work, on a busy machine for long: like a person
    at a terminal, this then sends another interrupt.
    """
    place, again = Path(f"/proc/{pid}"), 0.0
    try:
        while b"studio_process.py" in (place / "cmdline").read_bytes():
            if time.monotonic() > again:
                os.kill(pid, how)
                again = time.monotonic() + 10
            time.sleep(0.005)
    except (FileNotFoundError, ProcessLookupError):
        pass


if __name__ == "__main__":
    main()
