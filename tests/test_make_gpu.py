# SPDX-License-Identifier: Apache-2.0
"""``make gpu`` without a GPU: its runner on made-up parts, its programs in small, its targets and their predictions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import emulated
from support.benchmark_rows import row

from benchmarks import cases, measure, peers, report, targets
from benchmarks.gpu import __main__ as runner, build, device, lstm, models, parts, table
from benchmarks.gpu.parts import Part, Setup, Step
from benchmarks.targets import TARGETS, Target, Versus, find, predictions

ROOT = Path(__file__).resolve().parents[1]


def _step(name: str, code: str, seconds: int = 60) -> Step:
    return Step(name, (sys.executable, "-c", code), seconds)


def _run(monkeypatch, tmp_path, *made: Part, arguments: tuple[str, ...] = ()) -> int:
    monkeypatch.setattr(runner, "PARTS", made)
    return runner.main([*arguments, "--results", str(tmp_path), "--dry-run"])


# the runner


def test_parts_run_on_after_each_failure_and_the_last_line_names_it(monkeypatch, tmp_path, capsys) -> None:
    def unset(setup: Setup) -> list[Step]:
        raise parts.csrc.SettingError("no such tool; set TOOL.")

    trap = f"import os, signal; print('about to trap', flush=True); os.kill(os.getpid(), signal.{signal.SIGABRT.name})"
    one = Part("one", "", 60, lambda setup: [_step("trap", trap), _step("fails", "raise SystemExit(3)")])
    two = Part("two", "", 60, unset)
    three = Part(
        "three", "", 60, lambda setup: [_step("passes", "print('all is well')"), Step("gone", ("/no/such",), 9)]
    )
    assert _run(monkeypatch, tmp_path, one, two, three) == 1
    last = capsys.readouterr().out.strip().splitlines()[-1]
    for words in (
        "make gpu: 4 of 5 steps failed:", "one (trap: killed by signal 6)", "one (fails: exit code 3)",
        "two (setting: no such tool; set TOOL.)", "three (gone: not started",
    ):  # fmt: skip
        assert words in last
    assert "about to trap" in (tmp_path / "one.log").read_text()
    assert "all is well" in (tmp_path / "three.log").read_text()
    assert (tmp_path / "summary.txt").read_text().splitlines()[-1] == last
    assert {path.name for path in tmp_path.iterdir()} == {"one.log", "two.log", "three.log", "summary.txt"}


@pytest.mark.slow
def test_what_hangs_is_stopped_with_all_it_started(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(runner, "_GRACE_SECONDS", 1)
    child = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
    hangs = child + "print(p.pid, flush=True); import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); p.wait()"
    left = child + "print(p.pid, flush=True)"
    part = Part("part", "", 300, lambda setup: [_step("left", left, 200), _step("hangs", hangs, 5)])
    start = time.monotonic()
    assert _run(monkeypatch, tmp_path, part) == 1
    assert time.monotonic() - start < 150
    assert "part (hangs: stopped after 5 s)" in capsys.readouterr().out.strip().splitlines()[-1]
    pids = [int(line) for line in (tmp_path / "part.log").read_text().splitlines() if line.strip().isdigit()]
    assert len(pids) == 2
    for pid in pids:
        deadline = time.monotonic() + 60
        while _is_running(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _is_running(pid)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_part_has_an_end(monkeypatch, tmp_path, capsys) -> None:
    steps = [_step("first", "import time; time.sleep(3)"), _step("second", "print('never')")]
    part, other = Part("part", "", 2, lambda setup: steps), Part("other", "", 60, lambda setup: [_step("runs", "")])
    assert _run(monkeypatch, tmp_path, part, other) == 1
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert "2 of 3 steps failed" in last and "second: no time left of the part's 2 s" in last


def test_parts_are_chosen_by_name(monkeypatch, tmp_path, capsys) -> None:
    made = [Part(name, "", 60, lambda setup, name=name: [_step(name, "")]) for name in "abc"]
    assert _run(monkeypatch, tmp_path, *made, arguments=("c", "a")) == 0
    out = capsys.readouterr().out
    assert out.index("a, a: passed") < out.index("c, c: passed") and "b, b" not in out
    assert out.strip().endswith("make gpu: all 2 steps passed")
    assert _run(monkeypatch, tmp_path, *made, arguments=("d",)) == 2
    assert "there is no part 'd'; expected some of a, b, c." in capsys.readouterr().err


@pytest.mark.parametrize("dry_run", [False, True])
def test_every_part_ends_within_eight_minutes(dry_run, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SANITIZER", "compute-sanitizer")
    setup = Setup(tmp_path, ("90a",), dry_run)
    assert [part.name for part in parts.PARTS][:4] == ["build", "kernels", "right", "table"]
    for part in parts.PARTS:
        assert part.seconds < parts.MOST_SECONDS
        steps = part.steps(setup)
        assert steps and len({step.name for step in steps}) == len(steps)
        assert all(step.seconds <= part.seconds for step in steps), part.name


def test_programs_to_build_are_chosen_by_name(monkeypatch, tmp_path) -> None:
    asked = []
    monkeypatch.setattr(
        build.csrc.Build, "run", lambda self, targets, *options: asked.append((targets, options)) or True
    )
    (step,) = [step for step in parts._build(Setup(tmp_path, dry_run=True)) if step.name == "test programs"]
    assert build.main(step.command[3:]) == 0
    assert asked.pop() == (["emulated_test_base_device", "emulated_test_scalar_mix_cuda"], ())
    assert build.main(["extension", "--dry-run"]) == 0
    targets, options = asked.pop()
    assert options == ("-n",) and targets[0].startswith("_C.")
    assert build.main(["programs", "nothing-such", "--emulated"]) == 1


def test_a_part_is_of_the_gpu_that_is_there(tmp_path, monkeypatch) -> None:
    assert {"lstm_persistent_forward", "base_device"} <= set(parts.test_programs(("90a",)))
    assert "lstm_persistent_forward" not in parts.test_programs(("80",))
    answer = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for said, archs in (("9.0", "90a"), ("8.0\n8.6\n8.6", "80;86"), ("12.0", "120"), ("[N/A]", None), ("", None)):
        answer.write_text(f"#!/bin/sh\nprintf '{said}\n'\n")
        answer.chmod(0o755)
        assert runner.archs_here() == archs


# tests whose process lost the device


@pytest.mark.slow
def test_a_worker_without_a_device_is_replaced_and_its_test_named(tmp_path) -> None:
    pytest.importorskip("xdist")
    (tmp_path / "conftest.py").write_text(
        f"""
