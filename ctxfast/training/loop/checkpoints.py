# SPDX-License-Identifier: Apache-2.0
"""The directory of a training run: what it was started with, its checkpoints, its log, the models it made.

``config.json`` is written first and never changed; ``checkpoint-STEP.pt`` appear whole or not at all; ``log.jsonl``
has a line for each report; ``best/`` and ``final/`` are models in their own format. Going on with a directory asks for
the same configuration. ``data/`` is left to the task: what it made of its input, with its own check of what from.
``lock`` stays, empty: to remove it would let two processes hold one each.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..._core.checks import shown
from ..._core.files import clear_left, create, locked, naming, remove, replacing, replacing_folder
from ..._core.reading import read_json, reading

_CHECKPOINT = re.compile(r"checkpoint-(\d+)\.pt")
# What a checkpoint holds.
_STATE = {
    "format": int,
    "step": int,
    "model": dict,
    "optimizer": dict,
    "scaler": (dict, type(None)),
    "ranks": list,
    "figures": dict,
    "best": (dict, type(None)),
    "seconds": float,
}
_OURS = re.compile(r"checkpoint-\d+\.pt|config\.json|log\.jsonl|lock|best|final|tensorboard|data")
# A directory holds no more than this before its run has started.
_PREPARED = ("data", "lock")
# These may differ when a run goes on: results do not depend on them.
_FREE = frozenset({"loop.keep", "loop.log_every", "loop.save_every", "loop.tensorboard", "loop.device"})

# Differences that a refusal names.
_MOST_NAMED = 3
_LONGEST_NAME = 300  # names hold paths
_LONGEST_COMMAND = 80


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


def check_kind(path: str | os.PathLike[str], command: str) -> None:
    """``check_directory``; and refuse a directory that holds a run of another command, before anything is read.

    Raises:
        ValueError: naming both.
    """
    check_directory(path)
    file = Path(path) / "config.json"
    if file.exists():
        was = _read_config(file)["settings"].get("command")
        if was != command:
            raise _refusal(Path(path), _other_kind(was, command))


def _other_kind(was: object, now: object) -> str:
    was, now = (str(command or "another program")[:_LONGEST_COMMAND] for command in (was, now))
    return f"holds a run of {was}, and this is one of {now}"


def _refusal(path: Path, found: str) -> ValueError:
    return ValueError(
        f"ctxfast.training: {path} {found}. Go on with the same, choose another directory, or pass overwrite "
        "(--overwrite) to start anew."
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
        config = read_json(file, "ctxfast.training")
        reason = next((f"no {name!r}" for name in ("loop", "settings") if not isinstance(config.get(name), dict)), None)
    except ValueError as error:
        reason = str(error).removeprefix(f"ctxfast.training: {file} ")
    if reason is not None:
        raise ValueError(
            f"ctxfast.training: {file} is not what a run was started with ({reason}); expected it as it was written. "
            "Choose another directory, or pass overwrite to start anew."
        )
    return config


def _compare(path: Path, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    old, new = dict(_leaves(before)), dict(_leaves(after))
    changed = [
        f"{name[:_LONGEST_NAME]} was {shown(old.get(name))} and is {shown(new.get(name))} now"
        for name in sorted({*old, *new} - _FREE, key=lambda name: (name.startswith("settings.sha256"), name))
        if old.get(name) != new.get(name)
    ]
    if changed:
        was, now = (config.get("settings.command") for config in (old, new))
        if was != now:
            found = _other_kind(was, now)
        else:
            more = len(changed) - _MOST_NAMED
            rest = f"; and {more} more differences" if more > 0 else ""
            found = f"holds a run of another configuration: {'; '.join(changed[:_MOST_NAMED])}{rest}"
        raise _refusal(path, found)


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


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
        busy = f"another process trains in {self.path}; wait for it, or choose another directory."
        self._lock = locked(self.path / "lock", "ctxfast.training", busy)
        try:
            self._start(config, resume, overwrite)
        except BaseException:
            self.close()
            raise

    def _start(self, config: Mapping[str, Any], resume: bool, overwrite: bool) -> None:
        file = self.path / "config.json"
        clear_left(self.path)
        if overwrite:
            # config.json goes last: it tells that the directory is a run's.
            for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == "config.json"):
                if _OURS.fullmatch(entry.name) and entry.name not in _PREPARED:
                    remove(entry)
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
        self._lock.release()

    def checkpoints(self) -> list[Path]:
        """Oldest first."""
        found = [
            (int(match[1]), entry) for entry in self.path.iterdir() if (match := _CHECKPOINT.fullmatch(entry.name))
        ]
        return [entry for _, entry in sorted(found)]

    def save(self, step: int, state: dict[str, Any], keep: int) -> Path:
        """Write a checkpoint and remove all but the newest ``keep``.

        Raises:
            OSError: it cannot be written; earlier ones stay.
        """
        target = self.path / f"checkpoint-{step:08d}.pt"
        with replacing(target) as temporary, create(temporary) as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        self.prune(keep)
        return target

    def prune(self, keep: int) -> None:
        """Remove all checkpoints but the newest ``keep``."""
        for old in self.checkpoints()[:-keep]:
            old.unlink()

    def latest(self) -> dict[str, Any] | None:
        """The newest checkpoint, on the CPU; None if there is none.

        Raises:
            ValueError: it does not read; the way out is to remove it, the one before is taken then.
        """
        found = self.checkpoints()
        if not found:
            return None
        try:
            with reading(found[-1], "ctxfast.training", "checkpoint"):
                state = torch.load(found[-1], map_location="cpu", weights_only=True)
                for name, kind in _STATE.items():
                    if not isinstance(state[name], kind):
                        raise ValueError(f"its {name!r} is a {type(state[name]).__name__}")
        except ValueError as error:
            reason = str(error).removeprefix(f"ctxfast.training: {found[-1]} ")
            before = "the run goes on from the one before" if len(found) > 1 else "the run begins anew"
            raise ValueError(f"ctxfast.training: {found[-1]} does not read ({reason}). Remove it; {before}.") from error
        return state

    def cut_log(self, step: int) -> None:
        """Drop the lines of steps after ``step``: they will be made again."""
        file = self.path / "log.jsonl"
        if not file.exists():
            return
        kept = [json.dumps(entry) + "\n" for entry in self.read_log() if entry["step"] <= step]
        with replacing(file) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")

    def log(self, entry: Mapping[str, Any]) -> None:
        file = self.path / "log.jsonl"
        with naming(file), open(file, "a", encoding="utf-8", opener=_no_link) as out:
            out.write(json.dumps(entry) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """Its entries; the last line may be half of one, of a process that was killed.

        Raises:
            ValueError: another line is none that a run wrote; the line is named.
        """
        file = self.path / "log.jsonl"
        if not file.exists():
            return []
        entries = []
        with reading(file, "ctxfast.training", "log of a run"):
            lines = file.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                is_entry = isinstance(entry, dict) and isinstance(entry.get("step"), int) and "kind" in entry
            except (ValueError, RecursionError):
                is_entry = False
            if is_entry:
                entries.append(entry)
            elif number < len(lines):  # what was written whole ends in a line end
                raise ValueError(
                    f"ctxfast.training: line {number} of {file} is no entry of a run's log ({line[:40]!r}). Remove the "
                    "file, and the run goes on with a new one."
                )
        return entries

    def place_model(self, name: str, write: Callable[[Path], None]) -> Path:
        """Make the folder ``name`` ("best", "final") by ``write(folder)``: whole or not at all."""
        target = self.path / name
        with replacing_folder(target) as temporary:
            write(temporary)
        return target
