# SPDX-License-Identifier: Apache-2.0
"""HDF5 weight files: what a file says of its datasets is checked before any number is read.

HDF5 lets a dataset lie in another file, be assembled from others, be larger than what is stored of it, or be unpacked
by a program that the library looks for. Weights need none of this, and a file from somewhere must not be able to read
another file of the machine, or fill its memory.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np
from h5py import h5d, h5z  # pyright: ignore[reportAttributeAccessIssue]  # compiled, without stubs

from ..._core.reading import check_growth

# The longest name of a weight has six parts, the largest model about a hundred weights.
_DEEPEST, _MOST_DATASETS, _MOST_CHUNKS = 8, 10_000, 100_000
# What belongs to the model: a dataset in there that the options know nothing of is an error, not an extra.
_OWN = ("char_embed", "CNN", "CNN_proj", "RNN_0", "RNN_1")
_OWN_PREFIX = "CNN_high_"
_FILTERS = (h5z.FILTER_DEFLATE, h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32)
_REPACK = "Copy the numbers into one plain file (h5repack -f NONE)"


def find_datasets(file: h5py.File, path: Path, who: str) -> tuple[dict[str, h5py.Dataset], list[str]]:
    """The datasets in the groups of an ELMo model, by name, and the names of what else stands at the top of the file.

    Raises:
        ValueError: a link instead of a dataset, a loop of groups.
    """
    found: dict[str, h5py.Dataset] = {}
    others = []
    groups: list[tuple[str, h5py.Group]] = [("", file)]
    count = 0
    while groups:
        prefix, group = groups.pop()
        for key in map(str, group):
            name = prefix + key
            if not prefix and key not in _OWN and not key.startswith(_OWN_PREFIX):
                others.append(name)
                continue
            count += 1
            if count > _MOST_DATASETS or name.count("/") >= _DEEPEST:
                raise ValueError(f"{who}: {path} has more or deeper groups, at {name}, than any model; is it damaged?")
            link = group.get(key, getlink=True)
            if not isinstance(link, h5py.HardLink):
                place = f" to {link.filename}" if isinstance(link, h5py.ExternalLink) else ""
                kind = "an external" if place else "a soft"
                raise ValueError(f"{who}: {name} in {path} is {kind} link{place}; expected a dataset. {_REPACK}.")
            item = group[key]
            if isinstance(item, h5py.Group):
                groups.append((f"{name}/", item))
            elif isinstance(item, h5py.Dataset):
                found[name] = item
            else:
                raise ValueError(f"{who}: {name} in {path} is a {type(item).__name__}; expected a dataset.")
    return found, others


def read_datasets(
    datasets: Mapping[str, h5py.Dataset], expected: Mapping[str, tuple[int, ...]], path: Path, who: str
) -> dict[str, np.ndarray]:
    """The arrays named in ``expected``, once all of them have the shape there, are floating point and lie in the file.

    Raises:
        ValueError: another shape; numbers outside the file, never written, packed by an unknown filter, or packed so
            that few bytes become many.
        TypeError: not floating point.
    """
    size = stored = 0
    for name, shape in expected.items():
        made, kept = _check_dataset(datasets[name], name, shape, path, who)
        size, stored = size + made, stored + kept
    check_growth(size, min(stored, path.stat().st_size), who, path)
    return {name: datasets[name][...] for name in expected}


def _check_dataset(dataset: h5py.Dataset, name: str, shape: tuple[int, ...], path: Path, who: str) -> tuple[int, int]:
    """Bytes of memory that reading takes, and bytes in the file."""
    if dataset.shape != shape:
        raise ValueError(
            f"{who}: {name} in {path} has shape {dataset.shape}; expected {shape} by the options. Does options.json "
            f"belong to this file?"
        )
    try:
        dtype = dataset.dtype
    except (TypeError, ValueError) as error:  # of HDF5's, NumPy knows some only
        raise TypeError(f"{who}: {name} in {path} has a dtype without counterpart in NumPy ({error}).") from error
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise TypeError(f"{who}: {name} in {path} has dtype {dtype}; expected floating point.")
    plan = dataset.id.get_create_plist()
    if plan.get_layout() == h5d.VIRTUAL or plan.get_external_count():
        raise ValueError(f"{who}: {name} in {path} stores its data in other files; expected it here. {_REPACK}.")
    filters = [plan.get_filter(k)[0] for k in range(plan.get_nfilters())]
    if any(code not in _FILTERS for code in filters) or filters.count(h5z.FILTER_DEFLATE) > 1:
        raise ValueError(
            f"{who}: {name} in {path} is packed by HDF5's filters {filters}; expected none, gzip, shuffle or "
            f"fletcher32. {_REPACK}."
        )
    size, stored = dtype.itemsize * math.prod(shape), dataset.id.get_storage_size()
    if not filters and stored < size:
        raise ValueError(f"{who}: {name} in {path} has {stored} of its {size} bytes; the rest was never written.")
    if not filters or not dataset.chunks:
        return size, stored
    # A chunk may be larger than the dataset, and is unpacked whole.
    chunk = dtype.itemsize * math.prod(dataset.chunks)
    check_growth(chunk, stored, who, path)
    _check_chunks(dataset, name, chunk, h5z.FILTER_DEFLATE in filters, path, who)
    return max(size, chunk), stored


def _check_chunks(dataset: h5py.Dataset, name: str, size: int, is_deflated: bool, path: Path, who: str) -> None:
    """Refuse chunks that hold more than they should: the library unpacks to the end, however far that is."""
    assert dataset.chunks is not None
    starts = [range(0, length, step) for length, step in zip(dataset.shape, dataset.chunks)]
    bad = math.prod(map(len, starts)) > _MOST_CHUNKS
    for offset in () if bad else itertools.product(*starts):
        packed = dataset.id.get_chunk_info_by_coord(offset)
        bad = packed.byte_offset is None or packed.size > size + size // 100 + 1024
        if is_deflated and not bad:
            _, raw = dataset.id.read_direct_chunk(offset)
            bad = len(zlib.decompressobj().decompress(raw, size + 1)) > size
        if bad:
            break
    if bad:
        raise ValueError(f"{who}: the chunks of {name} in {path} do not hold what it says; the file is damaged.")