import importlib.util, sys, torch
sys.path.insert(0, {str(ROOT / "tests")!r})
spec = importlib.util.spec_from_file_location("house", {str(ROOT / "tests" / "conftest.py")!r})
house = importlib.util.module_from_spec(spec)
spec.loader.exec_module(house)
pytest_runtest_teardown = house.pytest_runtest_teardown
torch.cuda.is_initialized = lambda: True
trapped = []
def synchronize():
    if trapped:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure") if hasattr(torch, "AcceleratorError") \
            else RuntimeError("CUDA error: unspecified launch failure")
torch.cuda.synchronize = synchronize
def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: x")
"""
    )
    (tmp_path / "test_it.py").write_text(
        """
import conftest, pytest
pytestmark = pytest.mark.gpu
@pytest.mark.parametrize("n", range(6))
def test_before(n): assert not conftest.trapped
def test_traps(): conftest.trapped.append(1)
@pytest.mark.parametrize("n", range(12))
def test_after(n): assert not conftest.trapped
"""
    )
    done = subprocess.run(
        (sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", str(tmp_path)),
        cwd=tmp_path, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert "crashed while running 'test_it.py::test_traps'" in done.stdout, done.stdout + done.stderr
    assert "1 failed, 19 passed" in done.stdout  # it had passed, before its process was seen to be lost
    assert done.returncode == 1


# capture


class _Cuda:
    """What ``measure.capture`` asks of torch.cuda; ``current`` is the stream that work is queued on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capture_fails: bool) -> None:
        self.mode, self.captures, self.abandoned = 0, 0, []
        outer = self

        class Stream:
            def wait_stream(self, other) -> None:
                pass

            def __enter__(self):
                self.before, outer.current = outer.current, self

            def __exit__(self, *error):
                outer.current = self.before

        class Graph:
            def capture_begin(self, pool) -> None:
                outer.captures += 1

            def capture_end(self) -> None:
                if capture_fails:
                    raise RuntimeError("operation failed due to a previous error during capture")

            def replay(self) -> None:
                pass

        self.outside = self.current = Stream()
        for name, value in dict(
            Stream=Stream, stream=lambda stream: stream, current_stream=lambda: self.current, CUDAGraph=Graph,
            synchronize=lambda: None, graph_pool_handle=lambda: (0, 1), get_sync_debug_mode=lambda: self.mode,
            set_sync_debug_mode=lambda mode: setattr(self, "mode", mode),
        ).items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(measure, "abandon", lambda graph, pool: self.abandoned.append(pool))


