# SPDX-License-Identifier: Apache-2.0
"""The work directory of a long embedding job: what is done lies in it, so that a killed job can go on.

Beside the output ``NAME`` there is ``NAME.partial`` while a job runs: ``manifest.json`` (what the results depend on)
and two files a window of lines, ``K.values`` (vectors) and ``K.index`` (everything else). The index comes into place
last: a shard is there as a whole or not at all. Counts in an index run from the start of the job, so that going on
needs the last one only. When the output has its name, ``finished.json`` is the last file to go: until then the same
call knows that all is done.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .._core.files import create, locked, naming, remove
from .._core.reading import read_json, reading

_WHO = "ctxfast.embed"
_OURS = re.compile(r"\d{8}\.(values|index)|manifest\.json|finished\.json|output|input(\.new)?|lock")
_STATE = "state."


@dataclass
class Done:
    """How far a job is; all counts from its start.

    Attributes:
        offset, line: where the next window of the input starts.
        is_last: whether the input is at its end.
        texts: texts embedded.
        rows: vectors of tokens (or texts) they have.
        tokens: tokens the model saw.
        text_bytes: bytes of text.
        skipped: blank lines left out.
        cut_texts, cut_tokens: texts that were cut and tokens they lost.
        replaced: invalid bytes replaced.
    """

    offset: int = 0
    line: int = 0
    is_last: bool = False
    texts: int = 0
    rows: int = 0
    tokens: int = 0
    text_bytes: int = 0
    skipped: int = 0
    cut_texts: int = 0
    cut_tokens: int = 0
    replaced: int = 0


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with naming(path), create(temporary) as file:
        file.write(json.dumps(value, indent=1, sort_keys=True).encode())
        _sync(file)
    os.replace(temporary, path)


def _joined(parts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Byte strings as one array and the offsets of each, one more at the end."""
    offsets = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)), out=offsets[1:])
    return np.frombuffer(b"".join(parts), dtype=np.uint8), offsets


@dataclass(frozen=True)
class Item:
    """One text of a shard: line number (from 0), the line, its tokens as JSON (or b""), (rows, depth, dim)."""

    number: int
    text: bytes
    tokens: bytes
    values: np.ndarray


class ShardWriter:
    """Vectors of one window, written in any order of texts to where they belong.

    Args:
        path: of the values.
        rows: vectors of each text.
        shape: (depth, dim) of a vector.
        dtype: how numbers are stored.
    """

    def __init__(self, path: Path, rows: Sequence[int], shape: tuple[int, int], dtype: np.dtype) -> None:
        self._path, self._dtype = path, dtype
        self._rows = list(rows)
        row_bytes = shape[0] * shape[1] * dtype.itemsize
        self._offsets = np.concatenate([[0], np.cumsum(np.asarray(rows, dtype=np.int64))]) * row_bytes
        self._offsets = self._offsets.tolist()
        with naming(path):
            self._file = create(path.with_name(path.name + ".tmp"), buffering=0)
            self._file.truncate(self._offsets[-1])

    def put(self, indices: Sequence[int], values: np.ndarray) -> None:
        """The vectors of these texts, one text after another."""
        data = np.ascontiguousarray(values, dtype=self._dtype).data.cast("B") if values.size else b""
        handle, offsets, place = self._file.fileno(), self._offsets, 0
        with naming(self._path):
            for index in indices:
                start, end = offsets[index], offsets[index + 1]
                while start < end:
                    count = os.pwrite(handle, data[place : place + end - start], start)
                    start, place = start + count, place + count
        if place != len(data):
            raise RuntimeError(f"ctxfast.embed: the model gave {len(data)} bytes of vectors; expected {place}.")

    def close(self) -> None:
        with naming(self._path), self._file:
            _sync(self._file)
        os.replace(self._path.with_name(self._path.name + ".tmp"), self._path)


