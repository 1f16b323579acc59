# SPDX-License-Identifier: Apache-2.0
"""Reads TensorFlow's tensor-bundle checkpoints (PREFIX.index, PREFIX.data-?????-of-?????).

TensorFlow itself is not needed. The index is a LevelDB table whose values are protocol-buffer
messages (BundleHeaderProto under the empty key, BundleEntryProto under a variable's name); the
data files hold the tensors' bytes one after another.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..._core.reading import reading

_MAGIC = 0xDB4775248B80FB57
_FOOTER_BYTES = 48
_TRAILER_BYTES = 5  # one byte of compression kind, four of checksum
_NO_COMPRESSION, _SNAPPY = 0, 1
_CRC_POLYNOMIAL = 0x82F63B78  # Castagnoli, bits reversed
_CRC_MASK_DELTA = 0xA282EAD8
_CRC_LANES = 16384
_WHO = "ctxfast.TensorBundle"
_WHAT = "index of a TensorFlow checkpoint"
# BERT-Large has 1,200 variables with its optimiser's, in an index of 50 KB. More than this is damage, and would take
# long to go through.
_MOST_BYTES, _MOST_VARIABLES, _MOST_BLOCKS, _MOST_DIMS, _LONGEST_NAME = 4 << 20, 100_000, 10_000, 64, 4096

# TensorFlow's DataType numbers. bfloat16 (14) is read as raw 16-bit words and widened.
_BFLOAT16 = 14
_DTYPES = {
    1: np.dtype("<f4"),
    2: np.dtype("<f8"),
    3: np.dtype("<i4"),
    4: np.dtype("u1"),
    5: np.dtype("<i2"),
    6: np.dtype("i1"),
    9: np.dtype("<i8"),
    10: np.dtype("?"),
    _BFLOAT16: np.dtype("<u2"),
    17: np.dtype("<u2"),
    19: np.dtype("<f2"),
    22: np.dtype("<u4"),
    23: np.dtype("<u8"),
}
_DTYPE_NAMES = {7: "string", 8: "complex64", 18: "complex128", 20: "resource", 21: "variant"}


@dataclasses.dataclass(frozen=True)
class Variable:
    """One tensor of a checkpoint: its name, shape and NumPy dtype name ("bfloat16" included)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    dtype_code: int
    shard: int
    offset: int
    size: int
    crc32c: int | None
    is_sliced: bool


