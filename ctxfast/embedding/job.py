# SPDX-License-Identifier: Apache-2.0
"""Embedding a file into a file: windows of lines become shards in a work directory, shards become the output.

A job can be killed at any moment; the same call goes on where it stood and makes the same file. The output has its
name only when it is whole. Disk space for the vectors is needed twice while shards become the output.
"""

from __future__ import annotations

import array
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from .._core.checks import shown
from .._core.digests import digest, fingerprint
from .._core.files import check_apart, create, naming
from .._core.report import facts
from . import writers
from .batch_encoder import BatchEncoder
from .encoders import Prepared
from .file_options import FileOptions
from .lines import Corpus, Position, Window
from .selection import Selection
from .shards import Done, Shard, WorkDirectory

_Path = str | os.PathLike[str]
# tokens so far, texts so far, share of the input that is done (None where it cannot be known)
Progress = Callable[[int, int, float | None], None]


@dataclass(frozen=True)
class Report:
    """What a job did.

    Attributes:
        output: the file.
        done: counts over the whole job.
        resumed: texts that an earlier run had done.
        notes: sentences worth telling.
    """

    output: Path
    done: Done
    resumed: int
    notes: tuple[str, ...]


def check_target(
    input: _Path, output: _Path, format: str | None = None, *, overwrite: bool = False, files: Sequence[_Path] = ()
) -> str:
    """The format of an output that may be written.

    Args:
        input: what is read, or "-".
        files: of the model.

    Raises:
        FileExistsError: it exists, without ``overwrite``, and no unfinished job knows of it.
        FileNotFoundError: its folder does not exist.
        ValueError: it, or the folder of its unfinished work, is or holds what is read.
        ValueError, RuntimeError: see ``writers.format_of``.
    """
    target = Path(output)
    if os.fspath(output) == "-":
        raise ValueError("ctxfast.embed: output is '-'; expected the name of a file: a job goes on from files.")
    if target.is_dir():
        raise FileExistsError(f"ctxfast.embed: output {target} is a directory; expected the name of a file.")
    work = target.with_name(target.name + ".partial")
    read = [] if os.fspath(input) == "-" else [input]
    made = {"output": [output], "the work directory": [work]}
    check_apart("ctxfast.embed", made, {"input": read, "a file of the model,": files})
    chosen = writers.format_of(target, format)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"ctxfast.embed: the folder of output {target} does not exist.")
    with suppress(OSError):  # empty: of a job killed when all else was done
        os.rmdir(work)
    if target.exists() and not overwrite and not (work / "finished.json").is_file():
        raise FileExistsError(f"ctxfast.embed: output {target} exists. Pass --overwrite to replace it.")
    return chosen


