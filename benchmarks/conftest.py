# SPDX-License-Identifier: Apache-2.0
"""Options of the pytest front door: which rows of the table it runs."""

from __future__ import annotations

import pytest
import torch

from benchmarks import cases
from benchmarks.peers import providers


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ctxfast benchmarks")
    group.addoption("--bench-set", choices=("small", "full"), default="small")
    group.addoption("--bench-device", choices=("cpu", "cuda"), default="cpu")
    group.addoption("--bench-op", action="append", default=[], help="only this op or model; may be repeated")
    group.addoption("--bench-compile", action="store_true", help="torch.compile peers too")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "provider" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    device = option("--bench-device")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--bench-device cuda needs a GPU that torch can see; torch sees none.")
    selected = cases.select(device, option("--bench-set"), option("--bench-op"), models=not option("--bench-op"))
    rows = [
        pytest.param(case, provider, id=f"{case.id}: {provider.name}")
        for case in selected
        for provider in providers(case, compile=option("--bench-compile"))
    ]
    metafunc.parametrize(("case", "provider"), rows)
