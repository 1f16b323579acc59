# SPDX-License-Identifier: Apache-2.0
"""Measuring one case: gate, warm-up, then rounds in which every provider runs once, A B C A B C.

Taking turns makes a busy or throttling machine slow everybody alike, so ratios hold where absolute times do not.
CPU: wall-clock time of warm calls. GPU: CUDA events; ops are timed with a flushed L2 cache, models with a warm one.
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ctxfast.nn.graph_capture import abandon

from .arrivals import Arrivals, requests, time_requests
from .cases import Case
from .ceilings import floor_seconds
from .gate import Gate, ParityError, Verdict, results, runner
from .peers import chosen_impl
from .provider import NotInstalled, Provider, Unavailable

MIN_ROUNDS, MAX_ROUNDS = 3, 200
# A timed sample lasts at least this long, so that the clock and its call cost nothing.
_MIN_SAMPLE_S = 2e-3
# Calls shorter than this are preceded by an untimed one: what the previous provider left in the caches is no matter.
_REWARM_BELOW_S = 0.05
# Pauses before each provider's turn, until nobody's threads turn in loops: those of the provider before wait for more
# work so, ONNX Runtime's for some 20 ms, CTranslate2's for some 200, and take a core from whoever comes next (MiniLM in
# int8, one text of 16 tokens on two cores: ctxfast 3.5 ms after a pause of 50 ms, 1.4 without CTranslate2; 2026-11-28).
_PAUSE_S, _MOST_PAUSES = 0.01, 100


def settle() -> None:
    """Wait until this process's threads are idle, or for a second."""
    for _ in range(_MOST_PAUSES):
        used, start = time.process_time(), time.perf_counter()
        time.sleep(_PAUSE_S)
        if time.process_time() - used < 0.1 * (time.perf_counter() - start):
            return


@dataclass
class Settings:
    """How to measure.

    Args:
        seconds: time for the rounds of one case, all providers together; 3 rounds are run whatever they take.
        threads: CPU threads for everybody.
        graphs: on a GPU, also time each provider inside a CUDA graph.
        compile: run the torch.compile peers.
        providers: run only providers whose name holds one of these texts (ctxfast's always run); empty for all.
    """

    seconds: float = 1.0
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    graphs: bool = False
    compile: bool = False
    providers: tuple[str, ...] = ()


@dataclass
class ResultRow:
    """One provider on one case. ``status``: "ok", "wrong", "error", "not installed" or "cannot run"; times if "ok".

    ``ratio``: this row's time over that of the implementation ctxfast chooses; above 1, ctxfast is faster.
    ``p95_ms``, ``p99_ms``: of requests, see ``arrivals``.
    ``us_per_step``: for recurrences. ``of_floor``: the share of the time that memory or the arithmetic would take
    (see ``ceilings``); above 1 where what is read stays in caches or on the chip.
    ``memory_mib``: memory that the first call added at its peak. ``error``: relative to the largest right value.
    """

    case: str
    op: str
    workload: str
    dtype: str
    pass_name: str
    device: str
    provider: str
    ours: bool
    chosen: bool = False
    status: str = "ok"
    note: str = ""
    timing: str = ""
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    samples: int = 0
    ratio: float | None = None
    memory_mib: float | None = None
    error: float | None = None
    bound: float | None = None
    gflops: float | None = None
    gbs: float | None = None
    tokens_per_s: float | None = None
    us_per_step: float | None = None
    of_floor: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass
class _Runner:
    row: ResultRow
    run: Callable[[], Any]
    times: list[float] = field(default_factory=list)  # seconds a call
    inner: int = 1
    estimate: float = 0.0