def embed_file(
    embedder: BatchEncoder,
    input: _Path,
    output: _Path,
    *,
    progress: Progress | None = None,
    stdin: BinaryIO | None = None,
    **options: Any,
) -> Report:
    """Embed a text file, a text a line, into a file; any length in constant memory.

    Args:
        input: the file (plain, .gz or .xz), or "-" for standard input, which is first copied into the work directory.
        output: the file to make. Its suffix names the format: .hdf5, .h5, .safetensors, .npz, .jsonl, .parquet.
        progress: called now and then.
        stdin: stream that "-" stands for; None for the process's.
        options: see ``FileOptions``.

    Returns:
        A ``Report``.

    Raises:
        TypeError: an option that there is not.
        ValueError: an output that is the input or a file of the model, a wrong option or one that does not apply, a
            line that cannot be embedded (the message has its number, counted from 1), or unfinished work that belongs
            to other arguments.
        FileExistsError, FileNotFoundError: files.
        RuntimeError: another process is writing the same output.
    """
    target = Path(output)
    how = FileOptions(**options)
    format = check_target(input, target, how.format, overwrite=how.overwrite, files=embedder.encoder.files)
    how.check(format)
    selection = how.selection(embedder, format)
    reading: dict[str, Any] = dict(
        empty=how.empty, window=how.window, multiple=embedder.batch_size if embedder.state == "carry" else 1
    )
    source = None if os.fspath(input) == "-" else Corpus(input, **reading)
    work = WorkDirectory(target)
    try:
        notes: list[str] = []
        try:
            published = work.published()
        except ValueError:
            if not how.overwrite:
                raise
            published = None
        if source is None:
            path = _spool(work, stdin or sys.stdin.buffer, how.overwrite, notes)
            source = Corpus(path, **reading, name="standard input")
            mark = {"sha256": digest(path)}
            if published is not None and path.stat().st_size == 0:  # the copy of what was read is gone already
                mark = published[0]["input"]
        else:
            mark = fingerprint(source.path)
        job = _Job(embedder, selection, source, work, how, format)
        manifest = job.manifest(mark)
        layout = how.layout(format)
        made = {**manifest, "output": {"format": format, **layout}}
        if published is not None and not list(_differences(published[0], made)):
            work.remove()
            return Report(target, published[1], published[1].texts, ("The output was complete already.",))
        if target.exists() and not how.overwrite:
            if published is not None:  # the job that was here is done with
                work.remove()
            raise FileExistsError(f"ctxfast.embed: output {target} exists. Pass --overwrite to replace it.")
        resumed = job.claim(manifest)
        if how.use_sentence_keys:
            check_keys(source)
        done = job.run(resumed, progress, _INDEX_LIMIT if layout.get("index") else None)
        if "modified_ns" in mark and fingerprint(source.path) != mark:
            raise ValueError(f"ctxfast.embed: {source.name} changed while it was read. Run again with --overwrite.")
        with naming(target):
            writers.write(format, work.output, job.layout(done), **layout)
        work.publish(made, done)
        return Report(target, done, resumed.texts, (*notes, *_notes(done)))
    except Exception:
        # Work worth going on with stays; an error before any is done leaves nothing behind.
        if work.path.is_dir():
            work.drop_half_made() if work.count() else work.remove()
        raise
    finally:
        work.release()


_INDEX_LIMIT = writers.MAX_INDEX_BYTES
_BLOCK_BYTES = 1 << 20


def _digests(files: Sequence[Path]) -> dict[str, str]:
    """Digests of a model's files, by their paths inside the folder that holds them all."""
    root = os.path.commonpath([file.parent for file in files]) if files else ""
    return {Path(os.path.relpath(file, root)).as_posix(): digest(file) for file in files}


def _notes(done: Done) -> Iterator[str]:
    if done.skipped:
        yield f"blank lines skipped: {done.skipped}"
    if done.cut_texts:
        lost = f"lines too long for the model and cut: {done.cut_texts}; tokens they lost: {done.cut_tokens}"
        yield f"{lost} (--split 64 embeds such lines whole, in windows)"
    if done.replaced:
        yield f"invalid UTF-8 sequences replaced by U+FFFD: {done.replaced}"


def _spool(work: WorkDirectory, stream: BinaryIO, overwrite: bool, notes: list[str]) -> Path:
    """Standard input as a file of the work directory; what a run before put there must be the same."""
    kept, fresh = work.path / "input", work.path / "input.new"
    if not kept.is_file() or work.count() == 0:
        copy_stream(stream, kept)
        return kept
    if copy_stream(stream, fresh) == 0:
        fresh.unlink()
        notes.append("Standard input was empty; went on with what an earlier run had read.")
    elif digest(fresh) == digest(kept):
        fresh.unlink()
    elif overwrite:
        work.clear(keep=("input.new",))
        os.replace(fresh, kept)
    else:
        fresh.unlink()
        raise ValueError(
            f"ctxfast.embed: standard input is not what the unfinished job in {work.path} had read. Give it that, or "
            f"nothing (< /dev/null) to go on with its copy, or pass --overwrite to start anew."
        )
    return kept


def copy_stream(stream: BinaryIO, path: Path) -> int:
    """Write all of a stream to a file, under a temporary name first; returns its bytes."""
    temporary = path.with_name(path.name + ".tmp")
    size = 0
    with naming(path), create(temporary) as file:
        while block := stream.read(_BLOCK_BYTES):
            size += file.write(block)
    os.replace(temporary, path)
    return size


