# SPDX-License-Identifier: Apache-2.0
"""Dropout of attention weights from a counter: every kernel draws the same mask, and none stores it.

The counter is (query, key, sequence and head, offset), the generator Philox4x32 with 7 rounds, the fewest that pass
BigCrush (Salmon et al. 2011).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..shared.triton_rows import ROUNDS, reaches


@triton.jit
def is_kept(seeds, pair, first_query, query, first_key, key, threshold):
    """Which weights stay: 16 random bits each, kept where they reach ``threshold``.

    A tile's queries are ``first_query + query`` and its keys ``first_key + key``, indices inside the sequence; both
    firsts are multiples of 16, ``query`` and ``key`` are ranges from 0 that broadcast to the tile. One draw of 128 bits
    serves the eight weights whose indices differ in bit 3 of the query and bits 3 and 0 of the key: in the accumulator
    layout of mma these lie in one thread, so the compiler draws once for them (a transposed tile finds four of the
    eight). It sees that only while no loop's variable stands inside the shifts, which is why firsts come apart.
    """
    seed, offset = tl.load(seeds), tl.load(seeds + 1)
    rows = first_query // 2 + (query >> 4) * 8 + (query & 7)
    columns = first_key // 4 + (key >> 4) * 4 + ((key & 7) >> 1)
    first, second, third, fourth = tl.philox(seed, rows, columns, pair, offset.to(tl.int32), ROUNDS)
    return reaches(first, second, third, fourth, key & 8, query & 8, key & 1, threshold)
