# SPDX-License-Identifier: Apache-2.0
"""Writes small TensorFlow tensor bundles, by the public format, for tests of the reader.

Independent of ctxfast: own checksum, own protocol-buffer and Snappy encoders. Block sizes, restart
intervals, shards and compression can be chosen, which TensorFlow's own writer does not offer.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

DTYPES = {"float32": 1, "float64": 2, "int32": 3, "int64": 9, "float16": 19, "bool": 10}
BFLOAT16, STRING = 14, 7


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    """CRC-32C, one byte at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    """The stored form of a checksum."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def varint(value: int) -> bytes:
    """Base-128 number, low bits first."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def _message(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def snappy_compress(data: bytes) -> bytes:
    """A valid Snappy block; uses literals of every length form and copies of all three kinds."""
    out = bytearray(varint(len(data)))
    seen: dict[bytes, int] = {}
    at = start = copies = 0

    def literal(piece: bytes) -> None:
        size = len(piece) - 1
        if not piece:
            return
        if size < 60:
            out.append(size << 2)
        else:
            width = (size.bit_length() + 7) // 8
            out.append((59 + width) << 2)
            out.extend(size.to_bytes(width, "little"))
        out.extend(piece)

    while at + 4 <= len(data):
        key = data[at : at + 4]
        source = seen.get(key)
        seen[key] = at
        if source is None:
            at += 1
            continue
        size = 4
        while size < 64 and at + size < len(data) and data[source + size] == data[at + size]:
            size += 1
        literal(data[start:at])
        distance = at - source
        copies += 1
        if size <= 11 and distance < 2048 and copies % 3:
            out += bytes([1 | (size - 4) << 2 | distance >> 8 << 5, distance & 0xFF])
        elif distance < 65536 and copies % 2:
            out += bytes([2 | (size - 1) << 2]) + distance.to_bytes(2, "little")
        else:
            out += bytes([3 | (size - 1) << 2]) + distance.to_bytes(4, "little")
        at += size
        start = at
    literal(data[start:])
    return bytes(out)


def _block(entries: list[tuple[bytes, bytes]], restart_interval: int) -> bytes:
    out, restarts, last = bytearray(), [], b""
    for number, (key, value) in enumerate(entries):
        shared = 0
        if number % restart_interval == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value))
        out += key[shared:] + value
        last = key
    restarts = restarts or [0]
    return bytes(out) + b"".join(struct.pack("<I", r) for r in [*restarts, len(restarts)])


def write_table(
    path: Path,
    entries: list[tuple[bytes, bytes]],
    *,
    block_entries: int = 1000,
    restart_interval: int = 16,
    compress: bool = False,
) -> None:
    """A LevelDB table of sorted entries."""
    out = bytearray()

    def add(block: bytes, squeeze: bool) -> bytes:
        kind = b"\1" if squeeze else b"\0"
        block = snappy_compress(block) if squeeze else block
        handle = varint(len(out)) + varint(len(block))
        out.extend(block + kind + struct.pack("<I", masked(block + kind)))
        return handle

    index = []
    for at in range(0, len(entries), block_entries):
        part = entries[at : at + block_entries]
        index.append((part[-1][0], add(_block(part, restart_interval), compress)))
    footer = add(_block([], 1), False) + add(_block(index, 1), compress)
    path.write_bytes(bytes(out) + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57))


def write_bundle(
    prefix: Path,
    variables: dict[str, np.ndarray],
    *,
    shards: int = 1,
    bfloat16: tuple[str, ...] = (),
    sliced: tuple[str, ...] = (),
    big_endian: bool = False,
    **table: int,
) -> None:
    """PREFIX.index and its data files; arrays named in `bfloat16` are stored cut to 16 bits."""
    header = _number(1, shards) + (_number(2, 1) if big_endian else b"") + _message(3, _number(1, 1))
    entries = [(b"", header)]
    data = [bytearray() for _ in range(shards)]
    for number, name in enumerate(sorted(variables)):
        array = variables[name]
        shard = data[number % shards]
        if name in bfloat16:
            code = BFLOAT16
            raw = (array.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        elif array.dtype.kind == "S":
            code, raw = STRING, array.tobytes()
        else:
            code, raw = DTYPES[array.dtype.name], array.tobytes()
        shape = b"".join(_message(2, _number(1, size)) for size in array.shape)
        value = _number(1, code) + _message(2, shape)
        if number % shards:
            value += _number(3, number % shards)
        if shard:
            value += _number(4, len(shard))
        value += _number(5, len(raw)) + varint(6 << 3 | 5) + struct.pack("<I", masked(raw))
        if name in sliced:
            value += _message(7, _message(1, b""))
        entries.append((name.encode(), value))
        shard += raw
    for number, content in enumerate(data):
        Path(f"{prefix}.data-{number:05d}-of-{shards:05d}").write_bytes(bytes(content))
    write_table(Path(f"{prefix}.index"), entries, **table)
