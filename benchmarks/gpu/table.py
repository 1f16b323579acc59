# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.gpu.table GROUP``: the targets of a group, measured in turn with their peers.

Rows go into one result file, which later groups add to; beside it lies a page of measured beside predicted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import cases, measure, results
from ..cases import Case
from ..measure import ResultRow, Settings
from ..peers import providers
from ..provider import Provider
from ..targets import TARGETS, Target, find, page, predictions
from . import device as _device
from .parts import GROUPS

# Small enough for a dry run on a CPU, and of the same kind.
_TINY_MODEL = dict(model="tiny", lengths=(9, 4))


def case_of(target: Target, is_stand_in: bool) -> Case:
    """The target's case in the suite; in a dry run a small one in its place, on the CPU."""
    op, _, dtype, pass_name = target.case.split("/")
    found = [case for case in cases.select("cuda", "full", [op]) if case.id == f"{target.case}/cuda"]
    if len(found) != 1:
        raise ValueError(f"benchmarks: {target.name!r} is case {target.case}/cuda, which is not in the suite.")
    if not is_stand_in:
        return found[0]
    return replace(found[0], device="cpu", dtype_name="float32", sizes=_small(op, found[0].sizes))


def _small(op: str, sizes: dict[str, Any]) -> dict[str, Any]:
    if op in ("bert", "bert_mlm"):
        return _TINY_MODEL
    if op == "elmo":
        return dict(B=1, words=2)
    return {**{name: value for name, value in sizes.items() if name in ("ragged", "dropout", "R")}, **_tiny(op, sizes)}


def _tiny(op: str, sizes: dict[str, Any]) -> dict[str, Any]:
    tiny = dict(cases.module(op).TINY)
    if op == "lstm" and "P" not in sizes:
        tiny.update(P=None, clip=None)
    if op == "attention" and len(set(sizes["lengths"])) == 1:
        tiny["lengths"] = (4, 4)
    return tiny


def _wanted(target: Target, case: Case, compile: bool) -> list[Provider]:
    """Ours, all of them, and the target's peers; references only where they are asked for."""
    everybody = providers(case, compile=compile)
    named = [p for p in everybody if any(versus.holds(p.name) for versus in target.versus)]
    return [p for p in everybody if p in named or (p.ours and "reference" not in p.name)]


def merged(old: Iterable[ResultRow], new: Sequence[ResultRow]) -> list[ResultRow]:
    """Rows of earlier runs, replaced where the new ones measured the same case."""
    seen = {row.case for row in new}
    return [*(row for row in old if row.case not in seen), *new]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.table")
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="the result file to write or to add to")
    parser.add_argument("--compile", action="store_true", help="targets that have torch.compile for a peer, with it")
    parser.add_argument("--seconds", type=float, default=0.4, help="for the rounds of one case")
    options, device = _device.start(parser, argv)
    targets = [t for t in TARGETS if t.group == options.group and (t.is_compiled or not options.compile)]
    seconds = 0.0 if device.is_stand_in else options.seconds
    # torch.compile is warm by then; a CPU compiles for minutes, so a dry run does without.
    compile = options.compile and not device.is_stand_in
    settings = Settings(seconds=seconds, compile=compile, threads=1 if device.is_stand_in else 8)
    description = results.describe(device.kind, settings, "not held to cores", ["gpu.table", options.group])
    rows: list[ResultRow] = []
    for target in targets:
        case = case_of(target, device.is_stand_in)
        settings.graphs = target.graphs
        if not any(row.case == case.id and row.provider == (target.ours or row.provider) for row in rows):
            found = measure.measure(case, _wanted(target, case, compile), settings)
            rows = merged(rows, found)
            print(results.case_table(found), flush=True)
        finding, prediction = find(target, rows), predictions()[target.name]
        said = "; ".join(finding.verdicts()) if finding.ours is not None else "not measured"
        value = "-" if finding.value is None else f"{finding.value:.4g} {prediction.unit}"
        print(f"-> {target.name}: {value}, predicted {prediction.words}: {said}\n", flush=True)
        if options.json:
            _save(options.json, description, rows)
    return _verdict(rows, targets, is_stand_in=device.is_stand_in)


def _save(path: Path, description: dict[str, Any], rows: Sequence[ResultRow]) -> None:
    """After every target: what was measured is there whatever becomes of the next."""
    if path.is_file():
        rows = merged(results.load(path)["rows"], rows)
    results.save(path, description, rows)
    results.write_bytes(path.with_suffix(".md"), page(rows).encode())


def _verdict(rows: Sequence[ResultRow], targets: Sequence[Target], *, is_stand_in: bool) -> int:
    """1 if somebody was wrong or broke, or ours was not measured; a target that is missed is a result like others."""
    bad = [f"{row.status}: {row.case}: {row.provider}: {row.note}" for row in rows if row.status in ("wrong", "error")]
    if not is_stand_in:
        bad += [f"not measured: {target.name}" for target in targets if find(target, rows).ours is None]
    print("\n".join([*bad, f"{len(bad)} failed"]), flush=True)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
