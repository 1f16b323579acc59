# SPDX-License-Identifier: Apache-2.0
"""The directory of a training run: what it was started with, its checkpoints, its log, the models it made.

``config.json`` is written first and never changed; ``checkpoint-STEP.pt`` appear whole or not at all; ``log.jsonl``
has a line for each report; ``best/`` and ``final/`` are models in their own format. Going on with a directory asks for
the same configuration. ``data/`` is left to the task: what it made of its input, with its own check of what from.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .._core.files import locked, replacing, replacing_folder

_CHECKPOINT = re.compile(r"checkpoint-(\d+)\.pt")
_OURS = re.compile(r"checkpoint-\d+\.pt|config\.json|log\.jsonl|lock|best|final|tensorboard|data")
# What ``replacing`` and ``replacing_folder`` call these until they are whole; other hidden files are not ours.
_TEMPORARY = re.compile(r"\.(checkpoint-\d+\.pt|config\.json|log\.jsonl|best|final)\.[a-z0-9_]{8}(\.old)?")
# A directory holds no more than this before its run has started.
_PREPARED = ("data", "lock")
# These may differ when a run goes on: results do not depend on them.
_FREE = frozenset({"loop.keep", "loop.log_every", "loop.save_every", "loop.tensorboard", "loop.device"})


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _leaves(part, f"{path}.{name}" if path else str(name))
    else:
        yield path, value


def check_directory(path: str | os.PathLike[str]) -> None:
    """Refuse a directory that no run may work in: one with files of somebody else.

    Raises:
        ValueError: it is a file, or holds what is not a run's.
    """
    path = Path(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"ctxfast.training: {path} is a file; expected a directory to work in.")
    names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    # A run writes config.json first: a lone best/ or data/train of another program is not for us to replace.
    is_run = "config.json" in names
    strange = [name for name in names if not (_OURS.fullmatch(name) if is_run else name in _PREPARED)]
    if strange:
        without = " and no config.json" if _OURS.fullmatch(strange[0]) else ""
        raise ValueError(
            f"ctxfast.training: {path} holds {strange[0]}{without}; expected an empty directory, or one of an earlier "
            "run. Choose another."
        )


def check_settings(path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
    """Refuse a directory whose run has other settings, before anything is prepared in it.

    Args:
        path: of the run.
        settings: those known so far, by the names that ``RunDirectory`` will get under "settings".

    Raises:
        ValueError: naming what differs.
    """
    file = Path(path) / "config.json"
    if not file.exists():
        return
    old = _read_config(file)["settings"]
    old = {name: value for name, value in old.items() if name in settings}
    _compare(Path(path), {"settings": old}, {"settings": json.loads(json.dumps(settings))})


def _read_config(file: Path) -> dict[str, Any]:
    """What a run was started with."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        reason = None if isinstance(config, dict) and {"loop", "settings"} <= set(config) else "no loop and settings"
    except ValueError as error:
        reason = str(error)
    if reason is not None:
        raise ValueError(
            f"ctxfast.training: {file} is not what a run was started with ({reason}); expected it as it was written. "
            "Choose another directory, or pass overwrite to start anew."
        )
    return config


