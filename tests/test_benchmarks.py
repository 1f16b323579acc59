# SPDX-License-Identifier: Apache-2.0
"""The benchmark suite's own arithmetic, gate, files and pages, on tiny cases."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
from support.benchmark_rows import QUICK, row, tiny

from benchmarks import __main__ as command, arrivals, cases, ceilings, gate, measure, peers, results
from benchmarks.measure import Settings
from benchmarks.provider import Call, NotInstalled, Provider, Unavailable, leaves_of
from ctxfast._core import registry


@pytest.fixture(autouse=True)
def _the_command_holds_its_process_to_some_cores() -> Iterator[None]:
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    yield
    torch.set_num_threads(threads)
    os.sched_setaffinity(0, cores)


def statuses(found) -> dict[str, str]:
    return {each.provider: each.status for each in found}


# the table


@pytest.mark.parametrize("op", sorted(registry.OPS))
def test_every_op_has_a_small_row_peers_and_declared_work(op):
    selected = cases.select("cpu", "small", [op])
    assert selected, f"add a small row to benchmarks/ops/{op}.py"
    assert cases.select("cuda", "full", [op])
    assert cases.module(op).PEERS
    for case in selected:
        assert case.work.flops or case.work.bytes


def test_every_file_of_an_op_is_that_of_an_op_in_the_table():
    folder = Path(cases.__file__).parent / "ops"
    assert {path.stem for path in folder.glob("[!_]*.py")} == set(registry.OPS)


def test_modules_import_in_one_direction():
    root = Path(cases.__file__).parent
    found: dict[str, set[str]] = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = (*parts[: len(parts) - node.level], *(node.module or "").split("."))
                names = [".".join(filter(None, (*base, alias.name))) for alias in node.names]
                names.append(".".join(filter(None, base)))
                found.setdefault(".".join(parts), set()).update(names)
    TopologicalSorter(found).prepare()  # raises CycleError
    assert {"cases", "provider"} <= found["ops.lstm"]


def test_ids_are_unique_and_full_holds_small():
    for device in ("cpu", "cuda"):
        full = [case.id for case in cases.select(device, "full", models=True)]
        assert len(full) == len(set(full))
        assert {case.id for case in cases.select(device, "small", models=True)} < set(full)


def test_select_keeps_what_is_asked_for():
    assert {case.op for case in cases.select(ops=["scalar_mix"])} == {"scalar_mix"}
    assert {case.op for case in cases.select(ops=["bert"])} == {"bert"}
    assert not any(case.is_model for case in cases.select())
    assert any(case.is_model for case in cases.select(models=True))
    assert all("B32" in case.id for case in cases.select("cpu", "full", workloads=["B32"]))
    with pytest.raises(ValueError, match="there is no op 'lstn'"):
        cases.select(ops=["lstn"])


def test_inputs_are_the_same_for_every_dtype():
    narrow, wide = tiny("lstm", dtype="bfloat16").make(), tiny("lstm").make()
    assert torch.equal(narrow["input"], wide["input"].bfloat16())
    assert torch.equal(narrow["weight_hh"][1], wide["weight_hh"][1].bfloat16())


def test_work_counts_tokens_not_padding():
    case = tiny("attention")
    assert case.work.flops == 4 * (16 + 1 + 9) * 2 * 8
    ragged = tiny("lstm", ragged=True)
    assert ragged.work.tokens == sum(ragged.make()["lengths"].tolist()) < 3 * 4
    assert tiny("lstm").work.flops == 2 * 12 * 2 * (4 * 6 * (5 + 4) + 4 * 6)
    assert tiny("lstm", backward=True).work.flops == 3 * tiny("lstm").work.flops


def test_recurrences_know_their_floor(monkeypatch):
    case = tiny("lstm")
    assert case.work.steps == 4 and case.work.step_bytes == 2 * (4 * 6 * 4 + 4 * 6) * 4
    assert tiny("lstm", dtype="float32+int8").work.step_bytes == case.work.step_bytes / 4
    assert tiny("lstm", backward=True).work.step_bytes == 2 * case.work.step_bytes
    monkeypatch.setattr(ceilings, "bytes_per_second", lambda device: 960.0)
    monkeypatch.setattr(ceilings, "flops_per_second", lambda device, dtype: case.work.flops / 2)
    assert ceilings.floor_seconds(case.work, "cpu", None) == 4.0  # 960 bytes a step, 4 steps
    assert ceilings.floor_seconds(case.work, "cpu", torch.float32) == 4.0
    monkeypatch.setattr(ceilings, "bytes_per_second", lambda device: 9600.0)
    assert ceilings.floor_seconds(case.work, "cpu", torch.float32) == 2.0
    lstm = row("a", 2.0, us_per_step=15.6, of_floor=0.5)
    assert results.speed(lstm) == "15.6 us a step"
    assert "floor 50 %" in results.case_table([dataclasses.replace(lstm, p20_ms=1.9, p80_ms=2.1, error=0.0)])


def test_the_floor_is_the_longest_of_what_is_known(monkeypatch):
    monkeypatch.setattr(ceilings, "bytes_per_second", lambda device: 100.0)
    monkeypatch.setattr(ceilings, "flops_per_second", lambda device, dtype: 10.0)

    def floor(dtype=torch.float32, **work):
        return ceilings.floor_seconds(cases.Work(**work), "cpu", dtype)

    assert floor(bytes=500.0) == 5.0 and floor(flops=70.0) == 7.0
    assert floor(bytes=500.0, flops=70.0, steps=2, step_bytes=400.0) == 8.0
    assert floor(None, flops=70.0) is None and floor(tokens=3) is None


# requests


def test_requests_come_as_their_row_says() -> None:
    steady, drawn = arrivals.Arrivals(10), arrivals.Arrivals(10, is_random=True, busy=2)
    assert steady.words == "after 10 ms" and drawn.words == "after about 10 ms, 2 cores busy"
    assert arrivals.Arrivals(busy=1).words == "back to back, 1 cores busy"
    assert steady.pauses(3) == [0.01] * 3 and arrivals.Arrivals().pauses(2) == [0.0] * 2
    waits = drawn.pauses(2000)
    assert waits == drawn.pauses(2000) and 0.009 < sum(waits) / 2000 < 0.011 and min(waits) < 0.001
    assert arrivals.requests(1.0, 0.1, 0.001) == arrivals.LEAST
    assert arrivals.requests(5.0, 0.01, 0.0) == 500 and arrivals.requests(9e9, 0, 1e-3) == arrivals.MOST


def test_requests_are_timed_in_blocks_without_their_pauses(monkeypatch) -> None:
    asked, slept = [], []
    monkeypatch.setattr(arrivals.time, "sleep", slept.append)
    runs = [lambda: asked.append("a"), lambda: asked.append("b")]
    times = arrivals.time_requests(runs, arrivals.Arrivals(5), [4, 8], lambda: asked.append("-"))
    assert [len(found) for found in times] == [4, 8] and slept == [0.005] * 12
    assert asked == ["-", "a", "a", "-", "b", "b", "b"] * arrivals.BLOCKS


def test_neighbours_are_busy_and_gone() -> None:
    with arrivals.busy_processes(1):
        (child,) = [int(pid) for pid in _children()]
        before = _cpu_seconds(child)
        end = time.monotonic() + 60
        while _cpu_seconds(child) <= before and time.monotonic() < end:
            time.sleep(0.05)
        assert _cpu_seconds(child) > before
    assert not Path(f"/proc/{child}").exists()


def _children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii").split()


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return int(fields[11]) / os.sysconf("SC_CLK_TCK")


def test_latency_has_a_set_of_its_own() -> None:
    found = cases.select("cpu", "latency", models=True)
    assert found and all(case.arrivals is not None and case.is_model for case in found)
    assert all(case.arrivals is None for case in cases.select("cpu", "full", models=True))
    case = dataclasses.replace(tiny("add_layer_norm"), arrivals=arrivals.Arrivals(0.1))
    rows = measure.measure(case, peers.providers(case)[:2], Settings(seconds=0.01, threads=1))
    (ours,) = [each for each in rows if each.chosen]
    assert ours.samples == arrivals.LEAST and ours.median_ms <= ours.p95_ms <= ours.p99_ms
    assert "p99" in results.case_table(rows) and ours.timing == "wall clock, after 0.1 ms"


# providers: every peer of every op passes its own gate

_SPECIAL = [
    tiny("lstm", ragged=True),
    tiny("lstm", dtype="float32+bf16"),
    tiny("lstm", dtype="float32+int8"),
    tiny("lstm", P=None, clip=None, backward=True),
    tiny("lstm", ragged=True, backward=True),
    tiny("attention", lengths=(4, 4), backward=True),
    tiny("attention", dropout=0.5),
    tiny("attention", dropout=0.5, backward=True),
    tiny("linear_act", activation="none"),
]
_PEER_CASES = [
    tiny(op, backward=back)
    for op in sorted(registry.OPS)
    for back in (False, True)
    if not back or hasattr(cases.module(op), "GRADS")
]


@pytest.mark.slow
@pytest.mark.parametrize("case", [*_PEER_CASES, *_SPECIAL], ids=lambda case: f"{case.id} {case.sizes}")
def test_providers_pass_their_gate(case):
    found = measure.measure(case, peers.providers(case), QUICK)
    assert {each.status for each in found} <= {"ok", "cannot run"}, [each.note for each in found]
    timed = [each for each in found if each.status == "ok"]
    assert all(each.samples >= measure.MIN_ROUNDS and each.error <= each.bound for each in timed)
    assert sum(not each.ours for each in timed) >= 1
    (chosen,) = [each for each in timed if each.chosen]
    assert chosen.ratio == 1 and chosen.provider.startswith("ctxfast")
    assert {f"ctxfast {impl.name}" for impl in registry.OPS[case.op].all_impls} <= set(statuses(found))


@pytest.mark.slow
def test_providers_that_do_not_run_keep_their_row():
    def missing(case, args):
        raise NotInstalled("not installed (pip install fastlib)")

    def unable(case, args):
        raise Unavailable("it has no masks")

    def broken(case, args):
        raise RuntimeError("first line\nsecond line")

    case = tiny("add_layer_norm")
    extra = [Provider("missing", missing), Provider("unable", unable), Provider("broken", broken)]
    found = measure.measure(case, [*peers.providers(case), *extra], QUICK)
    assert statuses(found)["missing"] == "not installed"
    assert statuses(found)["unable"] == "cannot run"
    assert statuses(found)["broken"] == "error"
    text = results.case_table(found)
    for words in ("not installed (pip install fastlib)", "it has no masks", "ERROR: RuntimeError: first line"):
        assert words in text
    assert "second line" not in text


def test_provider_filter_leaves_a_row():
    case = tiny("scalar_mix")
    found = measure.measure(case, peers.providers(case), Settings(seconds=0.0, providers=("einsum",)))
    assert statuses(found)["stack and einsum"] == "ok"
    assert next(each for each in found if each.provider.startswith("sum of")).note.startswith("left out")


# the gate


def _wrong(change):
    def build(case, args):
        right = peers.providers(case)[-2].build(case, args)
        return Call(lambda: tuple(change(out) for out in right.forward()), right.leaves)

    return Provider("wrong", build)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda out: out * 1.01, "off by"),
        pytest.param(lambda out: out / 0, "not finite", marks=pytest.mark.slow),
        pytest.param(lambda out: out[:-1], "has shape", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_provider_gets_no_number_and_exit_code_1(change, words, capsys):
    case = tiny("add_layer_norm")
    found = measure.measure(case, [*peers.providers(case), _wrong(change)], QUICK)
    bad = found[-1]
    assert bad.status == "wrong" and words in bad.note
    assert bad.median_ms is None and bad.ratio is None and bad.samples == 0
    assert "WRONG" in results.case_table(found)
    assert command._verdict(found) == 1 and command._verdict(found[:-1]) == 0
    assert "add_layer_norm" in capsys.readouterr().err


def test_a_wrong_gradient_is_seen():
    def build(case, args):
        x, residual, weight, bias, x_bias = (args[name] for name in case.grads)

        def forward():
            return (
                torch.nn.functional.layer_norm(x + residual.detach() + x_bias, (8,), weight, bias, 1e-12)
                + 0 * residual,
            )

        return Call(forward, leaves_of(case, args))

    (found,) = measure.measure(tiny("add_layer_norm", backward=True), [Provider("no residual gradient", build)], QUICK)
    assert found.status == "wrong" and "gradient of residual" in found.note


def test_relative_error():
    right = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert gate.relative_error("x", torch.tensor([1.0, -3.0]), right) == pytest.approx(0.25)
    assert gate.relative_error("x", torch.empty(0), torch.empty(0)) == 0
    with pytest.raises(gate.ParityError, match="has shape"):
        gate.relative_error("x", torch.ones(3), right)


def test_rounds_take_turns():
    order = []

    def provider(name):
        def build(case, args):
            def forward():
                order.append(name)
                return peers.providers(case)[0].build(case, args).forward()

            return Call(forward)

        return Provider(name, build)

    measure.measure(tiny("add_layer_norm"), [provider(name) for name in "abc"], QUICK)
    squeezed = "".join(name for i, name in enumerate(order) if i == 0 or order[i - 1] != name)
    assert squeezed.endswith("abc" * measure.MIN_ROUNDS)


class _Event:
    """Stands in for a CUDA event: 2 ms pass between two records."""

    clock = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        _Event.clock += 2
        self.at = _Event.clock

    def elapsed_time(self, end: _Event) -> float:
        return end.at - self.at


def test_cuda_timing_takes_event_times(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("", (), {"L2_cache_size": 1 << 20}))
    each = measure._Runner(row("a", None), lambda: time.sleep(1e-3))
    measure._time_cuda([each], 0.0, is_model=True)
    assert set(each.times) == {2e-3} and len(each.times) == measure.MIN_ROUNDS * each.inner
    assert each.row.timing == "CUDA events, warm"


def test_what_no_cuda_graph_can_hold_says_so(monkeypatch):
    def refuse(*args):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "Stream", refuse)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = row("a, CUDA graph", None)
    assert measure._capture(lambda: None, found) is None
    assert found.status == "cannot run" and found.note.endswith("when stream is capturing")


# arithmetic


def test_percentile_and_rounds():
    assert measure.percentile([3.0, 1.0, 2.0], 0.5) == 2
    assert measure.percentile([1.0, 2.0], 0.25) == 1.25
    assert measure.percentile([5.0], 0.8) == 5
    assert measure.rounds(1.0, 0.1) == 10
    assert measure.rounds(1.0, 9.0) == measure.MIN_ROUNDS
    assert measure.rounds(1.0, 0.0) == measure.MAX_ROUNDS


@pytest.mark.parametrize(
    "value, text",
    [(None, "-"), (0, "0"), (1234.5, "1234"), (12.345, "12.3"), (0.01234, "0.0123"), (1.5e-6, "0.000002")],
)
def test_number(value, text):
    assert results.number(value) == text


def test_ratios_are_peer_over_ours():
    rows = [
        row("ctxfast cpu", 2.0, ours=True, chosen=True),
        row("nn.LSTM", 5.0),
        row("gone", None, status="cannot run"),
    ]
    measure._set_ratios(rows)
    assert [each.ratio for each in rows] == [1.0, 2.5, None]
    unchosen = [row("ctxfast cpu", None, ours=True, chosen=True, status="wrong"), row("nn.LSTM", 5.0)]
    measure._set_ratios(unchosen)
    assert unchosen[1].ratio is None


def test_others_do_not_count_this_process(monkeypatch):
    """Twenty seconds in which the machine's cores were busy for 50 s, 30 of them with us."""
    ticks = os.sysconf("SC_CLK_TCK")
    clock = [0.0]

    class Stat:
        def __init__(self, path: str) -> None:
            assert path == "/proc/stat"

        def read_text(self, encoding: str) -> str:
            busy = int(clock[0] * 2.5 * ticks)
            return f"cpu  {busy} 0 0 999 7 0 0 0 5 0\ncpu0 1 2\n"

    def times() -> os.times_result:
        return os.times_result((clock[0], 0.0, clock[0] / 2, 0.0, 0.0))

    monkeypatch.setattr(results, "Path", Stat)
    monkeypatch.setattr(results.os, "times", times)
    monkeypatch.setattr(results.time, "monotonic", lambda: clock[0])
    others = results.Others()
    clock[0] = 20.0
    assert others.cores() == 1.0