class TensorBundle:
    """A TensorFlow 1 or 2 checkpoint in bundle ("V2") format, read lazily.

    Args:
        prefix: path before ".index"; the path of the index or of a data file also does.
        verify: check the CRC-32C of every block of the index and of every tensor read.

    Raises:
        FileNotFoundError: the index or one of its data files is absent.
        ValueError: the file is not a bundle (the single-file "V1" format is named as such), is cut
            short or damaged, or was written on a big-endian machine.

    Reference: the public format of TensorFlow's tensor_bundle and of LevelDB's tables.
    """

    def __init__(self, prefix: str | os.PathLike[str], *, verify: bool = True) -> None:
        self.prefix = bundle_prefix(prefix)
        self.verify = verify
        index = self.prefix.with_name(self.prefix.name + ".index")
        if not index.is_file():
            if self.prefix.is_file():
                raise ValueError(
                    f"{_WHO}: {self.prefix} has no {index.name} beside it; a single-file "
                    "checkpoint (TensorFlow's V1 format) is not supported. Save it again with "
                    "tf.compat.v1.train.Saver(write_version=2)"
                )
            raise FileNotFoundError(f"{_WHO}: {index} does not exist")
        self.index_path = index
        self._maps: dict[int, mmap.mmap] = {}
        self._variables: dict[str, Variable] = {}
        self.num_shards = 0
        with reading(index, _WHO, _WHAT):
            for key, value in _read_table(index, verify):
                if not key:
                    self._read_header(value)
                # Slices of a partitioned variable have keys that start with a NUL byte.
                elif not key.startswith(b"\0"):
                    name = key.decode("utf-8")
                    self._variables[name] = _parse_entry(name, value)
        if not self.num_shards:
            raise ValueError(f"{_WHO}: {index} has no bundle header; it is not a TensorFlow checkpoint")
        for shard in sorted({v.shard for v in self._variables.values()}):
            if not self.shard_path(shard).is_file():
                raise FileNotFoundError(f"{_WHO}: {self.shard_path(shard)} does not exist, but {index.name} names it")

    def _read_header(self, value: bytes) -> None:
        fields = dict(_fields(value))
        self.num_shards = _number(fields.get(1, 0))
        if fields.get(2, 0) != 0:
            raise ValueError(f"{_WHO}: {self.index_path} was written on a big-endian machine")

    def shard_path(self, shard: int) -> Path:
        """Path of data file number `shard`."""
        return self.prefix.with_name(f"{self.prefix.name}.data-{shard:05d}-of-{self.num_shards:05d}")

    @property
    def files(self) -> list[Path]:
        """The index and every data file that holds a variable."""
        shards = sorted({v.shard for v in self._variables.values()})
        return [self.index_path, *(self.shard_path(shard) for shard in shards)]

    def variables(self) -> list[Variable]:
        """All variables in the order of the index (sorted by name)."""
        return list(self._variables.values())

    def names(self) -> list[str]:
        """Names of all variables, sorted."""
        return list(self._variables)

    def __contains__(self, name: str) -> bool:
        return name in self._variables

    def read(self, name: str) -> np.ndarray:
        """Returns variable `name` as a new array; bfloat16 comes as float32, which is exact.

        Raises:
            KeyError: no such variable.
            TypeError: a dtype without a NumPy counterpart here (strings, resources).
            ValueError: the data is cut short, its checksum is wrong, or the variable is partitioned into slices.
        """
        if name not in self._variables:
            raise KeyError(f"{_WHO}: {self.index_path} has no variable {name!r}")
        variable = self._variables[name]
        if variable.is_sliced:
            raise ValueError(
                f"{_WHO}: {name} in {self.index_path} is stored in slices (partitioned), which is not supported"
            )
        dtype = _DTYPES.get(variable.dtype_code)
        if dtype is None:
            raise TypeError(f"{_WHO}: {name} in {self.index_path} has dtype {variable.dtype}, which is not supported")
        path = self.shard_path(variable.shard)
        expected = math.prod(variable.shape) * dtype.itemsize
        if variable.size != expected:
            raise ValueError(
                f"{_WHO}: {name} has {variable.size} bytes in {self.index_path}; "
                f"expected {expected} for shape {variable.shape} and dtype {variable.dtype}"
            )
        with reading(path, _WHO, "data file of a TensorFlow checkpoint"):
            data = self._map(variable.shard)
            end = variable.offset + variable.size
            if end > len(data):
                raise ValueError(
                    f"{_WHO}: {path} has {len(data)} bytes, but {name} ends at byte {end}; the file is cut short"
                )
            raw = np.frombuffer(data, np.uint8, variable.size, variable.offset)
            if self.verify and variable.crc32c is not None and mask_crc(crc32c(raw)) != variable.crc32c:
                raise ValueError(f"{_WHO}: the checksum of {name} in {path} is wrong; the file is damaged")
            array = raw.copy().view(dtype).reshape(variable.shape)
            if variable.dtype_code == _BFLOAT16:
                array = (array.astype(np.uint32) << 16).view(np.float32)
            return array

    def _map(self, shard: int) -> mmap.mmap | bytes:
        """The bytes of data file `shard`, mapped on first use."""
        if shard not in self._maps:
            with open(self.shard_path(shard), "rb") as file:
                if os.fstat(file.fileno()).st_size == 0:
                    return b""
                self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[shard]


def bundle_prefix(path: str | os.PathLike[str]) -> Path:
    """The checkpoint prefix of `path`, which may name the index or a data file."""
    path = Path(path)
    name = path.name
    if name.endswith(".index"):
        return path.with_name(name[: -len(".index")])
    stem, marker, shard = name.rpartition(".data-")
    if marker and "-of-" in shard:
        return path.with_name(stem)
    return path


