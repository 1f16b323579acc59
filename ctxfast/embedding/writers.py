# SPDX-License-Identifier: Apache-2.0
"""Output formats: shards of vectors in, one file out, in constant memory.

Every writer gives the same bytes for the same vectors: no times, no random names. Text in files is UTF-8; what was
not is shown with U+FFFD.
"""

from __future__ import annotations

import io
import json
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
from h5py import h5d, h5p, h5s, h5t  # pyright: ignore[reportAttributeAccessIssue]  # compiled, without stubs

from .._core.extras import need
from .._core.files import create
from .._core.hdf5 import new_hdf5
from .shards import Item, Shard

FORMATS = ("hdf5", "safetensors", "npz", "jsonl", "parquet", "extract-features")
_SUFFIXES = {
    ".hdf5": "hdf5",
    ".h5": "hdf5",
    ".safetensors": "safetensors",
    ".npz": "npz",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
}
# One HDF5 string holds all sentences: HDF5 cannot write it piece by piece.
MAX_INDEX_BYTES = 1 << 30
_COPY_BYTES = 1 << 20
# A row group of Parquet is built in memory.
_GROUP_BYTES = 16 << 20


@dataclass(frozen=True)
class Layout:
    """What the shards hold.

    Attributes:
        shards: gives the shards from the first on, anew at every call.
        texts, rows: numbers of texts and of vectors.
        level: "token" or "sentence".
        depth, dim: shape of a vector's layers.
        is_single: whether the axis of layers is dropped.
        dtype: of the stored numbers.
        layers: numbers of the layers, negative, counted from the top: extract-features names them so.
        facts: words for formats that have a place for them.
    """

    shards: Callable[[], Iterable[Shard]]
    texts: int
    rows: int
    level: str
    depth: int
    dim: int
    is_single: bool
    dtype: np.dtype
    layers: tuple[int, ...]
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def inner(self) -> tuple[int, ...]:
        """Shape of what belongs to one token or text."""
        return (self.dim,) if self.is_single else (self.depth, self.dim)

    def items(self) -> Iterator[Item]:
        for shard in self.shards():
            yield from shard.items()

    def shaped(self, values: np.ndarray) -> np.ndarray:
        """(rows, depth, dim) of a text as users see it: (depth, rows, dim), (rows, dim), (depth, dim) or (dim,)."""
        if self.level == "sentence":
            return values[0, 0] if self.is_single else values[0]
        return values[:, 0] if self.is_single else values.transpose(1, 0, 2)


def format_of(target: Path, name: str | None = None) -> str:
    """The format of an output: ``name``, or what its suffix says.

    Raises:
        ValueError: a suffix that names none, or one that contradicts ``name``.
        RuntimeError: Parquet without pyarrow.
    """
    found = _SUFFIXES.get(target.suffix.lower())
    if name is not None and name not in FORMATS:
        raise ValueError(f"ctxfast.embed: format is {name!r}; expected one of {', '.join(FORMATS)}.")
    chosen = name or found
    if chosen is None:
        raise ValueError(
            f"ctxfast.embed: output {target} ends in {target.suffix!r}; expected {', '.join(_SUFFIXES)}, or a format "
            f"by name (--format)."
        )
    if name not in (None, found) and found is not None and (name, found) != ("extract-features", "jsonl"):
        raise ValueError(f"ctxfast.embed: format is {name!r}, but output {target} ends as {found} does.")
    if chosen == "parquet":
        need("ctxfast.embed", "pyarrow", "Parquet", "parquet")
    return chosen


def write(name: str, path: Path, layout: Layout, **options: Any) -> None:
    """Write the file; ``options``: ``index`` and ``keys`` of HDF5 (see ``_write_hdf5``)."""
    _WRITERS[name](path, layout, **options)


# HDF5


def key_problem(sentence: str) -> str | None:
    """Why HDF5 cannot have a dataset of this name, or None."""
    if not sentence:
        return "it is blank"
    if "/" in sentence:
        return "it holds '/', which HDF5 reads as a path"
    if sentence == ".":
        return "HDF5 reads '.' as a path"
    return "it holds a NUL character" if "\0" in sentence else None


