# SPDX-License-Identifier: Apache-2.0
"""HDF5 files to write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from .files import LatchedFile


@contextmanager
def new_hdf5(path: Path, **options: Any) -> Iterator[tuple[h5py.File, Callable[[], None]]]:
    """A new HDF5 file, and a function that raises what the disk has said so far; call it in long loops.

    Args:
        path: of the file; what had the name is removed.
        options: of ``h5py.File``.

    Raises:
        OSError: the file cannot be written; the path is named.
    """
    with LatchedFile(path) as disk:
        try:
            with h5py.File(disk, "w", **options) as file:
                yield file, disk.check
        except Exception:
            disk.check()  # HDF5's own error about an incomplete file says nothing more
            raise
        disk.check()