def set_threads(threads: int) -> str:
    """Hold the process and torch to this many cores; returns the sentence that goes into the result file."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)
    return f"{threads} threads, held to {len(cores)} cores"


def measure(case: Case, providers: Sequence[Provider], settings: Settings) -> list[ResultRow]:
    """The rows of one case, in the order of ``providers``; nothing is raised for a provider that fails."""
    args = case.make()
    gate = Gate(case, args)
    chosen = "ctxfast" if case.is_model else f"ctxfast {chosen_impl(case, args | case.timed_only)}"
    rows: list[ResultRow] = []
    runners: list[_Runner] = []
    for provider in providers:
        row = ResultRow(
            case.id, case.op, case.workload, case.dtype_name, case.pass_name, case.device,
            provider.name, provider.ours, provider.name == chosen, note=provider.note,
        )  # fmt: skip
        rows.append(row)
        if settings.providers and not provider.ours and not any(text in provider.name for text in settings.providers):
            row.status, row.note = "cannot run", "left out: not among --provider"
            continue
        run = _prepare(case, args, provider, gate, row)
        if run is None:
            continue
        runners.append(_Runner(row, run))
        if settings.graphs and case.device == "cuda":
            graph_row = ResultRow(**{**asdict(row), "provider": f"{provider.name}, CUDA graph", "chosen": False})
            rows.append(graph_row)
            captured = _capture(run, graph_row)
            if captured is not None:
                runners.append(_Runner(graph_row, captured))
    if runners:
        if case.device == "cuda":
            _time_cuda(runners, settings.seconds, is_model=case.is_model)
        elif case.arrivals is not None:
            _time_requests(runners, case.arrivals, settings.seconds)
        else:
            _time_cpu(runners, settings.seconds)
    for each in runners:
        _summarise(each, case)
    _set_ratios(rows)
    return rows


def _prepare(
    case: Case, args: dict[str, Any], provider: Provider, gate: Gate, row: ResultRow
) -> Callable[[], Any] | None:
    """A provider's timed function, its first result held to the gate; None, with the row filled in, if it fails."""
    try:
        # The right results come first: they must not count as memory of the first call.
        starts = gate.right[2]
        with warnings.catch_warnings():
            if not provider.ours:  # what other libraries remark about themselves is not for our readers
                warnings.simplefilter("ignore")
            call = provider.build(case, args)
            run = runner(call, starts, backward=case.backward)
            raw, row.memory_mib = _peak_memory(run, case.device)
        verdict: Verdict = gate.judge(provider, *results(call, raw, backward=case.backward))
        if case.timed_only:
            del call, run, raw
            run = runner(provider.build(case, args | case.timed_only), starts, backward=case.backward)
            _, row.memory_mib = _peak_memory(run, case.device)
    except NotInstalled as error:
        row.status, row.note = "not installed", str(error)
    except Unavailable as error:
        row.status, row.note = "cannot run", str(error)
    except ParityError as error:
        row.status, row.note = "wrong", str(error)
    except Exception as error:  # a provider that breaks must not take the others' rows with it
        row.status, row.note = (
            "error",
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}",
        )
        print(f"benchmarks: {case.id}: {provider.name}: {error}", file=sys.stderr)
    else:
        row.error, row.bound = verdict.error, verdict.bound
        return run
    return None


# time


def _time_cpu(runners: list[_Runner], seconds: float) -> None:
    for each in runners:
        each.run()
        start = time.perf_counter()
        each.run()
        each.estimate = time.perf_counter() - start
        each.inner = max(1, round(_MIN_SAMPLE_S / max(each.estimate, 1e-7)))
        each.row.timing = "wall clock, warm"
    a_round = sum(_PAUSE_S + _cost(each) for each in runners)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds(seconds, a_round)):
            for each in runners:
                settle()
                if each.estimate < _REWARM_BELOW_S:
                    each.run()
                start = time.perf_counter()
                for _ in range(each.inner):
                    each.run()
                each.times.append((time.perf_counter() - start) / each.inner)
    finally:
        gc.enable()


def _time_requests(runners: list[_Runner], arrivals: Arrivals, seconds: float) -> None:
    counts = []
    for each in runners:
        each.run()
        start = time.perf_counter()
        each.run()
        each.estimate = time.perf_counter() - start
        counts.append(requests(seconds, arrivals.pause_ms / 1e3, each.estimate))
        each.row.timing = f"wall clock, {arrivals.words}"
    gc.collect()
    gc.disable()
    try:
        found = time_requests([each.run for each in runners], arrivals, counts, settle)
    finally:
        gc.enable()
    for each, times in zip(runners, found):
        each.times = times
        each.row.p95_ms, each.row.p99_ms = (1e3 * percentile(times, share) for share in (0.95, 0.99))


def _cost(each: _Runner) -> float:
    return each.estimate * (each.inner + (each.estimate < _REWARM_BELOW_S))


def rounds(seconds: float, a_round: float) -> int:
    """How many rounds of ``a_round`` seconds fit, between the least that gives a spread and what is worth it."""
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / max(a_round, 1e-6))))


