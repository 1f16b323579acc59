# SPDX-License-Identifier: Apache-2.0
"""Estimates, without a GPU, the cycles of one step of a persistent kernel between its synchronising instructions.

    python csrc/cycles.py [--batch 8 16 32] [--alone] [--warps]    ELMo's layer forwards: 4096 cells, 512 projected

``sass.py`` disassembles a cubin for sm_90a, ``lane.py`` follows one lane of each warp of a scheduler through some
steps. One step of theirs is then issued as one scheduler would: one instruction a cycle, pipes with a
throughput, scoreboards, barriers. A poll is answered ``EXCHANGE`` cycles after the store that it waits for, or
``NEIGHBOUR`` cycles where a block of the same cluster stores into its shared memory.

What comes out is an estimate, good for comparing two versions of a kernel; where it stands against the prototype that
ran on an H100, docs/cycles.md says. It knows nothing of instruction caches, bank conflicts, divergence within a warp,
and other blocks' being late.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import sys
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from lane import Lane
from sass import PARAMETERS, Instruction, compile_kernels, is_poll, is_publication, is_sent

# Cycles until a result is there, beside what its control bits say, by the first word of the instruction.
LATENCY = {"LDS": 30, "LDSM": 33, "LDC": 40, "S2R": 25, "S2UR": 30, "MUFU": 22, "I2F": 22, "F2I": 22, "SHFL": 26,
           "LDG": 500, "HMMA": 33, "VOTE": 12, "R2UR": 12, "STS": 20, "STG": 20, "STL": 20}  # fmt: skip
FENCE = 500  # MEMBAR at the scope of the GPU: until earlier stores are acknowledged
L2_BYTES = 16  # a cycle and scheduler: 64 of a multiprocessor
EXCHANGE = 1400  # from a store to its arrival in another block that polls: 0.7 us measured on an H100
NEIGHBOUR = 500  # the same between two blocks of a cluster; 180 is the published latency of a load there, 1,584 a bound
# HGMMA of a warp, by its columns: the prototype's gates took 2,230 cycles at 8 columns, 2,860 at 32, 128 of them.
WGMMA = {8: 17, 16: 18, 32: 22, 64: 40}


# ---- one step of the kernel


def one_step(traces: Sequence[Sequence[Instruction]]) -> list[list[Instruction]]:
    """Of each warp one round of the loop that all run and whose rounds are longest: the last but one, for the last may
    reach into the last step, which also stores the state."""

    def rounds(trace: Sequence[Instruction]) -> dict[int, list[int]]:
        places: dict[int, list[int]] = {}
        for at in range(1, len(trace)):
            if trace[at].address < trace[at - 1].address:
                places.setdefault(trace[at].address, []).append(at)
        return {head: starts for head, starts in places.items() if len(starts) > 2}

    heads = [rounds(trace) for trace in traces]
    shared = set.intersection(*map(set, heads))
    head = max(shared, key=lambda head: ((heads[0][head][-1] - heads[0][head][0]) // (len(heads[0][head]) - 1), -head))
    return [list(trace[of[head][-3] : of[head][-2]]) for trace, of in zip(traces, heads)]


def pipe(one: Instruction) -> tuple[str, int]:
    """What an instruction occupies and for how many cycles of a scheduler."""
    base, name = one.base, one.name
    if base == "HMMA":
        return "tensor", 8
    if base in ("MUFU", "I2F", "F2I"):
        return "special", 8
    if base in ("LDS", "STS", "LDSM"):  # the four schedulers share 128 bytes a cycle
        return "shared", 4 * (4 if ".128" in name or base == "LDSM" else 2 if ".64" in name else 1)
    if base in ("LDG", "ST", "STG", "LDC", "ATOM"):
        return "shared", 2
    if base == "SHFL":
        return "shared", 4
    if base in (
        "IMAD",
        "LEA",
        "LOP3",
        "IADD3",
        "ISETP",
        "SHF",
        "SEL",
        "PRMT",
        "VIADD",
        "VIMNMX",
        "VIMNMX3",
        "FSETP",
        "FSEL",
    ):
        return "integer", 2
    return "", 1


@dataclass
class Timeline:
    cycles: int  # a step
    issued: list[list[int]]  # by warp: the cycle of each instruction of the step


def simulate(
    warps: Sequence[Sequence[Instruction]],
    clears: Set[int],
    takes: Set[int] = frozenset(),
    neighbour: int = NEIGHBOUR,
    rounds: int = 3,
) -> Timeline:
    """The last of some rounds in which one scheduler issues these warps' steps.

    clears: addresses of stores that empty what was published; takes: of loads of what the cluster's other block sends,
    ``neighbour`` cycles before.
    """
    n = len(warps)
    traces = [list(warp) * rounds for warp in warps]
    at, ready, issued = [0] * n, [0] * n, [[] for _ in warps]
    boards = [[0] * 6 for _ in warps]
    stores, tensor_done = [0] * n, [0] * n
    free: dict[str, int] = {}
    waiting: dict[str, list[int]] = {}
    expected = {}
    for barrier in {one.text for warp in warps for one in warp if one.base == "BAR"}:
        expected[barrier] = sum(any(one.text == barrier for one in warp) for warp in warps)
    published = 0  # when the last publication, of any warp, has arrived
    arrivals: list[int] = []  # of what is sent to the cluster's other block, and comes from it at the same time
    taken = 0
    now, last = 0, -1
    blocked = [False] * n
    while any(at[w] < len(traces[w]) for w in range(n)):
        if now > 1_000_000:
            raise RuntimeError("the warps wait for one another at different barriers")
        for turn in range(n):
            w = (last + 1 + turn) % n
            if at[w] == len(traces[w]) or blocked[w] or ready[w] > now:
                continue
            one = traces[w][at[w]]
            if any(one.waits >> board & 1 and boards[w][board] > now for board in range(6)):
                continue
            if one.address in takes and taken == len(arrivals):
                continue
            kind, busy = pipe(one)
            if kind and free.get(kind, 0) > now:
                continue
            if one.base == "WARPGROUP" and "DEPBAR" in one.name and tensor_done[w] > now:
                continue
            if one.base in ("MEMBAR", "ERRBAR") and ".CTA" not in one.name and stores[w] > now:
                continue
            if kind:
                free[kind] = now + busy
            done = now + LATENCY.get(one.base, 6) + (busy if one.base in ("LDS", "LDSM") else 0)
            if one.base == "HGMMA":
                columns = int(re.search(r"64x(\d+)x16", one.name)[1])
                free["wgmma"] = max(free.get("wgmma", 0), now) + WGMMA[columns]
                done = tensor_done[w] = free["wgmma"] + 60
            if one.base == "LDG":
                width = 16 if ".128" in one.name else 8 if ".64" in one.name else 4
                free["l2"] = max(free.get("l2", 0), now) + 32 * width // L2_BYTES
                done = max(done, free["l2"])
                if is_poll(one):
                    done = max(done, published)
            if is_publication(one) and one.address not in clears:
                published = now + EXCHANGE
            if is_sent(one):
                arrivals.append(now + neighbour)
            if one.address in takes:
                done = max(done, arrivals[taken])
                taken += 1
            if one.base == "STG":
                stores[w] = now + FENCE
            if one.write is not None:
                boards[w][one.write] = max(boards[w][one.write], done)
            if one.read is not None:
                boards[w][one.read] = max(boards[w][one.read], now + 12)
            ready[w] = now + max(1, one.stall)
            issued[w].append(now)
            at[w] += 1
            last = w
            if one.base == "BAR":
                here = waiting.setdefault(one.text, [])
                here.append(w)
                blocked[w] = True
                if len(here) == expected[one.text]:
                    for other in here:
                        blocked[other] = False
                        ready[other] = max(ready[other], now + 20)
                    here.clear()
            break
        now += 1
    starts = [times[-len(warp) :][0] for times, warp in zip(issued, warps)]
    before = [times[-2 * len(warp) :][0] for times, warp in zip(issued, warps)]
    return Timeline(max(starts) - max(before), [times[-len(warp) :] for times, warp in zip(issued, warps)])


# ---- the forward recurrence of ELMo's layer


class Tensors(ctypes.Structure):
    """lstm_forward::Tensors of csrc/lstm/persistent_forward_parts.cuh: what a kernel for constant sizes is given."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("batch", "steps", "directions")),
        *((name, ctypes.c_uint64 * 2) for name in ("weight_hh", "hh_stride", "weight_proj", "proj_stride", "gates")),
        ("gates_strides", ctypes.c_uint32 * 4),
        *((name, ctypes.c_uint64) for name in ("lengths", "h_0", "c_0")),
        *((name, ctypes.c_float) for name in ("cell_clip", "proj_clip")),
        ("output", ctypes.c_uint64),
        ("output_strides", ctypes.c_uint32 * 2),
        *((name, ctypes.c_uint64) for name in ("h_n", "c_n", "cells", "h_slots", "m_slots")),
    ]