class Shard:
    """A window that is done."""

    def __init__(self, path: Path, shape: tuple[int, int], dtype: np.dtype) -> None:
        self._values, self._shape, self._dtype = path.with_suffix(".values"), shape, dtype
        try:
            with reading(path, _WHO, "index of a shard"):
                self._arrays = _read_index(path)
                self.done = _done(self._arrays["done"].tobytes())
        except ValueError as error:
            raise ValueError(f"{error}. {_way_out(path)}") from error
        self.numbers, self.rows = self._arrays["numbers"], self._arrays["rows"]
        self.row_bytes = shape[0] * shape[1] * dtype.itemsize

    @property
    def state(self) -> dict[str, np.ndarray]:
        """What the model carried when the window was done."""
        return {name[len(_STATE) :]: value for name, value in self._arrays.items() if name.startswith(_STATE)}

    def open_values(self) -> BinaryIO:
        """The vectors as a file of numbers.

        Raises:
            ValueError: the file has another size than it should.
        """
        expected = int(self.rows.sum()) * self.row_bytes
        size = self._values.stat().st_size if self._values.is_file() else 0
        if size != expected:
            raise ValueError(_damaged(self._values, f"{size} bytes, expected {expected}"))
        return open(self._values, "rb", buffering=1 << 20)

    def items(self) -> Iterator[Item]:
        """The texts, in the order of the input; one at a time is in memory."""
        texts, tokens = (self._arrays[name].tobytes() for name in ("texts", "tokens"))
        bounds = [self._arrays[f"{name}_offsets"].tolist() for name in ("texts", "tokens")]
        with self.open_values() as file:
            for i, (number, rows) in enumerate(zip(self.numbers.tolist(), self.rows.tolist())):
                values = np.frombuffer(file.read(rows * self.row_bytes), self._dtype).reshape(rows, *self._shape)
                text, own_tokens = (data[at[i] : at[i + 1]] for data, at in zip((texts, tokens), bounds))
                yield Item(number, text, own_tokens, values)


def _damaged(path: Path, what: object) -> str:
    return f"{_WHO}: {path} is damaged ({what}). {_way_out(path)}"


def _is_ours(entry: os.DirEntry[str]) -> bool:
    is_folder = entry.is_dir(follow_symlinks=False)
    return not is_folder and _OURS.fullmatch(entry.name.removesuffix(".tmp")) is not None


def _way_out(path: Path) -> str:
    return f"Remove the directory {path.parent}, or pass --overwrite."