def _write_hdf5(path: Path, layout: Layout, *, index: bool = True, keys: bool = False) -> None:
    """AllenNLP's layout at token level: a dataset a text, named by its line's number (from 0) or, with ``keys``, by the
    text; with ``index`` also ``sentence_to_index``. At sentence level: ``embeddings`` and ``lines``."""
    with new_hdf5(path, libver=("earliest", "v110")) as (file, check):
        if layout.level == "sentence":
            _write_arrays_hdf5(file, layout, check)
            return
        # Half of the time of h5py's own create_dataset goes into what is the same for all of them.
        properties = h5p.create(h5p.DATASET_CREATE)
        properties.set_obj_track_times(False)
        properties.set_fill_time(h5d.FILL_TIME_NEVER)
        kind = h5t.py_create(layout.dtype)
        spaces: dict[tuple[int, ...], h5s.SpaceID] = {}
        for item in layout.items():
            values = np.ascontiguousarray(layout.shaped(item.values))
            space = spaces.get(values.shape)
            if space is None:
                if len(spaces) > 4096:
                    spaces.clear()
                space = spaces[values.shape] = h5s.create_simple(values.shape)
            name = item.text.decode("utf-8", "replace").strip() if keys else str(item.number)
            dataset = h5d.create(file.id, name.encode(), kind, space, properties)
            if values.size:
                dataset.write(h5s.ALL, h5s.ALL, values, kind)
            check()
        if index and not keys:
            table = file.create_dataset("sentence_to_index", (1,), dtype=h5py.string_dtype("utf-8"), track_times=False)
            table[0] = _sentence_index(layout)


def _sentence_index(layout: Layout) -> bytes:
    """{sentence: key} as JSON. A sentence that comes again has its last key, as for readers of repeated names."""
    text = io.BytesIO()
    text.write(b"{")
    for i, item in enumerate(layout.items()):
        sentence = item.text.decode("utf-8", "replace").strip()
        text.write(f'{", " if i else ""}{json.dumps(sentence)}: "{item.number}"'.encode())
        if text.tell() > MAX_INDEX_BYTES:
            raise ValueError(index_too_large())
    text.write(b"}")
    return text.getvalue()


def index_too_large() -> str:
    return (
        f"ctxfast.embed: sentence_to_index would have more than {MAX_INDEX_BYTES >> 20} MiB; HDF5 keeps it as one "
        f"string. Pass --forget-sentences, or choose another format."
    )