STEPS = 6


def elmo_constants(batch: int) -> dict[int, int]:
    """Constant bank 0 as the kernel of both directions finds it: no lengths, no states, cells not wanted."""
    address = iter(range(0x7F0000000000, 0x7F1000000000, 1 << 32))
    tensors = Tensors(batch=batch, steps=STEPS, directions=2, cell_clip=3, proj_clip=3)
    for name in ("weight_hh", "weight_proj", "gates"):
        getattr(tensors, name)[:] = [next(address), next(address)]
    tensors.hh_stride[:], tensors.proj_stride[:] = [512] * 2, [4096] * 2
    tensors.gates_strides[:] = [STEPS * 8192, 8192] * 2
    tensors.output_strides[:] = [STEPS * 128, 128]
    for name in ("output", "h_n", "c_n", "h_slots", "m_slots"):
        setattr(tensors, name, next(address))
    raw = bytes(tensors)
    constants = {PARAMETERS + at: int.from_bytes(raw[at : at + 4], "little") for at in range(0, len(raw), 4)}
    return constants | {0: 512, 0x28: 0xFFFFF0, 0x140: 1, 0x208: 0, 0x20C: 0}  # 0x140: launched in clusters


ELMO = """
#include "lstm/persistent_forward.cuh"
using namespace ctxfast::lstm_forward;
template __global__ void ctxfast::lstm_forward::lstm_persistent_forward_kernel<
    __half, {tiles}, true, {registers}, {pairs}, ElmoSizes<{tiles}, {pairs}>>(
    const __grid_constant__ KernelParams<ElmoSizes<{tiles}, {pairs}>>);
"""


