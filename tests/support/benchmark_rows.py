# SPDX-License-Identifier: Apache-2.0
"""Tiny cases of the benchmark suite; rows and result files, made up."""

from __future__ import annotations

from benchmarks.cases import Case, module
from benchmarks.measure import ResultRow, Settings

QUICK = Settings(seconds=0.0)


def tiny(op: str, *, backward: bool = False, dtype: str = "float32", **sizes) -> Case:
    return Case(op, "tiny", {**module(op).TINY, **sizes}, dtype, backward, "cpu", "small")


def row(
    provider: str, ms: float | None, *, ours=False, chosen=False, case="op/w/float32/forward/cpu", **more
) -> ResultRow:
    op, workload, dtype, pass_name, device = case.split("/")
    known = dict(median_ms=ms, p20_ms=ms, p80_ms=ms, error=0.0)
    return ResultRow(case, op, workload, dtype, pass_name, device, provider, ours, chosen, **{**known, **more})


def document(rows, **more) -> dict:
    settings = dict(threads="2 threads", load_before=0.0, others_kept_busy=0.25, seconds_per_case=1.0)
    facts = dict(ctxfast="1", cpu="A CPU, 2 threads", gpu="none", torch="2", python="3")
    return dict(
        schema=1, machine="a-cpu-2t", device="cpu", date="2026-01-02T03:04:05Z", commit="abc", dirty=False,
        command="python -m benchmarks", facts=facts, instruction_sets=[], settings=settings, rows=list(rows),
    ) | more  # fmt: skip