def _time_cuda(runners: list[_Runner], seconds: float, *, is_model: bool) -> None:
    # Written over before each timed call: four times the L2 cache, so that nothing of the inputs stays in it.
    size = 4 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    scratch = torch.empty(max(size, 1 << 20), dtype=torch.int8, device="cuda") if not is_model else None
    for each in runners:
        for _ in range(3):
            each.run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(5):
            each.run()
        torch.cuda.synchronize()
        each.estimate = (time.perf_counter() - start) / 5
        each.inner = max(1, min(20, round(_MIN_SAMPLE_S / each.estimate)))
        kind = "CUDA events, " + ("warm" if is_model else "L2 flushed")
        each.row.timing = kind
    a_round = sum(each.inner * (each.estimate + 1e-4) for each in runners)
    for _ in range(rounds(seconds, a_round)):
        for each in runners:
            events = []
            for _ in range(each.inner):
                if scratch is not None:
                    scratch.zero_()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                each.run()
                end.record()
                events.append((begin, end))
            torch.cuda.synchronize()
            each.times += [begin.elapsed_time(end) / 1e3 for begin, end in events]


def _capture(run: Callable[[], Any], row: ResultRow) -> Callable[[], Any] | None:
    """The same work as one CUDA graph; None, with the reason in the row, if it cannot be captured."""
    try:
        return capture(run)
    except Exception as error:
        torch.cuda.synchronize()
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        row.status, row.note = "cannot run", f"cannot be captured in a CUDA graph: {reason}"
        row.error = row.bound = row.memory_mib = None
        return None


def capture(run: Callable[[], Any]) -> Callable[[], Any]:
    """``run`` as a CUDA graph: a function that replays it and returns its outputs, the same tensors each time.

    Raises what ``run`` raises when it waits for the device, as for the number of tokens under a mask: before anything
    is captured. A capture that fails all the same leaves the stream and torch's allocator as they were, or the rows
    after it would be measured in the midst of it.
    """
    stream, outside = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(outside)
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    outside.wait_stream(stream)
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool)
        try:
            kept = run()
            graph.capture_end()
        except BaseException:
            abandon(graph, pool)
            raise

    def replay() -> Any:
        graph.replay()
        return kept  # keeps the graph's outputs alive

    return replay


# memory


def _peak_memory(run: Callable[[], Any], device: str) -> tuple[Any, float | None]:
    """Run once; its result, and how far memory in use rose above where it was, in MiB (None: not known here)."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        raw = run()
        torch.cuda.synchronize()
        return raw, (torch.cuda.max_memory_allocated() - before) / 2**20
    before = _reset_peak_rss()
    raw = run()
    after = _status_kib("VmHWM")
    return raw, None if before is None or after is None else max(0.0, (after - before) / 1024)


def _reset_peak_rss() -> float | None:
    """Hand freed memory back, put the peak-RSS mark of this process at its present size; that size in KiB."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (OSError, AttributeError):
        return None
    return _status_kib("VmRSS")


def _status_kib(field_name: str) -> float | None:
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(field_name + ":"):
                return float(line.split()[1])
    except OSError:
        return None
    return None


# summary


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` (0..1) of the sorted values lie, between neighbours by straight line."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _summarise(each: _Runner, case: Case) -> None:
    row, work = each.row, case.work
    median = statistics.median(each.times)
    row.median_ms = 1e3 * median
    row.p20_ms, row.p80_ms = 1e3 * percentile(each.times, 0.2), 1e3 * percentile(each.times, 0.8)
    row.samples = len(each.times)
    row.gflops = work.flops / median / 1e9 if work.flops else None
    row.gbs = work.bytes / median / 1e9 if work.bytes else None
    row.tokens_per_s = work.tokens / median if work.tokens else None
    row.us_per_step = 1e6 * median / work.steps if work.steps else None
    products = None if case.weight_dtype is torch.int8 else case.weight_dtype or case.dtype
    floor = floor_seconds(work, case.device, products)
    row.of_floor = None if floor is None else floor / median


def _set_ratios(rows: list[ResultRow]) -> None:
    """Every row's time over the chosen implementation's; none where that one has no time."""
    base = next((row.median_ms for row in rows if row.chosen and row.median_ms), None)
    for row in rows:
        if base is not None and row.median_ms is not None:
            row.ratio = row.median_ms / base
