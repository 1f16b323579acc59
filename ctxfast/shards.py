# SPDX-License-Identifier: Apache-2.0
"""The work directory of a long embedding job: what is done lies in it, so that a killed job can go on.

Beside the output ``NAME`` there is ``NAME.partial`` while a job runs: ``manifest.json`` (what the results depend on)
and two files a window of lines, ``K.values`` (vectors) and ``K.index`` (everything else). The index comes into place
last: a shard is there as a whole or not at all. Counts in an index run from the start of the job, so that going on
needs the last one only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ._core.files import locked

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
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, sort_keys=True)
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
        self._file = open(path.with_name(path.name + ".tmp"), "wb", buffering=0)
        self._file.truncate(self._offsets[-1])

    def put(self, indices: Sequence[int], values: np.ndarray) -> None:
        """The vectors of these texts, one text after another."""
        data = memoryview(np.ascontiguousarray(values, dtype=self._dtype)).cast("B") if values.size else b""
        handle, offsets, place = self._file.fileno(), self._offsets, 0
        for index in indices:
            start, end = offsets[index], offsets[index + 1]
            while start < end:
                count = os.pwrite(handle, data[place : place + end - start], start)
                start, place = start + count, place + count
        if place != len(data):
            raise RuntimeError(f"ctxfast.embed: the model gave {len(data)} bytes of vectors; expected {place}.")

    def close(self) -> None:
        _sync(self._file)
        self._file.close()
        os.replace(self._file.name, self._path)


class Shard:
    """A window that is done."""

    def __init__(self, path: Path, shape: tuple[int, int], dtype: np.dtype) -> None:
        self._values, self._shape, self._dtype = path.with_suffix(".values"), shape, dtype
        try:
            with np.load(path, allow_pickle=False) as arrays:
                self._arrays = {name: arrays[name] for name in arrays.files}
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(_damaged(path, error)) from error
        self.numbers, self.rows = self._arrays["numbers"], self._arrays["rows"]
        self.done = Done(**json.loads(self._arrays["done"].tobytes()))
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
                parts = (data[at[i] : at[i + 1]] for data, at in zip((texts, tokens), bounds))
                yield Item(number, *parts, values)


def _damaged(path: Path, what: object) -> str:
    return f"ctxfast.embed: {path} is damaged ({what}). Remove the directory {path.parent}, or pass --overwrite."


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
        if self.path.exists():
            foreign = [] if self.path.is_dir() else [self.path.name]
            if not foreign:
                foreign = [name for name in os.listdir(self.path) if not _OURS.fullmatch(name.removesuffix(".tmp"))]
            if foreign:
                raise FileExistsError(
                    f"ctxfast.embed: {self.path} exists and is no work directory of an embedding job (it holds "
                    f"{foreign[0]}). Move it away, or choose another output."
                )
        self.path.mkdir(exist_ok=True)
        refusal = f"ctxfast.embed: another process is writing {target} (it holds {self.path})."
        self._lock = locked(self.path / "lock", refusal)

    def release(self) -> None:
        self._lock.close()

    def clear(self, keep: Sequence[str] = ()) -> None:
        """Remove what earlier jobs left, but for the lock and ``keep``."""
        for name in os.listdir(self.path):
            if name != "lock" and name not in keep:
                (self.path / name).unlink()

    def remove(self) -> None:
        shutil.rmtree(self.path)

    # What the results depend on

    @property
    def manifest(self) -> dict[str, Any] | None:
        """What the last job here wrote; None if there was none."""
        path = self.path / "manifest.json"
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(_damaged(path, error)) from error

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
        arrays = {"numbers": np.asarray(numbers, dtype=np.int64), "rows": np.asarray(rows, dtype=np.int64)}
        arrays["texts"], arrays["texts_offsets"] = _joined(texts)
        arrays["tokens"], arrays["tokens_offsets"] = _joined(tokens or [b""] * len(texts))
        arrays["done"] = np.frombuffer(json.dumps(asdict(done)).encode(), dtype=np.uint8)
        arrays.update((_STATE + name, value) for name, value in state.items())
        path = self._index(number)
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
            _sync(file)
        os.replace(temporary, path)

    # The output

    @property
    def output(self) -> Path:
        """Where the output is written before it gets its name."""
        return self.path / "output.tmp"

    def publish(self) -> None:
        """Give the output its name and remove this directory.

        A kill between the two leaves a directory that knows the file it made (``is_published``).
        """
        with open(self.output, "rb+") as file:
            os.fsync(file.fileno())
        status = self.output.stat()
        _write_json(self.path / "finished.json", {"inode": status.st_ino, "size": status.st_size})
        os.replace(self.output, self.target)
        self.remove()

    @property
    def is_published(self) -> bool:
        """Whether the file under the output's name is what the job in this directory made."""
        path = self.path / "finished.json"
        if not path.is_file() or not self.target.exists():
            return False
        made, status = json.loads(path.read_text(encoding="utf-8")), self.target.stat()
        return made == {"inode": status.st_ino, "size": status.st_size}