def _read_table(path: Path, verify: bool) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a LevelDB table, in order. Its blocks and its keys are in order, too: none comes twice."""
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise ValueError(f"{_WHO}: {path} has {size:,} bytes; expected an index, of at most {_MOST_BYTES:,}")
    data = path.read_bytes()
    if len(data) < _FOOTER_BYTES:
        raise ValueError(
            f"{_WHO}: {path} has {len(data)} bytes; expected at least {_FOOTER_BYTES}. The file is cut short"
        )
    footer = data[-_FOOTER_BYTES:]
    if struct.unpack("<Q", footer[-8:])[0] != _MAGIC:
        raise ValueError(f"{_WHO}: {path} does not end with the table magic; it is cut short or no index file")
    _, _, at = _block_handle(footer, 0)
    offset, size, _ = _block_handle(footer, at)
    end = unpacked = total = count = 0
    last = None
    for number, (_, handle) in enumerate(_block_entries(_read_block(data, offset, size, verify))):
        offset, size, _ = _block_handle(handle, 0)
        if number == _MOST_BLOCKS:
            raise _Damaged(f"more than {_MOST_BLOCKS:,} blocks")
        if offset < end:
            raise _Damaged(f"the block at byte {offset} begins before the end of the one before it")
        block = _read_block(data, offset, size, verify)
        end, unpacked = offset + size, unpacked + len(block)
        for key, value in _block_entries(block):
            if last is not None and key <= last:
                raise _Damaged("its names are not in order")
            last, count, total = key, count + 1, total + len(key) + len(value)
            if count > _MOST_VARIABLES or max(total, unpacked) > _MOST_BYTES:
                raise _Damaged(f"more than {_MOST_VARIABLES:,} variables, or {_MOST_BYTES:,} bytes of them")
            yield key, value


class _Damaged(Exception):
    """Something in an index that cannot be; ``reading`` adds the file's name."""


def _block_handle(data: bytes, at: int) -> tuple[int, int, int]:
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return offset, size, at


def _read_block(data: bytes, offset: int, size: int, verify: bool) -> bytes:
    """One block, checked and decompressed."""
    end = offset + size
    if end + _TRAILER_BYTES > len(data) - _FOOTER_BYTES:
        raise _Damaged(f"a block ends at byte {end + _TRAILER_BYTES} of {len(data)}")
    kind = data[end]
    if verify:
        (stored,) = struct.unpack_from("<I", data, end + 1)
        if mask_crc(crc32c(data[offset : end + 1])) != stored:
            raise _Damaged(f"wrong checksum of the block at byte {offset}")
    block = data[offset:end]
    if kind == _NO_COMPRESSION:
        return block
    if kind == _SNAPPY:
        return snappy_decompress(block)
    raise _Damaged(f"unknown compression {kind} of the block at byte {offset}")