def landmarks(step: Sequence[Instruction], clears: Set[int], takes: Set[int]) -> dict[str, int]:
    """Name of a synchronising instruction, counted -> its place in a step; of loads in a row the first."""
    found: dict[str, int] = {}
    counts: dict[str, int] = {}
    before = ""
    for at, one in enumerate(step):
        name = "asks" if is_poll(one) else "barrier" if one.base == "BAR" else ""
        name = "products done" if "DEPBAR" in one.name else name
        if is_publication(one) and one.address not in clears:
            name = "publishes"
        if is_sent(one) or one.address in takes:
            name = "sends" if is_sent(one) else "takes"
        if name and not (name == before == "asks"):
            counts[name] = counts.get(name, 0) + 1
            found[f"{name} {counts[name]}"] = at
        before = name if name or one.base != "LDG" else before
    return found


def estimate(batch: int, in_pairs: bool, neighbour: int, show_warps: bool) -> None:
    tiles = 1 if batch <= 8 else 2 if batch <= 16 else 4
    words = dict(tiles=tiles, registers=str(tiles > 1).lower(), pairs=str(in_pairs).lower())
    ((_, code),) = compile_kernels(ELMO.format(**words)).items()

    lanes: dict[int, Lane] = {}
    traces: dict[int, list[Instruction]] = {}
    for warp in (12, 8, 4, 0):  # warp 4 sends to where warp 0 of the cluster's other block awaits it
        awaited = lanes[4].sent if warp == 0 else frozenset()
        lanes[warp] = Lane(code, elmo_constants(batch), 32 * warp + 1, 4, STEPS, awaited)
        traces[warp] = lanes[warp].run()
    for text in {text for lane in lanes.values() for text in lane.unknown}:
        print(f"taken as not taken, for it depends on what is unknown: {text}")
    steps = one_step([traces[warp] for warp in sorted(traces)])
    clears = set.union(*(lane.clears for lane in lanes.values()))
    takes = set.union(*(lane.takes for lane in lanes.values()))
    timeline = simulate(steps, clears, takes, neighbour)
    places = [landmarks(step, clears, takes) for step in steps]
    counts = [len(step) for step in steps]
    how = " in pairs" if in_pairs else ""
    print(f"batch {batch}{how}: {timeline.cycles} cycles a step; {counts} instructions of four warps")
    start = min(issued[0] for issued in timeline.issued)
    for name in dict.fromkeys(name for of in places for name in of):
        at = [of.get(name) for of in places]
        when = ["" if i is None else timeline.issued[w][i] - start for w, i in enumerate(at)]
        if show_warps:
            print(f"  {name:<20}" + "".join(f"{cycle:>8}" for cycle in when))
        else:
            print(f"  {name:<20}{max(cycle for cycle in when if cycle != ''):>8}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 16, 32], help="rows, 1 to 32")
    parser.add_argument("--neighbour", type=int, default=NEIGHBOUR, help="cycles between two blocks of a cluster")
    parser.add_argument("--alone", action="store_true", help="blocks alone, where they would run in pairs")
    parser.add_argument("--warps", action="store_true", help="each of the four warps, not the last of them")
    options = parser.parse_args()
    try:
        for batch in options.batch:
            estimate(batch, batch > 16 and not options.alone, options.neighbour, options.warps)
    except RuntimeError as error:
        raise SystemExit(f"cycles: {error}.") from None


if __name__ == "__main__":
    main()
