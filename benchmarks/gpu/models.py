# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.gpu.models bert|step|kernels``: host and device in BERT's forward and in a training step.

- bert: results beside Hugging Face's, then a call's time on the device, on the host alone and when it is waited for,
  through CUDA graphs and op by op; again with what is off until it has been measured (``switches.py``).
- step: a masked-LM step: wall clock, host alone, how long the device was busy and with how many kernels, memory. Where
  "wall" is far above "busy" the host is what a step waits for.
- kernels: the kernels of a forward and of a step, by time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .. import cases
from ..cases import Case
from ..models import bert, bert_mlm
from ..provider import Call, Provider
from . import device as _device
from .device import Device, Lines, Run, host_microseconds, relative_error, wall_milliseconds
from .switches import all_on

_BERT = ("bert-base 1x128", "bert-base ragged 256 (fill 0.15)", "bert-base 64x128", "bert-base 32x512")
_STEPS = ("bert-base step 32x512", "bert-base step 32x128", "minilm step ragged 32", "bert-base step ragged 256")
# bfloat16 through a dozen layers, whoever rounds where.
_LIMIT = 2e-2


def _cases(op: str, workloads: Sequence[str], device: Device) -> list[Case]:
    if device.is_stand_in:
        return [Case(op, "small", dict(model="tiny", lengths=(9, 4)), "float32", False, "cpu", "small")]
    found = [case for case in cases.select("cuda", "full", [op]) if case.dtype_name == "bfloat16"]
    return [next(case for case in found if case.workload.startswith(workload)) for workload in workloads]


def bert_calls(device: Device) -> int:
    lines = Lines(width=58)
    for case in _cases("bert", _BERT, device):
        args = case.make()
        with torch.inference_mode():
            peer = next(each for each in bert.PEERS if each.name == "Hugging Face, eager").build(case, args)
            model = bert._ours(case, args)
            ours = bert._call(model, args)
            lines.row(f"{case.workload}, against Hugging Face", _agreement, ours, peer)
            lines.row(f"{case.workload}, as a user calls it", _told, device, ours.forward)
            with all_on():  # graphs are made in it
                switched = bert._call(bert._ours(case, args), args)
                lines.row(f"{case.workload}, with what is off", _agreement, switched, peer)
                lines.row(f"{case.workload}, as a user calls it, with it", _told, device, switched.forward)
            model.cuda_graphs = False
            lines.row(f"{case.workload}, op by op", _told, device, ours.forward)
            lines.row(f"{case.workload}, Hugging Face, eager", _told, device, peer.forward)
    if not device.is_stand_in:
        print(f"reserved by torch's allocator: {torch.cuda.memory_reserved() / 2**30:.2f} GiB")
    return lines.end()


def _agreement(ours: Call, peer: Call) -> str:
    """Three calls: the first may run op by op, the second capture, the third replay."""
    one, two, three = (ours.to_case(tuple(t.clone() for t in ours.forward())) for _ in range(3))
    right = peer.to_case(peer.forward())
    error = relative_error(one[0], right[0])
    if not error <= _LIMIT:
        raise AssertionError(f"off by {error:.1e} from Hugging Face; allowed {_LIMIT:.0e}")
    if not torch.equal(two[0], three[0]):
        raise AssertionError("two calls of one size gave other bits")
    return f"{error:.1e} from Hugging Face, third call {relative_error(three[0], one[0]):.1e} from the first"


def _told(device: Device, run: Run) -> str:
    on_device, host = device.milliseconds(run), host_microseconds(device, run)
    return f"{on_device:.4f} ms, host {host:.0f} us, one call waited for {wall_milliseconds(device, run):.4f} ms"


def steps(device: Device) -> int:
    lines = Lines(width=58)
    for case in _cases("bert_mlm", _STEPS, device):
        args = case.make()
        for provider in (bert_mlm.OURS[0], bert_mlm.PEERS[0]):
            lines.row(f"{case.workload}, {provider.name}", _step, device, case, args, provider)
    return lines.end()


def _step(device: Device, case: Case, args: dict[str, Any], provider: Provider) -> str:
    run = provider.build(case, args).forward
    host = host_microseconds(device, run, calls=10)
    wall = _in_a_row(device, run)
    peak = device.peak_mib(run)
    busy, kernels, _ = _profiled(device, run)
    return (
        f"wall {wall:.2f} ms, host alone {host / 1e3:.2f}, device busy {busy:.2f} in {kernels} kernels and copies, "
        f"memory {peak / 1024:.2f} GiB"
    )


def _in_a_row(device: Device, run: Run, calls: int = 10) -> float:
    """Milliseconds of a call among others that nobody waits for between."""
    calls = 2 if device.is_stand_in else calls
    run()
    device.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    device.synchronize()
    return 1e3 * (time.perf_counter() - start) / calls


def _profiled(device: Device, run: Run) -> tuple[float, int, Any]:
    """Milliseconds of all kernels together, their number, and the profiler's averages by kernel."""
    activity = ProfilerActivity.CPU if device.is_stand_in else ProfilerActivity.CUDA
    time_of: Callable[[Any], float] = lambda row: row.self_cpu_time_total  # noqa: E731
    if not device.is_stand_in:
        time_of = lambda row: row.self_device_time_total  # noqa: E731
    run()
    device.synchronize()
    with profile(activities=[activity]) as recorded:
        run()
        device.synchronize()
    rows = recorded.key_averages()
    busy = sum(time_of(row) for row in rows) / 1e3
    return busy, sum(row.count for row in rows if time_of(row)), rows


def _table(device: Device, case: Case, provider: Provider, order: str) -> str:
    run = provider.build(case, case.make()).forward
    with torch.set_grad_enabled(case.op == "bert_mlm"):
        run()
        busy, count, rows = _profiled(device, run)
    return f"{busy:.3f} ms in {count} kernels and copies\n" + rows.table(
        sort_by=order, row_limit=18, max_name_column_width=70
    )


def kernels(device: Device) -> int:
    lines = Lines()
    order = "self_cpu_time_total" if device.is_stand_in else "self_device_time_total"
    for op, workloads, provider in (("bert", _BERT[1:], bert.OURS[0]), ("bert_mlm", _STEPS[:2], bert_mlm.OURS[0])):
        for case in _cases(op, workloads, device):
            lines.row(f"{op}, {case.workload}", _table, device, case, provider, order)
    return lines.end()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.models")
    parser.add_argument("what", choices=("bert", "step", "kernels"))
    options, device = _device.start(parser, argv)
    return {"bert": bert_calls, "step": steps, "kernels": kernels}[options.what](device)


if __name__ == "__main__":
    sys.exit(main())