def test_a_captured_run_returns_the_same_tensors(monkeypatch) -> None:
    cuda, one = _Cuda(monkeypatch, capture_fails=False), torch.zeros(1)
    assert measure.capture(lambda: one)() is one
    assert cuda.current is cuda.outside and cuda.captures == 1 and not cuda.abandoned


def test_a_failed_capture_leaves_the_process_as_it_was(monkeypatch) -> None:
    cuda = _Cuda(monkeypatch, capture_fails=True)
    with pytest.raises(RuntimeError, match="during capture"):
        measure.capture(lambda: 1)
    assert cuda.current is cuda.outside and cuda.mode == 0 and cuda.abandoned == [(0, 1)]


def test_what_waits_for_the_device_is_not_captured(monkeypatch) -> None:
    cuda, calls = _Cuda(monkeypatch, capture_fails=False), []

    def run() -> None:
        calls.append(cuda.mode)
        if cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    result = row("a mask", 1.0)
    assert measure._capture(run, result) is None
    assert calls == [0, 0, "error"] and cuda.current is cuda.outside and cuda.mode == 0
    assert result.status == "cannot run" and result.note.endswith("called a synchronizing CUDA operation")
    assert cuda.captures == 0


class _Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.at = None

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later) -> float:
        return 1e3 * (later.at - self.at)


class _OnCpu(device.Gpu):
    """All that the programs ask of a GPU, asked of a made-up torch.cuda, with tensors on the CPU."""

    kind, is_stand_in, halves = "cpu", True, (torch.float16,)


def _made_up_cuda(monkeypatch) -> _Cuda:
    cuda = _Cuda(monkeypatch, capture_fails=False)
    for name, value in dict(
        is_available=lambda: True, get_device_name=lambda: "a GPU", Event=_Event, reset_peak_memory_stats=lambda: None,
        memory_allocated=lambda: 2**20, max_memory_allocated=lambda: 3 * 2**20, current_device=lambda: 0,
        get_device_properties=lambda index: SimpleNamespace(L2_cache_size=2**20),
    ).items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(device, "StandIn", _OnCpu)
    return cuda