def _write_arrays_hdf5(file: h5py.File, layout: Layout, check: Callable[[], None]) -> None:
    vectors = file.create_dataset("embeddings", (layout.texts, *layout.inner), layout.dtype, track_times=False)
    lines = file.create_dataset("lines", (layout.texts,), np.int64, track_times=False)
    start = 0
    for shard in layout.shards():
        count = len(shard.numbers)
        if not count:
            continue
        lines[start : start + count] = shard.numbers
        step = max(_COPY_BYTES // shard.row_bytes, 1)
        with shard.open_values() as values:
            for first in range(start, start + count, step):
                last = min(first + step, start + count)
                block = np.frombuffer(values.read((last - first) * shard.row_bytes), layout.dtype)
                vectors[first:last] = block.reshape(last - first, *layout.inner)
                check()
        start += count


# Flat arrays: safetensors and npz


def _arrays(layout: Layout) -> dict[str, tuple[np.dtype, tuple[int, ...], Callable[[IO[bytes]], None]]]:
    """Name -> dtype, shape, and what writes the numbers."""
    integers = np.dtype("<i8")

    def offsets(out: IO[bytes]) -> None:
        total = 0
        out.write(np.zeros(1, integers).tobytes())
        for shard in layout.shards():
            ends = total + np.cumsum(shard.rows)
            out.write(ends.astype(integers).tobytes())
            total += int(shard.rows.sum())

    def lines(out: IO[bytes]) -> None:
        for shard in layout.shards():
            out.write(shard.numbers.astype(integers).tobytes())

    def embeddings(out: IO[bytes]) -> None:
        for shard in layout.shards():
            with shard.open_values() as values:
                shutil.copyfileobj(values, out, _COPY_BYTES)

    arrays = {
        "lines": (integers, (layout.texts,), lines),
        "embeddings": (layout.dtype, (layout.rows, *layout.inner), embeddings),
    }
    if layout.level == "token":
        arrays = {"offsets": (integers, (layout.texts + 1,), offsets), **arrays}
    return arrays


def _write_safetensors(path: Path, layout: Layout) -> None:
    """``embeddings`` (all tokens, [layers,] dim), ``offsets`` (texts + 1) where each text's tokens begin, ``lines``."""
    names = {"<f4": "F32", "<f2": "F16", "<i8": "I64"}
    arrays = _arrays(layout)
    header: dict[str, Any] = {"__metadata__": layout.facts}
    place = 0
    for name, (dtype, shape, _) in arrays.items():
        end = place + int(np.prod(shape, dtype=object)) * dtype.itemsize
        header[name] = {"dtype": names[dtype.str], "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with create(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, numbers in arrays.values():
            numbers(file)


def _write_npz(path: Path, layout: Layout) -> None:
    """The arrays of ``_write_safetensors``, not compressed."""
    with create(path) as out, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, (dtype, shape, numbers) in _arrays(layout).items():
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            member.external_attr = 0o644 << 16
            with archive.open(member, "w", force_zip64=True) as file:
                header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                numbers(file)


# JSON lines


def _numbers(values: np.ndarray) -> str:
    """An array as JSON, with as many digits as its floats need to come back the same."""
    if values.ndim > 1:
        return "[" + ",".join(map(_numbers, values)) + "]"
    if not np.isfinite(values).all():
        return json.dumps(values.tolist())
    form = "%.9g" if values.dtype.itemsize == 4 else "%.5g"
    return "[" + ",".join([form] * len(values)) % tuple(values.tolist()) + "]"


def _new_text(path: Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(create(path), encoding="utf-8", newline="\n")


def _write_jsonl(path: Path, layout: Layout) -> None:
    """{"index", "text", "tokens", "embedding"} a line; "layers" in place of "embedding" where there are several; tokens
    at token level only."""
    field_name = "embedding" if layout.is_single else "layers"
    with _new_text(path) as file:
        for item in layout.items():
            text = json.dumps(item.text.decode("utf-8", "replace"), ensure_ascii=False)
            tokens = f'"tokens": {item.tokens.decode()}, ' if layout.level == "token" else ""
            numbers = _numbers(layout.shaped(item.values))
            file.write(f'{{"index": {item.number}, "text": {text}, {tokens}"{field_name}": {numbers}}}\n')


def _write_extract_features(path: Path, layout: Layout) -> None:
    """Google's extract_features.py: tokens with [CLS] and [SEP], layers counted from the top, six decimals."""
    with _new_text(path) as file:
        for item in layout.items():
            features = []
            for token, vectors in zip(json.loads(item.tokens), item.values):
                layers = [
                    {"index": layer, "values": [round(number, 6) for number in vector]}
                    for layer, vector in zip(layout.layers, vectors.tolist())
                ]
                features.append({"token": token, "layers": layers})
            file.write(json.dumps({"linex_index": item.number, "features": features}) + "\n")


# Parquet


def _write_parquet(path: Path, layout: Layout) -> None:
    """A row a text: index, text, embedding (flat, row-major); at token level also tokens and shape."""
    import pyarrow
    from pyarrow import parquet

    number = pyarrow.float32() if layout.dtype.itemsize == 4 else pyarrow.float16()
    columns = {"index": pyarrow.int64(), "text": pyarrow.string()}
    if layout.level == "token":
        columns["tokens"] = pyarrow.list_(pyarrow.string())
        columns["shape"] = pyarrow.list_(pyarrow.int64())
    columns["embedding"] = pyarrow.list_(number)
    schema = pyarrow.schema(list(columns.items()), metadata={f"ctxfast.{k}": v for k, v in layout.facts.items()})

    def table(items: list[Item]) -> Any:
        shaped = [layout.shaped(item.values) for item in items]
        flat = np.concatenate([values.ravel() for values in shaped])
        ends = np.cumsum([0, *(values.size for values in shaped)])
        data: dict[str, Any] = {
            "index": [item.number for item in items],
            "text": [item.text.decode("utf-8", "replace") for item in items],
            "embedding": pyarrow.ListArray.from_arrays(ends.astype(np.int32), pyarrow.array(flat, number)),
        }
        if layout.level == "token":
            data["tokens"] = [json.loads(item.tokens) for item in items]
            data["shape"] = [list(values.shape) for values in shaped]
        return pyarrow.table({name: data[name] for name in columns}, schema=schema)

    with create(path) as out, parquet.ParquetWriter(out, schema, use_dictionary=False, compression="zstd") as writer:
        group: list[Item] = []
        size = 0
        for item in layout.items():
            group.append(item)
            size += item.values.nbytes + len(item.text) + len(item.tokens)
            if size >= _GROUP_BYTES:
                writer.write_table(table(group))
                group, size = [], 0
        if group:
            writer.write_table(table(group))


_WRITERS: dict[str, Callable[..., None]] = {
    "hdf5": _write_hdf5,
    "safetensors": _write_safetensors,
    "npz": _write_npz,
    "jsonl": _write_jsonl,
    "extract-features": _write_extract_features,
    "parquet": _write_parquet,
}
