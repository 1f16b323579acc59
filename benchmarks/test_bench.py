# SPDX-License-Identifier: Apache-2.0
"""pytest-benchmark's front door to the table: one test per case and provider.

``pytest benchmarks --benchmark-only`` times; ``pytest benchmarks --benchmark-disable`` runs every row of the small set
once and holds it to its gate. Providers are timed one after another here, not in turn: for ratios use
``python -m benchmarks``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.gate import Gate, results, runner
from benchmarks.provider import Provider, Unavailable


class _Latest:
    """Inputs and right results of the case at hand: providers of a case come one after another."""

    def __init__(self) -> None:
        self._id, self._value = "", None

    def get(self, case: Case) -> tuple[dict[str, Any], Gate]:
        if self._id != case.id:
            self._value = None  # freed before the next case is made
            args = case.make()
            self._id, self._value = case.id, (args, Gate(case, args))
        return self._value


@pytest.fixture(scope="session")
def latest() -> _Latest:
    return _Latest()


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_row(benchmark, latest: _Latest, case: Case, provider: Provider) -> None:
    args, gate = latest.get(case)
    try:
        call = provider.build(case, args)
    except Unavailable as reason:
        pytest.skip(str(reason))
    run = runner(call, gate.right[2], backward=case.backward)
    verdict = gate.judge(provider, *results(call, run(), backward=case.backward))

    def synchronised() -> Any:
        found = run()
        if case.device == "cuda":
            torch.cuda.synchronize()
        return found

    benchmark.group = case.id
    benchmark.extra_info.update(
        case=case.id, provider=provider.name, ours=provider.ours, error=verdict.error, threads=torch.get_num_threads()
    )
    benchmark(synchronised)
