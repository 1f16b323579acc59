# SPDX-License-Identifier: Apache-2.0
"""Files and folders that appear under their name only when they are whole; locks between processes.

While ``NAME`` is made there is a folder ``.NAME.ctxfast`` beside it, held by the process that makes it: ``new...`` is
what will be ``NAME``, ``old`` what has been. A process that is killed leaves it behind; the next one that makes
``NAME`` clears it away, and so does ``clear_left``. Everything gets the rights that the user's umask gives.
"""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from filelock import FileLock, Timeout

_Path = str | os.PathLike[str]
_WORKPLACE = re.compile(r"\.(.+)\.ctxfast")
# What a disk says that is full or broken; libraries often report what followed from it instead.
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

# Seconds after which a file counts as another process's: one that has just let go of it may have removed it meanwhile,
# and the next is tried then.
_PATIENCE = 0.1


# Locks


def locked(path: Path, who: str, busy: str) -> FileLock:
    """A file that this process alone holds: ``release``, or the end of the process, lets others in.

    Raises:
        RuntimeError: ``who: busy``, where another process holds it.
        ValueError: something else has its name; it is left as it is. A link is removed, what it points to is not.
    """
    lock = _held(path, who, waits=False)
    if lock is None:
        raise RuntimeError(f"{who}: {busy}")
    return lock


def _held(path: Path, who: str, *, waits: bool) -> FileLock | None:
    """The file ``path``, made if absent and locked; None where another process holds it."""
    # Not in the way of other threads; where a file system knows no locks, a file that a killed process leaves is none.
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    while True:
        # Others may have put anything there in a folder that is shared: a link is not followed, nothing is emptied.
        if path.is_symlink():
            remove(path)
        if os.path.lexists(path) and not path.is_file():
            raise ValueError(f"{who}: {path} is not a file; expected one to lock. Remove it.")
        try:
            with naming(path):
                return lock.acquire(timeout=-1 if waits else _PATIENCE).lock
        except Timeout:
            return None
        except OSError as error:
            if error.errno != errno.ELOOP:  # a link that was put there meanwhile
                raise


# What is made


def create(path: Path, buffering: int = -1) -> BinaryIO:
    """A new file to write and read. What had its name is removed first: a link there is not followed."""
    remove(path)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    return os.fdopen(handle, "w+b", buffering=buffering)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all in it, if it is there."""
    with suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            os.unlink(path)


def check_apart(who: str, outputs: Mapping[str, Iterable[_Path]], inputs: Mapping[str, Iterable[_Path]]) -> None:
    """Refuse what would destroy an input: an output that is one, by whatever name, or a folder that holds one.

    Args:
        who: begins the message.
        outputs, inputs: by what the message calls them. They need not exist.

    Raises:
        ValueError: naming both.
    """
    for name, output in _each(outputs):
        made = Path(output).expanduser().resolve()
        for kind, file in _each(inputs):
            read = Path(file).expanduser().resolve()
            is_same = made == read or (made.exists() and read.exists() and made.samefile(read))
            if is_same or read.is_relative_to(made):
                found = "is" if is_same else "holds"
                raise ValueError(f"{who}: {name} {output} {found} {kind} {file}; expected another place.")


def _each(named: Mapping[str, Iterable[_Path]]) -> Iterator[tuple[str, _Path]]:
    for name, files in named.items():
        for file in files:
            yield name, file


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to; the file is moved to ``path`` after the block, removed if it raises.

    Raises:
        OSError: of the system; it names ``path``. Where a library complains of what followed from a full disk, what the
            disk said is raised.
    """
    with _workplace(path) as place, naming(path, place):
        temporary = place / f"new{path.suffix}"
        yield temporary
        _give_rights(place, temporary)
        os.replace(temporary, path)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """``replacing`` for a folder, which is made."""
    with _workplace(path) as place, naming(path, place):
        temporary = place / "new"
        os.mkdir(temporary)
        yield temporary
        _give_rights(place, temporary)
        if os.path.lexists(path):
            os.replace(path, place / "old")
        os.replace(temporary, path)


