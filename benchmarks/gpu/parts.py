# SPDX-License-Identifier: Apache-2.0
"""The parts of ``make gpu``: which programs each runs, for how long at most, what tells most first.

A part is a list of steps, each a process of its own: what a trapped kernel leaves behind ends with its process. Every
part ends within eight minutes, whatever its steps do.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "csrc"))

import build as csrc

ROOT = Path(__file__).resolve().parents[2]
MOST_SECONDS = 480
_PROGRAMS = "benchmarks.gpu."
# Test programs in the order of how much else rests on them.
_FIRST = ("base_device", "lstm_persistent_forward", "lstm_persistent_backward", "lstm_step")
# The emulator takes a minute and more to compile the others, which `make csrc-test` runs.
_EMULATED = ("base_device", "scalar_mix_cuda")


@dataclass(frozen=True)
class Step:
    """One process. ``seconds``: when it is stopped. ``shows``: how many of its last lines appear on the screen."""

    name: str
    command: Sequence[str]
    seconds: int
    shows: int = 12
    environ: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Setup:
    """What the steps depend on.

    Args:
        results: the folder of result files.
        archs: what CUDA kernels are compiled for.
        dry_run: on a machine without a GPU: the same programs with small sizes, on the CPU.
        jobs: processes that test at once.
        pytest_args: more arguments for pytest.
    """

    results: Path
    archs: Sequence[str] = ()
    dry_run: bool = False
    jobs: int = 8
    pytest_args: Sequence[str] = ()


@dataclass(frozen=True)
class Part:
    """``seconds``: of all steps together, at most ``MOST_SECONDS``."""

    name: str
    tells: str
    seconds: int
    steps: Callable[[Setup], list[Step]]


def _program(module: str, setup: Setup, *arguments: str) -> tuple[str, ...]:
    """A program of this folder."""
    dry = ("--dry-run",) if setup.dry_run else ()
    return (sys.executable, "-m", _PROGRAMS + module, *arguments, *dry)


def test_programs(archs: Sequence[str]) -> dict[str, str]:
    """Name -> file name of the CUDA test programs that are built for these architectures, ``_FIRST`` first."""
    found = {}
    for path in csrc.CSRC.glob("*/test_*.cu"):
        if csrc.arch_only(path) in (None, *archs):
            file = csrc.program_name(path)
            found[file.removeprefix("test_").removesuffix("_sm90a")] = file
    order = sorted(found, key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), name))
    return {name: found[name] for name in order}


def _path(name: str, setup: Setup) -> str:
    """Of a test program, built."""
    file = test_programs(setup.archs)[name]
    return str(csrc.Build.folder / ("emulated_" * setup.dry_run + file))


def _build(setup: Setup) -> list[Step]:
    build = (sys.executable, "-m", _PROGRAMS + "build")
    if setup.dry_run:
        return [
            Step("machine", _program("machine", setup), 60),
            Step("extension, what would be compiled", (*build, "extension", "--dry-run"), 60, 3),
            Step("test programs", (*build, "programs", "--emulated", *_EMULATED), 400, 3),
        ]
    return [
        Step("extension", (*build, "extension"), 240, 6),
        Step("machine", _program("machine", setup), 60, 40),
        Step("test programs", (*build, "programs"), 240, 3),
    ]


def _kernels(setup: Setup) -> list[Step]:
    names = _EMULATED if setup.dry_run else test_programs(setup.archs)
    steps = [Step(name, (_path(name, setup),), 90, 6) for name in names]
    if not setup.dry_run:
        for sizes in ("large", "all"):
            for name in test_programs(setup.archs):
                if "persistent" in name:
                    steps.append(Step(f"{name} {sizes}", (_path(name, setup), sizes), 90, 6))
    return steps


def _right(setup: Setup) -> list[Step]:
    return [
        Step("lstm at real sizes", _program("lstm", setup, "right"), 150, 30),
        Step("lstm under stress", _program("lstm", setup, "stress"), 100, 20),
        Step("Triton's kernels at real sizes", _program("rows", setup), 200, 80),
    ]


# Each in a process of its own, for a trap would take the rows after it along.
GROUPS = ("lstm", "rows", "elmo", "bert", "training")


def _table(setup: Setup) -> list[Step]:
    place = ("--json", str(setup.results / "table.json"))
    return [
        Step(f"table, {group}", _program("table", setup, group, *place), 150 if group == "lstm" else 110, 60)
        for group in GROUPS
    ]


def _compiled(setup: Setup) -> list[Step]:
    place = ("--json", str(setup.results / "table.json"), "--compile")
    return [
        Step(f"table, {group}, with torch.compile", _program("table", setup, group, *place), seconds, 40)
        for group, seconds in (("bert", 230), ("training", 230), ("rows", 60))
    ]


def _tests(setup: Setup) -> list[Step]:
    # No cache: it would lie in the working tree. Workers that a trap ended are replaced, see tests/conftest.py.
    pytest = (
        sys.executable, "-m", "pytest", "-m", "gpu", "-n", str(setup.jobs), "-q", "-p", "no:cacheprovider",
        "--max-worker-restart", "40", "--continue-on-collection-errors", *setup.pytest_args,
    )  # fmt: skip
    one = {"OMP_NUM_THREADS": "1"}
    if setup.dry_run:
        return [Step("GPU tests, all skipped", (*pytest, "tests/nn/test_graphs.py", "tests/ops"), 400, 4, one)]
    return [
        Step("tests of CUDA kernels", (*pytest, "tests", "-k", "cuda and not triton"), 220, 60, one),
        Step("all other GPU tests", (*pytest, "tests", "-k", "not cuda or triton"), 250, 60, one),
    ]


def _decide(setup: Setup) -> list[Step]:
    return [
        Step("lstm: cuda against cuda_step", _program("lstm", setup, "choose"), 120, 40),
        Step("products", _program("products", setup), 100, 40),
        Step("attention", _program("attention", setup), 130, 60),
        Step("BERT, host and device", _program("models", setup, "bert"), 120, 40),
    ]


def _profile(setup: Setup) -> list[Step]:
    steps = [
        Step("training step, host and device", _program("models", setup, "step"), 150, 60),
        Step("kernels of a forward", _program("models", setup, "kernels"), 60, 30),
    ]
    profiler = shutil.which("ncu")
    if profiler and not setup.dry_run:
        # Clocks are left as they are: to fix them needs rights that not everybody has.
        for rows in ("8", "32"):
            report = str(setup.results / f"forward_b{rows}")
            command = (
                profiler, "--clock-control", "none", "-k", "regex:persistent_forward", "-s", "2", "-c", "1",
                "--set", "full", "--import-source", "yes", "-f", "-o", report, *_program("lstm", setup, "one", rows),
            )  # fmt: skip
            steps.append(Step(f"ncu, forward, {rows} rows", command, 80, 3))
            # Stalls by instruction, into the log: where a profile is read there may be no ncu.
            lines = (profiler, "-i", f"{report}.ncu-rep", "--page", "source", "--csv")
            steps.append(Step(f"ncu, forward, {rows} rows, by line", lines, 40, 1))
    return steps


def _sanitize(setup: Setup) -> list[Step]:
    small = {"CTXFAST_SMALL": "1"}
    if setup.dry_run:
        return [Step("device, in small", (_path("base_device", setup),), 90, 3, small)]
    sanitizer = os.environ.get("SANITIZER") or shutil.which("compute-sanitizer")
    if not sanitizer:
        raise csrc.SettingError("no compute-sanitizer on PATH; set SANITIZER to where it is.")
    return [
        Step(
            f"{tool} {name}",
            (sanitizer, "--tool", tool, "--error-exitcode", "1", _path(name, setup)),
            60, 3, small,
        )
        for name in test_programs(setup.archs)
        for tool in ("memcheck", "racecheck")
    ]  # fmt: skip


PARTS = (
    Part("build", "whether it builds, and for what machine", 470, _build),
    Part("kernels", "whether instructions and kernels are right, without Python", 470, _kernels),
    Part("right", "whether real sizes are right, alone and under stress", 450, _right),
    Part("table", "the targets, peers beside them", 470, _table),
    Part("tests", "the tests that need a GPU, in parallel processes", 475, _tests),
    Part("decide", "both sides of every choice that rests on speed", 470, _decide),
    Part("compiled", "the targets that have torch.compile for a peer", 475, _compiled),
    Part("profile", "where the time goes", 400, _profile),
    Part("sanitize", "kernels under compute-sanitizer, in small", 475, _sanitize),
)