def _compare(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    old, new = dict(_leaves(before)), dict(_leaves(now))
    changed = [
        f"{name} was {old.get(name)!r} and is {new.get(name)!r} now"
        for name in sorted({*old, *new} - _FREE)
        if old.get(name) != new.get(name)
    ]
    if changed:
        raise ValueError(
            f"ctxfast.training: {path} holds a run of another configuration: {'; '.join(changed)}. "
            "Go on with the same, choose another directory, or pass overwrite to start anew."
        )


def _unhidden(error: BaseException, target: Path) -> BaseException:
    """What the system said where torch's writer of archives, left with half of one, complains of that instead."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return error if cause is None else OSError(cause.errno, cause.strerror, str(target))


class RunDirectory:
    """A run's directory.

    Args:
        path: made if it is not there.
        config: plain values, nested, that the run's results depend on.
        resume: go on where the directory's run stopped.
        overwrite: remove an earlier run, whatever its configuration.

    Raises:
        ValueError: it holds a run of another configuration, one and ``resume`` is off, or files of somebody else.
        RuntimeError: another process works in it.
    """

    def __init__(
        self, path: str | os.PathLike[str], config: Mapping[str, Any], resume: bool = True, overwrite: bool = False
    ) -> None:
        self.path = Path(path)
        check_directory(self.path)
        config = json.loads(json.dumps(config))  # as it will be read: lists for tuples
        self.path.mkdir(parents=True, exist_ok=True)
        refusal = f"ctxfast.training: another process trains in {self.path}; wait for it, or choose another directory."
        self._lock = locked(self.path / "lock", refusal)
        try:
            self._start(config, resume, overwrite)
        except BaseException:
            self.close()
            raise

    def _start(self, config: dict[str, Any], resume: bool, overwrite: bool) -> None:
        file = self.path / "config.json"
        if overwrite:
            # config.json goes last: it tells that the directory is a run's.
            for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == "config.json"):
                is_left = _OURS.fullmatch(entry.name) and entry.name not in _PREPARED
                if is_left or _TEMPORARY.fullmatch(entry.name):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for entry in list(self.path.iterdir()):  # what a killed process left half-written, or put aside
            found = _TEMPORARY.fullmatch(entry.name)
            if found is None:
                continue
            target = self.path / found[1]
            if entry.name.endswith(".old") and not target.exists():
                os.replace(entry, target)
            else:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if file.exists():
            if not resume:
                raise ValueError(
                    f"ctxfast.training: {self.path} holds a run already; expected an empty directory. "
                    "Pass resume, or overwrite to start anew."
                )
            _compare(self.path, _read_config(file), config)
        else:
            with replacing(file) as temporary:
                temporary.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    def close(self) -> None:
        """Let others in."""
        self._lock.close()

    def checkpoints(self) -> list[Path]:
        """Oldest first."""
        found = [entry for entry in self.path.iterdir() if _CHECKPOINT.fullmatch(entry.name)]
        return sorted(found, key=lambda entry: int(_CHECKPOINT.fullmatch(entry.name).group(1)))

    def save(self, step: int, state: dict[str, Any], keep: int) -> Path:
        """Write a checkpoint and remove all but the newest ``keep``.

        Raises:
            OSError: it cannot be written; earlier ones stay.
        """
        target = self.path / f"checkpoint-{step:08d}.pt"
        with replacing(target) as temporary:
            try:
                with open(temporary, "wb") as file:
                    torch.save(state, file)
                    file.flush()
                    os.fsync(file.fileno())
            except (OSError, RuntimeError) as error:
                raise _unhidden(error, target) from error
        for old in self.checkpoints()[:-keep]:
            old.unlink()
        return target

    def latest(self) -> dict[str, Any] | None:
        """The newest checkpoint, on the CPU; None if there is none.

        Raises:
            ValueError: it does not read; the way out is to remove it, the one before is taken then.
        """
        found = self.checkpoints()
        if not found:
            return None
        try:
            return torch.load(found[-1], map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"ctxfast.training: {found[-1]} does not read ({error}). Remove it; the run goes on from the one "
                "before."
            ) from error

    def cut_log(self, step: int) -> None:
        """Drop the lines of steps after ``step``: they will be made again."""
        file = self.path / "log.jsonl"
        if not file.exists():
            return
        kept = []
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the last line of a killed process
                continue
            if entry["step"] <= step:
                kept.append(line + "\n")
        with replacing(file) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")

    def log(self, entry: Mapping[str, Any]) -> None:
        with open(self.path / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        file = self.path / "log.jsonl"
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []

    def place_model(self, name: str, write: Callable[[Path], None]) -> Path:
        """Make the folder ``name`` ("best", "final") by ``write(folder)``: whole or not at all."""
        target = self.path / name
        with replacing_folder(target) as temporary:
            write(temporary)
        return target