def _give_rights(place: Path, made: Path) -> None:
    """Give what was made, and all in it, the rights that ``place`` got of the umask: safetensors makes files that their
    owner alone may read."""
    rights = place.stat().st_mode & 0o666
    for path in (made, *made.rglob("*")) if made.is_dir() else (made,):
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o777 != rights:
            path.chmod(rights)


def clear_left(folder: Path) -> None:
    """Clear away what killed processes left of things they were making in ``folder``; what they had put aside for the
    moment of an exchange has its name again."""
    for entry in sorted(folder.iterdir()):
        found = _WORKPLACE.fullmatch(entry.name)
        if found and entry.is_dir() and not entry.is_symlink():
            lock = _held(entry / "lock", "ctxfast.files", waits=False)
            if lock is not None:
                _clear(folder / found[1], entry)
                _leave(entry, lock)


@contextmanager
def _workplace(path: Path) -> Iterator[Path]:
    """The empty folder ``.NAME.ctxfast`` beside ``path``; who comes second waits."""
    place = path.with_name(f".{path.name}.ctxfast")
    lock = None
    while lock is None:
        if place.is_symlink() or (place.exists() and not place.is_dir()):
            remove(place)
        # Not Path.mkdir(exist_ok=True), which fails where the one before removes the folder while it looks.
        with naming(path, place), suppress(FileExistsError):
            os.mkdir(place)
        with suppress(FileNotFoundError):  # removed by the one before
            lock = _held(place / "lock", "ctxfast.files", waits=True)
    try:
        _clear(path, place)
        yield place
    finally:
        _leave(place, lock)


def _clear(path: Path, place: Path) -> None:
    """Everything but the lock; ``path`` is whole afterwards if it ever was."""
    if os.path.lexists(place / "old") and not os.path.lexists(path):
        os.replace(place / "old", path)
    for entry in list(place.iterdir()):
        if entry.name != "lock":
            remove(entry)


def _leave(place: Path, lock: FileLock) -> None:
    try:
        for entry in list(place.iterdir()):
            if entry.name != "lock":
                remove(entry)
        remove(place / "lock")
        with suppress(OSError):  # another process may have begun to wait in it
            os.rmdir(place)
    finally:
        lock.release()


# Errors


@contextmanager
def naming(path: Path, inside: Path | None = None) -> Iterator[None]:
    """Make errors of the system name ``path``, those without a name and those about something ``inside``.

    Libraries that stop in the middle of a file report that instead of its cause: the cause is raised, if it is the
    disk's.
    """
    try:
        yield
    except Exception as error:
        own = _system_error(error)
        if own is None:
            raise
        name = None if own.filename is None else os.fspath(own.filename)
        if own is error and name is not None and not (inside and Path(name).is_relative_to(inside)):
            raise
        number = own.errno or errno.EIO
        raise OSError(number, os.strerror(number), os.fspath(path)) from error


def _system_error(error: Exception) -> OSError | None:
    """The error itself, if it is the system's, or the disk's that led to it."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    if str(error).startswith("ctxfast."):
        return None
    # Of libraries in Rust, which write the number into their text.
    found = re.search(r"\(os error (\d+)\)", str(error))
    if found and int(found[1]) in _OF_THE_DISK:
        return OSError(int(found[1]), "")
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _OF_THE_DISK:
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


class LatchedFile(io.RawIOBase):
    """A new file whose first error of writing is kept in ``error``; what comes after it is dropped without a word.

    For libraries that cannot be stopped: HDF5 tries to write what is left whenever it closes something, at the end of
    the process, too, and crashes there.

    Args:
        path: of the file; what had the name is removed.
    """

    def __init__(self, path: Path) -> None:
        self._file = cast(io.FileIO, create(path, buffering=0))
        self.path = path
        self.error: OSError | None = None

    def check(self) -> None:
        """Raise the error that was kept, with the file's name."""
        if self.error is not None:
            number = self.error.errno or errno.EIO
            raise OSError(number, os.strerror(number), os.fspath(self.path)) from self.error

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        place = 0
        try:
            while self.error is None and place < len(view):
                place += self._file.write(view[place:])
        except OSError as error:
            self.error = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        size = self._file.tell() if size is None else size
        try:
            if self.error is None:
                self._file.truncate(size)
        except OSError as error:
            self.error = error
        return size

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(buffer)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()