def check_keys(source: Corpus) -> None:
    """Raise ValueError if lines cannot all be names of HDF5 datasets; 8 bytes of memory a line."""
    hashes = array.array("Q")
    for window in source.windows():
        for number, text in zip(window.numbers, window.texts):
            sentence = text.decode("utf-8", "replace").strip()
            problem = writers.key_problem(sentence)
            if problem:
                raise ValueError(
                    f"ctxfast.embed: line {number + 1} of {source.name} cannot be a key: {problem}. Leave "
                    f"--use-sentence-keys out."
                )
            hashes.append(_hash(sentence))
    ordered = np.sort(np.frombuffer(hashes, dtype=np.uint64)) if hashes else np.zeros(0, np.uint64)
    repeated = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not repeated:
        return
    seen: dict[str, int] = {}
    for window in source.windows():
        for number, text in zip(window.numbers, window.texts):
            sentence = text.decode("utf-8", "replace").strip()
            if _hash(sentence) not in repeated:
                continue
            if sentence in seen:
                raise ValueError(
                    f"ctxfast.embed: line {number + 1} of {source.name} is the same as line {seen[sentence] + 1}; "
                    f"expected different sentences. Leave --use-sentence-keys out."
                )
            seen[sentence] = number


def _hash(sentence: str) -> int:
    return int.from_bytes(hashlib.blake2b(sentence.encode(), digest_size=8).digest(), "little")


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            yield from _differences(old.get(name), new.get(name), f"{path}.{name}" if path else name)
    elif old != new and not _is_looser(path, old):
        yield f"{path[:80]} was {shown(old)} and is {shown(new)} now"


def _is_looser(path: str, old: Any) -> bool:
    """Whether work done under an option is good under every other value: it met nothing that the option is about."""
    return (path == "options.empty" and old == "error") or (path == "options.truncate" and old is False)


