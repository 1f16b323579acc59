# SPDX-License-Identifier: Apache-2.0
"""The decoder and interpreter of Hopper's machine code, and the scheduler, on a kernel compiled here."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "csrc"))

import cycles
import lane
import sass
import toolchain

KERNEL = """
#include <cstdint>
struct Params { int steps, divisor; uint32_t* to; };
__global__ void __launch_bounds__(64, 1) walk(const __grid_constant__ Params p) {
  for (int step = 0; step < p.steps; ++step) {
    uint32_t seen;
    do {
      asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(p.to + step) : "memory");
    } while (seen == 0xFFFFFFFFu);
    __syncthreads();
    if (static_cast<int>(threadIdx.x) / p.divisor == 1)
      asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p.to + step + 1), "r"(seen) : "memory");
    else if (step > 0)
      asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p.to + step - 1), "r"(0xFFFFFFFFu) : "memory");
  }
}
"""


PAIR = """
#include <cstdint>
struct Params { int steps; };
__global__ void __launch_bounds__(64, 1) pair(const __grid_constant__ Params p) {
  __shared__ uint2 place[64];
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(&place[threadIdx.x & 31]));
  for (int step = 0; step < p.steps; ++step) {
    __syncthreads();
    if (threadIdx.x >= 32) {
      asm volatile("{ .reg .u32 there; mapa.shared::cluster.u32 there, %0, 1;"
                   "st.relaxed.cluster.shared::cluster.v2.u32 [there], {%1, %1}; }" ::"r"(at), "r"(step) : "memory");
    } else {
      uint2 seen;
      do {
        asm volatile("ld.relaxed.cluster.shared.v2.u32 {%0, %1}, [%2];" : "=r"(seen.x), "=r"(seen.y) : "r"(at)
                     : "memory");
      } while (seen.x == 0xFFFFFFFFu || seen.y == 0xFFFFFFFFu);
    }
  }
}
"""


def _compiled(source: str) -> sass.Code:
    nvcc, _ = toolchain.find_nvcc(os.environ)
    if nvcc is None or sass.find_nvdisasm(nvcc) is None or shutil.which("c++") is None:
        pytest.skip("needs nvcc and nvdisasm")
    (only,) = sass.compile_kernels(source).values()
    return only


@pytest.fixture(scope="module")
def code() -> sass.Code:
    return _compiled(KERNEL)


def _lane(code: sass.Code, thread: int, steps: int = 5, divisor: int = 40) -> lane.Lane:
    constants = {0: 64, 0x28: 0, 0x208: 0, 0x20C: 0, 0x210: steps, 0x214: divisor, 0x218: 1 << 20, 0x21C: 0x7F00}
    return lane.Lane(code, constants, thread, 0, 0)


def test_control_bits() -> None:
    # ISETP behind six cycles of fixed latency; an LDS that sets scoreboard 1 and waits for 0 and 5.
    assert sass.decode(13 << 41 | 7 << 46 | 7 << 49) == (0, None, None, 13)
    assert sass.decode(2 << 41 | 1 << 46 | 7 << 49 | 0b100001 << 52) == (0b100001, None, 1, 2)


def test_every_instruction_has_control_bits(code: sass.Code) -> None:
    assert len(code.instructions) > 20
    assert all(0 <= one.stall <= 15 and 0 <= one.waits < 64 for one in code.instructions)
    loads = [one for one in code.instructions if sass.is_poll(one)]
    assert loads and all(one.write is not None for one in loads)  # else nobody could wait for what they bring


@pytest.mark.parametrize(("thread", "publishes"), [(1, False), (39, False), (40, True), (63, True)])
def test_branches_are_the_real_ones(code: sass.Code, thread: int, publishes: bool) -> None:
    """That one depends on a quotient, which the machine finds by way of floats."""
    followed = _lane(code, thread)
    trace = followed.run()
    stores = [one for one in trace if sass.is_publication(one) and "skipped" not in one.text]
    cleared = [one.address in followed.clears for one in stores]
    assert cleared == ([False] * 5 if publishes else [True] * 4)
    assert not followed.unknown
    assert sum(one.base == "BAR" for one in trace) == 5


def test_a_step_takes_the_exchange_and_little_more(code: sass.Code) -> None:
    lanes = [_lane(code, 1), _lane(code, 41)]
    steps = cycles.one_step([each.run() for each in lanes])
    clears = lanes[0].clears | lanes[1].clears
    assert all(sum(one.base == "BAR" for one in step) == 1 for step in steps)
    assert cycles.EXCHANGE < cycles.simulate(steps, clears).cycles < cycles.EXCHANGE + 400


def test_a_block_of_a_cluster_waits_for_the_other() -> None:
    """What one warp sends, the other takes at the same place of its own shared memory, so many cycles later."""
    code, constants = _compiled(PAIR), {0: 64, 0x28: 0, 0x208: 0, 0x20C: 0, 0x210: 5}
    sender = lane.Lane(code, constants, 33, 0, 0)
    traces = [sender.run()]
    taker = lane.Lane(code, constants, 1, 0, 0, sender.sent)
    traces.insert(0, taker.run())
    assert len(sender.sent) == 1 and taker.takes and not taker.unknown
    steps = cycles.one_step(traces)
    short, long = (cycles.simulate(steps, set(), taker.takes, neighbour).cycles for neighbour in (400, 1400))
    assert 400 < short < 600 and long - short == 1000