def _block_entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Entries of a block: each key shares a prefix with the one before it."""
    if len(block) < 4:
        raise _Damaged("a block is shorter than its restart count")
    (num_restarts,) = struct.unpack_from("<I", block, len(block) - 4)
    end = len(block) - 4 - 4 * num_restarts
    if end < 0:
        raise _Damaged(f"a block of {len(block)} bytes claims {num_restarts} restarts")
    at, key = 0, b""
    while at < end:
        shared, at = _varint(block, at)
        unshared, at = _varint(block, at)
        length, at = _varint(block, at)
        if shared > len(key) or at + unshared + length > end:
            raise _Damaged("a record runs past its block")
        if shared + unshared > _LONGEST_NAME:
            raise _Damaged(f"a name of {shared + unshared:,} bytes")
        key = key[:shared] + block[at : at + unshared]
        at += unshared
        yield key, block[at : at + length]
        at += length


def snappy_decompress(data: bytes) -> bytes:
    """Decodes one raw Snappy block (literals and back references; no framing)."""
    length, at = _varint(data, 0)
    if length > _MOST_BYTES:
        raise _Damaged(f"a compressed block of {length:,} bytes")
    out = bytearray()
    while at < len(data) and len(out) <= length:
        tag = data[at]
        at += 1
        if tag & 3 == 0:
            size = tag >> 2
            if size >= 60:
                width = size - 59
                size = int.from_bytes(data[at : at + width], "little")
                at += width
            size += 1
            if at + size > len(data):
                raise _Damaged("a compressed literal runs past its block")
            out += data[at : at + size]
            at += size
            continue
        if tag & 3 == 1:
            size = (tag >> 2 & 7) + 4
            distance = tag >> 5 << 8 | data[at]
            at += 1
        else:
            width = 2 if tag & 3 == 2 else 4
            size = (tag >> 2) + 1
            distance = int.from_bytes(data[at : at + width], "little")
            at += width
        if not 0 < distance <= len(out):
            raise _Damaged("a compressed copy points before the start of its block")
        # A copy may overlap what it writes: the last `distance` bytes then repeat.
        start = len(out) - distance
        source = bytes(out[start : start + size])
        out += (source * (size // distance + 1))[:size]
    if len(out) != length:
        raise _Damaged(f"a compressed block gives {len(out)} bytes or more instead of {length}")
    return bytes(out)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A base-128 number and the position after it."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise _Damaged("a number of more than 64 bits")


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of a protocol-buffer message, in order."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(message, at)
        elif kind == 2:
            size, at = _varint(message, at)
            value, at = message[at : at + size], at + size
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value, at = int.from_bytes(message[at : at + size], "little"), at + size
        else:
            raise _Damaged(f"wire type {kind}")
        if at > len(message):
            raise _Damaged("a field runs past its message")
        yield tag >> 3, value


def _number(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise _Damaged("a number is stored as text")
    return value


def _parse_entry(name: str, value: bytes) -> Variable:
    """One BundleEntryProto."""
    shape: list[int] = []
    numbers = {1: 0, 3: 0, 4: 0, 5: 0}
    crc, is_sliced = None, False
    for field, content in _fields(value):
        if field == 2 and isinstance(content, bytes):
            for inner, dim in _fields(content):
                if inner == 2 and isinstance(dim, bytes):
                    shape.append(_number(dict(_fields(dim)).get(1, 0)))
                if len(shape) > _MOST_DIMS:
                    raise _Damaged(f"{name} has more than {_MOST_DIMS} dimensions")
        elif field == 6:
            crc = _number(content)
        elif field == 7:
            is_sliced = True
        elif field in numbers:
            numbers[field] = _number(content)
    code = numbers[1]
    if code == _BFLOAT16:
        dtype = "bfloat16"
    elif code in _DTYPES:
        dtype = _DTYPES[code].name
    else:
        dtype = _DTYPE_NAMES.get(code, f"number {code}")
    return Variable(name, tuple(shape), dtype, code, numbers[3], numbers[4], numbers[5], crc, is_sliced)


def mask_crc(crc: int) -> int:
    """The form in which LevelDB and TensorFlow store a CRC: rotated, plus a constant."""
    return ((crc >> 15 | crc << 17) + _CRC_MASK_DELTA) & 0xFFFFFFFF


def crc32c(data: bytes | np.ndarray) -> int:
    """CRC-32C (Castagnoli) of bytes or of a contiguous uint8 array, many words at a time.

    The register is linear over GF(2), so the message is laid out in rows of `lanes` words. Each lane takes one word of
    every row; between rows all lanes move on by a whole row at once, and at the end neighbours are joined two by two.
    """
    data = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
    words = data[: data.size // 4 * 4].view("<u4")
    crc = 0xFFFFFFFF
    if words.size:
        lanes = min(_CRC_LANES, 1 << (words.size - 1).bit_length())
        # The first row is filled up with zeros in front, which leave a zero register unchanged;
        # a register that starts with all ones is the same as an inverted first word.
        first = words.size % lanes or lanes
        state = np.zeros(lanes, np.uint32)
        state[lanes - first :] = words[:first]
        state[lanes - first] ^= 0xFFFFFFFF
        low, high = _advance_tables(lanes)
        for row in words[first:].reshape(-1, lanes):
            state = _advance(state, low, high)
            state ^= row
        distance = 1
        while state.size > 1:
            left, right = state[0::2], state[1::2]
            state = _advance(np.ascontiguousarray(left), *_advance_tables(distance)) ^ right
            distance *= 2
        crc = int(_advance(state, *_advance_tables(1))[0])
    for byte in data[words.size * 4 :].tolist():
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (_CRC_POLYNOMIAL if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def _advance(state: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Registers (n,) uint32 moved on by the number of zero words the tables were made for."""
    halves = state.view(np.uint16).reshape(-1, 2)
    return low[halves[:, 0]] ^ high[halves[:, 1]]


@functools.cache
def _advance_tables(num_words: int) -> tuple[np.ndarray, np.ndarray]:
    """Where a register's low and high 16 bits go after `num_words` (a power of two) zero words."""
    if num_words == 1:
        columns = []
        for bit in range(32):
            register = 1 << bit
            for _ in range(32):
                register = register >> 1 ^ (_CRC_POLYNOMIAL if register & 1 else 0)
            columns.append(register)
        images = np.array(columns, np.uint32)
    else:
        # Moving on by 2n words is moving on by n words twice.
        half = _advance_tables(num_words // 2)
        units = np.left_shift(np.uint32(1), np.arange(32, dtype=np.uint32))
        images = _advance(_advance(units, *half), *half)
    tables = []
    for part in (images[:16], images[16:]):
        table = np.zeros(1 << 16, np.uint32)
        for bit, image in enumerate(part):
            table[1 << bit : 2 << bit] = table[: 1 << bit] ^ image
        tables.append(table)
    return tables[0], tables[1]