@pytest.mark.slow
@pytest.mark.parametrize("program", [(lstm, "choose"), (models, "bert")], ids=["lstm", "models"])
def test_programs_ask_a_gpu_for_what_torch_has(program, monkeypatch, capsys) -> None:
    module, what = program
    cuda = _made_up_cuda(monkeypatch)
    assert module.main([what, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("a GPU, torch") and said.strip().endswith("0 failed")
    assert cuda.current is cuda.outside


def test_a_gpu_is_timed_by_its_events(monkeypatch) -> None:
    _made_up_cuda(monkeypatch)
    gpu = _OnCpu()
    assert gpu.milliseconds(lambda: time.sleep(2e-3), 0.01) >= 2
    assert gpu.peak_mib(lambda: None) == 2.0
    with gpu.stream():
        assert torch.cuda.current_stream() is not None
    for stream in gpu.streams(2) * 2:
        with stream:
            pass
    one = torch.zeros(1)
    assert gpu.graph(lambda: one)() is one
    assert measure._peak_memory(lambda: 5, "cuda") == (5, 2.0)
    times = [measure._Runner(row("a", None), lambda: time.sleep(1e-3)), measure._Runner(row("b", None), lambda: None)]
    measure._time_cuda(times, 0.05, is_model=True)
    assert all(len(each.times) >= 3 for each in times) and min(times[0].times) >= 1e-3


# targets and predictions


def test_every_target_has_a_prediction() -> None:
    names = [target.name for target in TARGETS]
    assert len(set(names)) == len(names) and set(predictions()) == set(names)
    for name, prediction in predictions().items():
        assert 0 < prediction.low <= prediction.high, name
        assert prediction.unit in ("ms", "us a step") and len(prediction.why) > 10, name
    for target in TARGETS:
        unit = predictions()[target.name].unit
        assert (unit == "us a step") == target.case.startswith("lstm/"), target.name


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_every_target_is_a_case_with_its_peers(target: Target) -> None:
    case = table.case_of(target, is_stand_in=False)
    names = [provider.name for provider in peers.providers(case, compile=True)]
    assert not target.ours or target.ours in names
    for versus in target.versus:
        assert any(versus.holds(name) for name in names), versus
        assert all(any(Versus((peer,), 1, 1).holds(name) for name in names) for peer in versus.peers), versus
        assert 0 < versus.must <= versus.aim
    compiled = any("compile" in peer for versus in target.versus for peer in versus.peers)
    assert compiled == target.is_compiled
    assert target.group in parts.GROUPS
    assert table.case_of(target, is_stand_in=True).device == "cpu"


def test_a_page_prints_measured_beside_predicted(monkeypatch) -> None:
    target = Target(
        "a layer", "lstm", "lstm/w/float16/forward", (Versus(("nn.LSTM",), 12, 16), Versus(("loop",), 75, 110)),
        us_per_step=(4.3, 3.0), memory=2.0,
    )  # fmt: skip
    monkeypatch.setattr(targets, "TARGETS", (target, Target("never", "lstm", "lstm/v/float16/forward", ())))
    told = {name: targets.Prediction(4.0, 5.0, "us a step", "as it adds up") for name in ("a layer", "never")}
    monkeypatch.setattr(targets, "predictions", lambda: told)
    case = "lstm/w/float16/forward/cuda"
    found = [
        row("ctxfast cuda", 0.5, case=case, chosen=True, ours=True, us_per_step=4.0, memory_mib=10.0),
        row("nn.LSTM", 6.5, case=case, memory_mib=15.0),
        row("nn.LSTM", 1.0, case="lstm/w/bfloat16/forward/cuda"),
    ]
    lines = targets.page(found).splitlines()
    assert len(lines) == 4 and lines[3].endswith("| not measured |")
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells[:4] == ["a layer", "4 us a step", "4 to 5 us a step", "0.89"]
    assert cells[4] == (
        "must met (4.3 us); 13.00x of 12x over nn.LSTM: must met; not compared with loop; memory 1.50x of 2x: missed"
    )
    assert len(targets.page(found, only_measured=True).splitlines()) == 3
    assert targets.page(found[2:]) == ""


def test_graphs_are_compared_with_graphs() -> None:
    target = Target("t", "rows", "op/w/bfloat16/forward", (Versus(("peer*",), 1, 2),), graphs=True)
    case = "op/w/bfloat16/forward/cuda"
    eager = [row("ctxfast triton", 3.0, case=case, chosen=True), row("peer one", 2.0, case=case)]
    graphs = [row("ctxfast triton, CUDA graph", 1.0, case=case), row("peer one, CUDA graph", 1.5, case=case)]
    assert find(target, [*eager, *graphs]).ratio(0) == 1.5
    assert find(target, eager).ratio(0) == 2 / 3
    # A peer that cannot be captured competes as it runs.
    assert find(target, [*eager, graphs[0]]).ratio(0) == 2.0
    assert find(target, [graphs[1]]).ours is None


def test_reports_of_a_gpu_show_it(tmp_path) -> None:
    from support.benchmark_rows import document

    target = TARGETS[0]
    found = [row("ctxfast cuda", 0.6, case=f"{target.case}/cuda", chosen=True, ours=True, us_per_step=4.7)]
    page = report.markdown(document(found, device="cuda", machine="nvidia-h200"))
    assert "Measured beside predicted" in page and target.name in page
    assert "Measured beside predicted" not in report.markdown(document([row("a", 1.0)]))


# the programs


def _parts(*names: str, results: Path, timeout: int) -> subprocess.CompletedProcess[str]:
    environ = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = ("make", "-s", "gpu", f"PYTHON={sys.executable}", f"PARTS={' '.join(names)}", "DRY_RUN=1", "MORE_TIME=10")
    return subprocess.run(
        (*command, f"RESULTS={results}"), cwd=ROOT, env=environ, capture_output=True, text=True, timeout=timeout
    )


@pytest.mark.slow
def test_a_dry_run_of_the_programs_that_say_what_is_right(tmp_path) -> None:
    done = _parts("right", results=tmp_path, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith("make gpu: all 3 steps passed")
    log = (tmp_path / "right.log").read_text()
    assert log.count("\n0 failed") == 3 and "WRONG" not in log
    ops = ("attention", "add_layer_norm", "linear_act", "feed_forward", "embed_layer_norm", "linear_cross_entropy")
    for op in ops:
        assert f"{op}/tiny/float16/forward+backward/cpu: triton" in log


@pytest.mark.slow
def test_a_dry_run_of_everything(tmp_path) -> None:
    done = _parts(results=tmp_path, timeout=7000)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    assert {path.stem for path in tmp_path.glob("*.log")} == {part.name for part in parts.PARTS}
    assert len(list(tmp_path.iterdir())) == len(parts.PARTS) + 3  # table.json, table.md, summary.txt
    measured = json.loads((tmp_path / "table.json").read_text())["rows"]
    for target in TARGETS:
        op, workload, _, pass_name = target.case.split("/")
        here = [each for each in measured if (each["workload"], each["pass_name"]) == (workload, pass_name)]
        assert any(each["op"] == op and "median_ms" in each for each in here), target.name


@pytest.mark.slow
@pytest.mark.parametrize("what", ["right", "stress", "choose"])
def test_lstm_programs_on_the_emulator(what, monkeypatch, capsys) -> None:
    """With the kernels' own source, both implementations."""
    from ctxfast._core import capability, registry

    spec = registry.OPS["lstm"]
    both = emulated.Instead(emulated.extension())
    monkeypatch.setattr(capability, "extension", lambda: both)
    monkeypatch.setattr(capability, "why_no_cuda", lambda arch=None: None)
    impls = [each.name for each in spec.impls if each.device == "cuda"]
    for name in impls:
        monkeypatch.setattr(spec.module(name).cuda_autograd, "objection", lambda *args: None)
    with emulated.kernels(monkeypatch, spec.module(impls[0])), emulated.kernels(monkeypatch, spec.module(impls[1])):
        assert lstm.main([what, "--dry-run"], impls) == 0
    said = capsys.readouterr().out
    assert said.strip().endswith("0 failed") and all(name in said for name in impls)
    assert "not taken" not in said


def test_cases_of_the_suite_include_the_texts_of_the_target() -> None:
    (case,) = cases.select("cuda", "full", ["bert"], workloads=["fill 0.15"])[1:]
    lengths = case.sizes["lengths"]
    assert len(lengths) == 256 and max(lengths) == 320 and 0.145 < sum(lengths) / (256 * 320) < 0.155