class _Job:
    """One run over the windows of a file."""

    def __init__(
        self,
        embedder: BatchEncoder,
        selection: Selection,
        source: Corpus,
        work: WorkDirectory,
        how: FileOptions,
        format: str,
    ) -> None:
        self.embedder, self.selection, self.source, self.work = embedder, selection, source, work
        self.how, self.keeps_tokens = how, how.needs_tokens(format)
        self.shape = (selection.depth, selection.dim)
        self.shards = 0

    def manifest(self, mark: dict[str, Any]) -> dict[str, Any]:
        """What the vectors depend on."""
        embedder = self.embedder
        known = facts()
        options = {
            **asdict(self.selection),
            "layers": list(self.selection.layers),
            "pooling": "+".join(self.selection.pooling),
            "vector_dtype": embedder.vector_dtype.str,
            "dtype": embedder.dtype,
            "device": known["gpu"] if embedder.device.type == "cuda" else embedder.device.type,
            "impl": embedder.impl,
            "state": embedder.state if embedder.kind == "elmo" else None,
            "batch_tokens": embedder.token_budget(self.selection) if embedder.state != "carry" else None,
            "batch_size": embedder.batch_size if embedder.state == "carry" else None,
            "window": self.how.window,
            "empty": self.how.empty,
            "truncate": self.how.truncate,
            "split": embedder.split,
            "words": self.how.words,
            "tokens_kept": self.keeps_tokens,
        }
        return {
            "versions": {"ctxfast": known["ctxfast"], "torch": torch.__version__},
            "input": mark,
            "model": _digests(embedder.encoder.files),
            "options": options,
        }

    def claim(self, manifest: dict[str, Any]) -> Done:
        """Take the work directory for this job: what is done already in it."""
        work, overwrite = self.work, self.how.overwrite
        try:
            count, old = work.count(), work.manifest
            if count and old is not None:
                changes = list(_differences(old, manifest))
                if not changes:
                    self.shards = count
                    done = self._shard(count - 1).done
                    for number in range(count if overwrite else 0):  # what is damaged would stop the same call again
                        self._shard(number).open_values().close()
                    work.write_manifest(manifest)
                    return done
                if not overwrite:
                    raise ValueError(
                        f"ctxfast.embed: {work.path} holds unfinished work of another job: {'; '.join(changes[:3])}. "
                        f"Give the same arguments to go on with it, or pass --overwrite to start anew."
                    )
        except ValueError:
            if not overwrite:
                raise
        self.shards = 0
        work.clear(keep=("input",))
        work.write_manifest(manifest)
        return Done()

    def _shard(self, number: int) -> Shard:
        return self.work.shard(number, self.shape, self.embedder.vector_dtype)

    def layout(self, done: Done) -> writers.Layout:
        selection, embedder = self.selection, self.embedder
        return writers.Layout(
            shards=lambda: map(self._shard, range(self.shards)),
            texts=done.texts,
            rows=done.rows,
            level=selection.level,
            depth=selection.depth,
            dim=selection.dim,
            is_single=selection.is_single,
            dtype=embedder.vector_dtype,
            layers=tuple(layer - embedder.num_layers for layer in selection.layers),
            facts={
                "level": selection.level,
                "layers": "average" if selection.is_average else ",".join(map(str, selection.layers)),
                "model": embedder.kind,
            },
        )

    def run(self, done: Done, progress: Progress | None, text_limit: int | None) -> Done:
        """Embed the windows that are not done."""
        embedder = self.embedder
        state = self._shard(self.shards - 1).state if self.shards else {}
        embedder.encoder.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in state.items()})
        if done.is_last:
            return done
        start = Position(done.offset, done.line)
        for window, items, replaced in _ahead(self._prepared(start)):
            done = self._embed(window, items, replaced, done, progress)
            if text_limit is not None and done.text_bytes > text_limit:
                raise ValueError(writers.index_too_large())
        return done

    def _prepared(self, start: Position) -> Iterator[tuple[Window, list[Prepared], int]]:
        for window in self.source.windows(start):
            texts, replaced = self.embedder.encoder.read_lines(window.texts, self.selection)

            def where(index: int, numbers: Sequence[int] = window.numbers) -> str:
                return f"line {numbers[index] + 1} of {self.source.name}"

            yield window, self.embedder.prepare(texts, self.selection, where, self.how.truncate), replaced

    def _embed(
        self, window: Window, items: list[Prepared], replaced: int, done: Done, progress: Progress | None
    ) -> Done:
        embedder, work = self.embedder, self.work
        rows = [item.rows for item in items]
        writer = work.write(self.shards, rows, self.shape, embedder.vector_dtype)
        all_tokens = sum(item.length for item in items)
        tokens = texts = 0
        for batch, values in embedder.encode(items, self.selection):
            writer.put(batch, values)
            tokens += sum(items[index].length for index in batch)
            texts += len(batch)
            if progress is not None:
                offset = done.offset + (window.end.offset - done.offset) * tokens / max(all_tokens, 1)
                size = self.source.size
                progress(done.tokens + tokens, done.texts + texts, None if size is None else offset / max(size, 1))
        writer.close()
        now = Done(
            offset=window.end.offset,
            line=window.end.line,
            is_last=window.is_last,
            texts=done.texts + len(items),
            rows=done.rows + sum(rows),
            tokens=done.tokens + all_tokens,
            text_bytes=done.text_bytes + sum(map(len, window.texts)),
            skipped=done.skipped + window.skipped,
            cut_texts=done.cut_texts + sum(1 for item in items if item.cut),
            cut_tokens=done.cut_tokens + sum(item.cut for item in items),
            replaced=done.replaced + replaced,
        )
        kept = []
        if self.keeps_tokens:
            names = (embedder.encoder.tokens(item, self.selection) for item in items)
            kept = [json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") for row in names]
        state = {name: value.float().cpu().numpy() for name, value in embedder.encoder.state_dict().items()}
        work.finish(self.shards, now, numbers=window.numbers, rows=rows, texts=window.texts, tokens=kept, state=state)
        self.shards += 1
        return now


def _ahead(windows: Iterator[Any]) -> Iterator[Any]:
    """The same, with the next one made while the caller is at work on this one."""
    end = object()
    with ThreadPoolExecutor(max_workers=1) as pool:
        coming = pool.submit(next, windows, end)
        while (window := coming.result()) is not end:
            coming = pool.submit(next, windows, end)
            yield window
