# SPDX-License-Identifier: Apache-2.0
"""Programs that stop at a sight and wait to be killed, so that no test has to be faster than what it kills."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path

# Against hangs alone: far more than anything here takes, on a machine that others load too.
PATIENCE_S = 600


def start(sight: Path | None, program: str | Path, *words: object, **options) -> subprocess.Popen:
    """Start a program (a module or a file) that stops when ``sight``, a path with wildcards, exists."""
    command = [sys.executable, __file__, str(sight or ""), str(program), *map(str, words)]
    path = str(Path(__file__).parents[2])  # not the installed package, which may be another checkout
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(command, env=environment, **options)


def await_sight(process: subprocess.Popen) -> None:
    """Return when the program has stopped; it fails where it ends, or takes ``PATIENCE_S``, without."""
    guard = threading.Timer(PATIENCE_S, process.kill)
    guard.start()
    found = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    guard.cancel()
    assert found.si_code == os.CLD_STOPPED, f"ended before it was killed: {process.communicate()}"


def _stop_at(sight: Path) -> None:
    done = []

    def look(event: str, _: tuple) -> None:
        # The next file that is opened or renamed once the sight is there: programs write nothing otherwise.
        if event in ("open", "os.rename") and not done and any(sight.parent.glob(sight.name)):
            done.append(True)
            os.kill(os.getpid(), signal.SIGSTOP)

    sys.addaudithook(look)


if __name__ == "__main__":
    # A shell that starts `make test` in the background has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sight, program, *words = sys.argv[1:]
    if sight:
        _stop_at(Path(sight))
    sys.argv = [program, *words]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__")
