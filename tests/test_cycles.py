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


@pytest.fixture(scope="module")
def code() -> sass.Code:
    nvcc, _ = toolchain.find_nvcc(os.environ)
    if nvcc is None or sass.find_nvdisasm(nvcc) is None or shutil.which("c++") is None:
        pytest.skip("needs nvcc and nvdisasm")
    (only,) = sass.compile_kernels(KERNEL).values()
    return only


def _lane(code: sass.Code, thread: int, steps: int = 5, divisor: int = 40) -> sass.Lane:
    constants = {0: 64, 0x28: 0, 0x208: 0, 0x20C: 0, 0x210: steps, 0x214: divisor, 0x218: 1 << 20, 0x21C: 0x7F00}
    return sass.Lane(code, constants, thread, 0, 0)


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
    lane = _lane(code, thread)
    trace = lane.run()
    stores = [one for one in trace if sass.is_publication(one) and "skipped" not in one.text]
    cleared = [one.address in lane.clears for one in stores]
    assert cleared == ([False] * 5 if publishes else [True] * 4)
    assert not lane.unknown
    assert sum(one.base == "BAR" for one in trace) == 5


def test_a_step_takes_the_exchange_and_little_more(code: sass.Code) -> None:
    lanes = [_lane(code, 1), _lane(code, 41)]
    steps = cycles.one_step([lane.run() for lane in lanes])
    clears = lanes[0].clears | lanes[1].clears
    assert all(sum(one.base == "BAR" for one in step) == 1 for step in steps)
    assert cycles.EXCHANGE < cycles.simulate(steps, clears).cycles < cycles.EXCHANGE + 400
