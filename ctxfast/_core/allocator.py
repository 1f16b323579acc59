# SPDX-License-Identifier: Apache-2.0
"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes

# Parameters of glibc's mallopt.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_MOST = (1 << 31) - 1
_STEP = 64 << 20  # bytes that the heap grows by


def keep_freed_memory() -> bool:
    """Have the process keep what it frees for what it allocates next; whether the C library can (glibc can).

    A step of training frees what the next one needs again. By default glibc gives large pieces back to the kernel,
    which hands them out anew, page by page: of ELMo's steps on a CPU that took a fifth of the time (115,000 page faults
    a second, 2026-12-01). For programs that train and end, not for a library: the process never shrinks.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all([mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, _MOST), mallopt(_TOP_PAD, _STEP)])