# the command


def test_command_runs_and_writes(tmp_path, capsys):
    target = tmp_path / "r.json"
    words = ["--op", "scalar_mix", "--case", "elmo", "--seconds", "0", "--json", str(target)]
    words += ["--page", str(tmp_path / "r.html")]
    assert command.main(words) == 0
    output = capsys.readouterr()
    assert "stack and einsum" in output.out and "[1/1" in output.err
    saved = results.load(target)
    assert str(tmp_path) not in json.dumps(saved, default=vars)
    assert "stack and einsum" in (tmp_path / "r.html").read_text()
    assert command.main(words) == 2 and "--overwrite" in capsys.readouterr().err
    assert command.main(["--base", str(target), str(target)]) == 0
    assert " 1.00x  same" in capsys.readouterr().out
    assert command.main(["--base", str(target), str(tmp_path / "no.json")]) == 2
    render = ["--render", str(target), "--page", str(tmp_path / "again.html")]
    assert (
        command.main([*render, "--since", str(target)]) == 0 and "0 are slower" in (tmp_path / "again.html").read_text()
    )
    for bad, message in (
        (render, "is there already"),
        (["--page", str(tmp_path / "no" / "x.html")], "no file in a folder"),
    ):
        assert command.main(bad) == 2 and message in capsys.readouterr().err
    assert command.main(["--since", str(target)]) == 2 and "without --page" in capsys.readouterr().err


def test_command_lists_and_refuses(capsys):
    assert command.main(["--list", "--op", "lstm"]) == 0
    assert all(line.startswith("lstm/") for line in capsys.readouterr().out.splitlines())
    assert command.main(["--op", "lstm", "--case", "nothing like it"]) == 2
    assert "no case is left" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert command.main(["--device", "cuda"]) == 2
        assert "needs a GPU" in capsys.readouterr().err


def test_settle_waits_for_threads_that_turn_in_loops(monkeypatch) -> None:
    """Threads that turn for 0.2 s, and a clock of the test's own."""
    clock = [5.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(measure.time, "process_time", lambda: min(clock[0], 5.2))
    monkeypatch.setattr(measure.time, "sleep", sleep)
    measure.settle()
    assert 5.2 <= clock[0] < 5.25
    monkeypatch.setattr(measure.time, "process_time", lambda: clock[0])  # for ever: a second at most
    measure.settle()
    assert 6.2 <= clock[0] < 6.3
