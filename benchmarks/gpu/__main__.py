# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.gpu``: runs parts, each to its end whatever others do; the last line says what failed.

Needs nothing but Python: what a part needs, its programs find missing.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread, Timer
from typing import TextIO

from .parts import PARTS, ROOT, Part, Setup, Step, csrc

# pytest tells what failed so far when it is interrupted; whoever does not end then is killed.
_GRACE_SECONDS = 10


@dataclass
class Outcome:
    """How a step ended: ``why`` is empty where it passed."""

    part: str
    step: str
    why: str
    seconds: float


def archs_here() -> str | None:
    """What to compile for on this machine, as CTXFAST_CUDA_ARCHS takes it; None if nothing tells which GPU there is."""
    try:
        done = subprocess.run(
            ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"),
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    found = sorted({line.strip().replace(".", "") for line in done.stdout.split("\n") if line.strip()})
    if not found or not all(re.fullmatch(r"\d{2,3}", arch) for arch in found):
        return None
    # Hopper's own instructions belong to 90a, and to no later GPU.
    return ";".join("90a" if arch == "90" else arch for arch in found)


def run_step(step: Step, seconds: float, log: TextIO, environ: dict[str, str]) -> str:
    """Run a process, its output into the log and its last lines onto the screen; "" or why it failed."""
    log.write(f"\n== {step.name}: {' '.join(step.command)}\n")
    log.flush()
    last: deque[str] = deque(maxlen=step.shows)
    try:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env={**environ, **step.environ}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        log.write(f"{error}\n")
        return f"not started: {error}"
    stopped = False

    def stop() -> None:
        nonlocal stopped
        stopped = True
        process.send_signal(signal.SIGINT)

    def end() -> None:
        process.wait()
        _kill_group(process.pid)  # what it started and left behind, which would keep the pipe open

    timers = [Timer(seconds, stop), Timer(seconds + _GRACE_SECONDS, _kill_group, (process.pid,))]
    for thread in (*timers, Thread(target=end)):
        thread.daemon = True
        thread.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            log.flush()
            last.append(line)
        code = process.wait()
    finally:
        for timer in timers:
            timer.cancel()
        _kill_group(process.pid)
    print("".join(f"  {line.rstrip()[:240]}\n" for line in last), end="", flush=True)
    if stopped:
        return f"stopped after {seconds:.0f} s"
    if code < 0:
        return f"killed by signal {-code}"
    return f"exit code {code}" if code else ""


def _kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def run_part(part: Part, setup: Setup, environ: dict[str, str], more_time: float = 1.0) -> list[Outcome]:
    """Run the steps of a part, all of them; what each came to. The log is ``<part>.log`` among the results."""
    print(f"== {part.name}: {part.tells}", flush=True)
    started, outcomes = time.monotonic(), []
    with open(setup.results / f"{part.name}.log", "w", encoding="utf-8") as log:
        try:
            steps = part.steps(setup)
        except csrc.SettingError as error:
            log.write(f"{error}\n")
            steps, outcomes = [], [Outcome(part.name, "setting", str(error), 0.0)]
            print(f"  {error}", flush=True)
        for step in steps:
            begin = time.monotonic()
            left = part.seconds * more_time - (begin - started)
            if left < 1:
                why, took = f"no time left of the part's {part.seconds:.0f} s", 0.0
            else:
                print(f"-- {step.name}", flush=True)
                why = run_step(step, min(step.seconds * more_time, left), log, environ)
                took = time.monotonic() - begin
            outcomes.append(Outcome(part.name, step.name, why, took))
            line = f"{part.name}, {step.name}: {why or 'passed'}, {took:.0f} s"
            log.write(f"== {line}\n")
            print(f"-- {line}", flush=True)
    return outcomes


def summary(outcomes: Sequence[Outcome]) -> str:
    """The last line of a run."""
    failed = [f"{each.part} ({each.step}: {each.why})" for each in outcomes if each.why]
    if failed:
        return f"make gpu: {len(failed)} of {len(outcomes)} steps failed: {'; '.join(failed)}"
    return f"make gpu: all {len(outcomes)} steps passed"


def _environ(dry_run: bool) -> dict[str, str]:
    environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    if dry_run:
        environ["TRITON_INTERPRET"] = "1"
    elif "CTXFAST_CUDA_ARCHS" not in environ:
        found = archs_here()
        if found is not None:
            environ["CTXFAST_CUDA_ARCHS"] = found
    return environ


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help="all, in this order: " + " ".join(p.name for p in PARTS)
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "gpu", metavar="FOLDER")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: the same programs in small, on the CPU")
    parser.add_argument(
        "--jobs", type=int, default=max(1, min(12, (os.cpu_count() or 2) - 2)), help="that test at once"
    )
    parser.add_argument("--pytest-args", default="", metavar="TEXT", help="more arguments for pytest")
    parser.add_argument(
        "--more-time", type=float, default=1.0, metavar="N", help="times as long as a GPU machine needs"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background: steps would ignore it too
        signal.signal(signal.SIGINT, signal.default_int_handler)
    known = {part.name: part for part in PARTS}
    unknown = [name for name in options.parts if name not in known]
    if unknown:
        print(f"make gpu: there is no part {unknown[0]!r}; expected some of {', '.join(known)}.", file=sys.stderr)
        return 2
    results = options.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    environ, outcomes = _environ(options.dry_run), []
    archs = csrc.parse_archs(environ.get("CTXFAST_CUDA_ARCHS"))
    setup = Setup(results, archs, options.dry_run, options.jobs, tuple(options.pytest_args.split()))
    print(f"make gpu: results in {results}; CUDA kernels for {', '.join(archs)}", flush=True)
    for part in PARTS:
        if not options.parts or part.name in options.parts:
            outcomes += run_part(part, setup, environ, options.more_time)
            lines = [f"{each.part}, {each.step}: {each.why or 'passed'}, {each.seconds:.0f} s" for each in outcomes]
            lines.append(summary(outcomes))
            # After every part: a run that is cut off leaves what it knows.
            (results / "summary.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(summary(outcomes), flush=True)
    return int(any(each.why for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