def _read_index(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an index. It is a .npz as ``np.savez`` writes it; what its parts say of their sizes is looked at
    before anything of that size is made."""
    arrays: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name in arrays or member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"part {name!r} is there twice" if name in arrays else f"part {name!r} is compressed")
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                if version != (1, 0):
                    raise ValueError(f"part {name!r} is of version {version}")
                shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
                data = file.read()
            size = dtype.itemsize
            for length in shape:
                size *= length
            if dtype.hasobject or size != len(data):
                raise ValueError(f"part {name!r} has {len(data)} bytes; expected {size}")
            arrays[name] = np.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran else "C")
    count = len(arrays["numbers"])
    for name, size in (
        ("numbers", count),
        ("rows", count),
        ("texts_offsets", count + 1),
        ("tokens_offsets", count + 1),
    ):
        array = arrays[name]
        if array.dtype != np.int64 or array.shape != (size,):
            raise ValueError(f"part {name!r} is {array.dtype} of shape {array.shape}; expected int64, ({size},)")
    for name in ("texts", "tokens"):
        offsets = arrays[f"{name}_offsets"]
        if offsets[0] != 0 or offsets[-1] != arrays[name].nbytes or (np.diff(offsets) < 0).any():
            raise ValueError(f"part {name!r} is not what its offsets say")
    if (arrays["rows"] < 0).any() or (np.diff(arrays["numbers"]) <= 0).any():
        raise ValueError("its numbers of lines and rows cannot be")
    return arrays


def _done(text: bytes) -> Done:
    """Counts, as ``finish`` wrote them."""
    values = json.loads(text)
    wanted = {entry.name: type(entry.default) for entry in fields(Done)}
    if {name: type(value) for name, value in values.items()} != wanted or min(map(int, values.values())) < 0:
        raise ValueError(f"counts are {text[:80]!r}")
    return Done(**values)


class WorkDirectory:
    """``NAME.partial`` beside the output ``NAME``.

    Args:
        target: the output.

    Raises:
        FileExistsError: something else has that name.
        RuntimeError: another process is at work on it.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(target.name + ".partial")
        if os.path.lexists(self.path):
            if self.path.is_symlink() or not self.path.is_dir():
                found = "is a link" if self.path.is_symlink() else "is a file"
            else:
                found = next((f"holds {entry.name}" for entry in os.scandir(self.path) if not _is_ours(entry)), None)
            if found:
                raise FileExistsError(
                    f"{_WHO}: {self.path} exists and is not a work directory of an embedding job (it {found}). Move it "
                    f"away, or choose another output."
                )
        lock = None
        while lock is None:
            self.path.mkdir(exist_ok=True)
            with suppress(FileNotFoundError):  # another process has just done its last there
                lock = locked(self.path / "lock", _WHO, f"another process is writing {target} (it holds {self.path}).")
        self._lock = lock

    def release(self) -> None:
        self._lock.release()

    def clear(self, keep: Sequence[str] = ()) -> None:
        """Remove what earlier jobs left, but for the lock and ``keep``."""
        for name in os.listdir(self.path):
            if name != "lock" and name not in keep:
                remove(self.path / name)

    def remove(self) -> None:
        """Remove it all; what says that the job is done goes last."""
        self.clear(keep=("finished.json",))
        for name in ("lock", "finished.json"):
            remove(self.path / name)
        with suppress(OSError):  # another process may have come in
            os.rmdir(self.path)

    def drop_half_made(self) -> None:
        """Give back the room of files that were not finished."""
        for name in os.listdir(self.path):
            if name.endswith(".tmp"):
                remove(self.path / name)

    # What the results depend on

    @property
    def manifest(self) -> dict[str, Any] | None:
        """What the last job here wrote; None if there was none."""
        return self._note("manifest.json")

    def _note(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        if not path.is_file():
            return None
        try:
            return read_json(path, _WHO, "note of an embedding job")
        except ValueError as error:
            raise ValueError(f"{error}. {_way_out(path)}") from error

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        _write_json(self.path / "manifest.json", manifest)

    # Shards

    def _index(self, number: int) -> Path:
        return self.path / f"{number:08d}.index"

    def count(self) -> int:
        """Shards that are done, from the first on without a gap."""
        names = {name for name in os.listdir(self.path) if name.endswith(".index")}
        count = 0
        while f"{count:08d}.index" in names:
            count += 1
        return count

    def shard(self, number: int, shape: tuple[int, int], dtype: np.dtype) -> Shard:
        return Shard(self._index(number), shape, dtype)

    def write(self, number: int, rows: Sequence[int], shape: tuple[int, int], dtype: np.dtype) -> ShardWriter:
        """The writer of a new shard's values; ``finish`` completes it."""
        return ShardWriter(self._index(number).with_suffix(".values"), rows, shape, dtype)

    def finish(
        self,
        number: int,
        done: Done,
        *,
        numbers: Sequence[int],
        rows: Sequence[int],
        texts: Sequence[bytes],
        tokens: Sequence[bytes],
        state: Mapping[str, np.ndarray],
    ) -> None:
        """Write the index of a shard whose values are in place."""
        arrays: dict[str, Any] = {
            "numbers": np.asarray(numbers, dtype=np.int64),
            "rows": np.asarray(rows, dtype=np.int64),
        }
        arrays["texts"], arrays["texts_offsets"] = _joined(texts)
        arrays["tokens"], arrays["tokens_offsets"] = _joined(tokens or [b""] * len(texts))
        arrays["done"] = np.frombuffer(json.dumps(asdict(done)).encode(), dtype=np.uint8)
        arrays.update((_STATE + name, value) for name, value in state.items())
        path = self._index(number)
        temporary = path.with_name(path.name + ".tmp")
        with naming(path), create(temporary) as file:
            np.savez(file, **arrays)
            _sync(file)
        os.replace(temporary, path)

    # The output

    @property
    def output(self) -> Path:
        """Where the output is written before it gets its name."""
        return self.path / "output.tmp"

    def publish(self, manifest: Mapping[str, Any], done: Done) -> None:
        """Give the output its name and remove this directory.

        A kill between the two leaves a directory that knows the file it made (``published``).

        Args:
            manifest: what the results depend on.
            done: counts of the whole job.
        """
        with naming(self.target), open(self.output, "rb+") as file:
            os.fsync(file.fileno())
        status = self.output.stat()
        made = {"inode": status.st_ino, "size": status.st_size}
        _write_json(self.path / "finished.json", {**made, "manifest": manifest, "done": asdict(done)})
        os.replace(self.output, self.target)
        self.remove()

    def published(self) -> tuple[dict[str, Any], Done] | None:
        """What the file under the output's name depends on, and its counts, if the job in this directory made it."""
        if not self.target.exists():
            return None
        note = self._note("finished.json")
        if note is None:
            return None
        status = self.target.stat()
        if (note.get("inode"), note.get("size")) != (status.st_ino, status.st_size):
            return None
        path = self.path / "finished.json"
        with reading(path, _WHO, "note of an embedding job"):
            return dict(note["manifest"]), _done(json.dumps(note["done"]).encode())
