# SPDX-License-Identifier: Apache-2.0
"""Result files: where, when and of what commit every row was measured, as JSON written in one piece."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ctxfast._core import report
from ctxfast._core.files import replacing

from .measure import ResultRow, Settings

SCHEMA = 1
FOLDER = Path(__file__).resolve().parent / "results"
_ROOT = Path(__file__).resolve().parents[1]
_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")


def slug(text: str) -> str:
    """Lower-case words of a device name joined by dashes, marks and filler left out."""
    text = re.sub(r"\((r|tm|c)\)", " ", text.lower())
    words = re.findall(r"[a-z0-9.]+", text.partition(" @ ")[0])
    return "-".join(word for word in words if word not in ("cpu", "processor", "core", "with")) or "unknown"


def machine(device: str, threads: int) -> str:
    """A short name of what was measured on: the GPU, or the CPU and its threads."""
    if device == "cuda":
        return slug(torch.cuda.get_device_name())
    return f"{slug(report.facts()['cpu'].rpartition(', ')[0])}-{threads}t"


def _git(*command: str) -> str | None:
    try:
        done = subprocess.run(
            ("git", "-C", str(_ROOT), *command), capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> tuple[str, bool | None]:
    """Short commit hash ("no-git" outside a repository, "release" in an installed package) and whether anything but
    results and pages differs from it."""
    if not (_ROOT / "setup.py").is_file():
        return "release", None
    head = _git("rev-parse", "--short=10", "HEAD")
    if head is None:
        return "no-git", None
    others = (":!benchmarks/results", ":!benchmarks/quality/*.json", ":!*.md")
    status = _git("status", "--porcelain", "--", ".", *others)
    return head, None if status is None else bool(status)


def instruction_sets() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    flags = set(re.search(r"^flags\s*:(.*)$", text, re.M).group(1).split()) if "flags" in text else set()
    return [name for name in _INSTRUCTION_SETS if name in flags]


def describe(device: str, settings: Settings, threads_line: str, command: Sequence[str]) -> dict[str, Any]:
    """Everything of a result file but its rows."""
    head, dirty = commit()
    return {
        "schema": SCHEMA,
        "machine": machine(device, settings.threads),
        "device": device,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": head,
        "dirty": dirty,
        "command": " ".join(("python -m benchmarks", *command)),
        "facts": report.facts(),
        "instruction_sets": instruction_sets(),
        "settings": {
            "seconds_per_case": settings.seconds,
            "threads": threads_line,
            "cuda_graphs": settings.graphs,
            "torch_compile": settings.compile,
            "load_before": load_average(),
        },
    }


def load_average() -> float:
    """Programs that wanted a core during the last minute."""
    return round(os.getloadavg()[0], 2)


class Others:
    """How many cores other programs kept busy since this was made: what a noisy run is known by afterwards."""

    def __init__(self) -> None:
        self._start, self._busy = time.monotonic(), self._others()

    @staticmethod
    def _others() -> float | None:
        """Seconds of core time the machine spent so far on all but this process and its children."""
        try:
            fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
        except OSError:
            return None
        user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
        own = os.times()
        mine = own.user + own.system + own.children_user + own.children_system
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - mine

    def cores(self) -> float | None:
        """Mean over the time since; None where the system does not tell."""
        now = self._others()
        if now is None or self._busy is None:
            return None
        return round(max(0.0, now - self._busy) / max(time.monotonic() - self._start, 1e-9), 2)


def stem(description: dict[str, Any]) -> str:
    """machine-date-commit: the name of a result file without its ending."""
    return f"{description['machine']}-{description['date'][:10]}-{description['commit']}"


def place(target: str | None, description: dict[str, Any], *, overwrite: bool = False) -> Path:
    """Where a result file goes.

    Args:
        target: a file, a folder (as it exists, or without an ending) that gets a file by the rule of ``stem``, or None
            for benchmarks/results. A name by the rule that is taken gets a number.

    Raises:
        FileExistsError: the file is there and ``overwrite`` is not set.
    """
    path = FOLDER if target is None else Path(target)
    if path.suffix == ".json" and not path.is_dir():
        if path.exists() and not overwrite:
            raise FileExistsError(f"benchmarks: {path} is there already. Name another file, or pass --overwrite.")
        return path
    base, number = stem(description), 1
    while (candidate := path / f"{base}{f'-{number}' if number > 1 else ''}.json").exists():
        number += 1
    return candidate


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name beside its place, then move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def save(path: Path, description: dict[str, Any], rows: Iterable[ResultRow]) -> None:
    """Write a result file; numbers keep five significant digits."""
    document = {**description, "rows": [_rounded(row.as_dict()) for row in rows]}
    write_bytes(path, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in row.items()}


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a result file; ``rows`` become ``ResultRow``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a result file of this schema.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"benchmarks: there is no result file {path}.")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"benchmarks: {path} is not JSON ({error}).") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else None
        raise ValueError(
            f"benchmarks: {path} has schema {found!r}; expected {SCHEMA}. Measure again with this version."
        )
    try:
        rows = [ResultRow(**row) for row in document["rows"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"benchmarks: {path} holds rows this version cannot read ({error}).") from None
    return {**document, "rows": rows}


# what people see while it runs


def number(value: float | None, digits: int = 3) -> str:
    """``digits`` significant digits without an exponent; "-" for None."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    text = f"{value:.{digits}g}"
    if "e" in text:
        return f"{value:.0f}" if abs(value) >= 1 else f"{value:.{digits + 3}f}"
    return text


def dtype_words(name: str) -> str:
    """A case's dtype for readers."""
    return name.replace("+bf16", ", bf16 products").replace("+int8", ", int8 products")


def speed(row: ResultRow) -> str:
    """The rate that suits the case: tokens a second for models, time a step for recurrences, else GFLOP/s or GB/s."""
    if row.op in ("bert", "elmo") and row.tokens_per_s:
        return f"{row.tokens_per_s:,.0f} tok/s"
    if row.us_per_step:
        return f"{number(row.us_per_step)} us a step"
    if row.gflops:
        return f"{number(row.gflops)} GFLOP/s"
    return f"{number(row.gbs)} GB/s" if row.gbs else ""


def case_table(rows: Sequence[ResultRow]) -> str:
    """The rows of one case as text: times with p20..p80, ratio, rate, share of the floor, memory, error; or why not."""
    first = rows[0]
    lines = [f"{first.op} · {first.workload} · {dtype_words(first.dtype)} · {first.pass_name} · {first.device}"]
    width = max(len(row.provider) for row in rows)
    for row in rows:
        mark = "*" if row.chosen else " "
        if row.median_ms is None:
            reason = row.note if row.status in ("not installed", "cannot run") else f"{row.status.upper()}: {row.note}"
            lines.append(f"{mark} {row.provider:<{width}}  {reason}")
            continue
        ratio = f"{row.ratio:6.2f}x" if row.ratio is not None else "      -"
        memory = "" if row.memory_mib is None else f"{row.memory_mib:,.0f} MiB"
        floor = "" if row.of_floor is None else f"floor {100 * row.of_floor:.0f} %"
        spread = f"{number(row.p20_ms)}..{number(row.p80_ms)}"
        if row.p99_ms is not None:
            spread += f", p95 {number(row.p95_ms)}, p99 {number(row.p99_ms)}"
        lines.append(
            f"{mark} {row.provider:<{width}} {number(row.median_ms):>9} ms  {spread:>15}  {ratio}  {speed(row):>14}  "
            f"{floor:>11}  {memory:>10}  err {row.error:.0e}"
        )
    return "\n".join(lines)
