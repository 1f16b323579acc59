# SPDX-License-Identifier: Apache-2.0
"""Files and folders that appear whole, locks, errors of the disk."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest
from support.kills import run_until

from ctxfast._core import files
from ctxfast._core.files import LatchedFile, clear_left, create, locked, naming, replacing, replacing_folder
from ctxfast._core.hdf5 import new_hdf5


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def make_file(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def make_folder(path: Path, text: str) -> None:
    with replacing_folder(path) as temporary:
        (temporary / text).write_text(text)


@pytest.mark.parametrize(
    ("output", "input", "found"),
    [
        ("a/in", "a/in", "is"),
        ("a/../a/in", "a/in", "is"),
        ("a/in", "link", "is"),
        ("link", "a/in", "is"),
        ("hard", "a/in", "is"),
        ("folder/in", "a/in", "is"),
        ("a", "a/in", "holds"),
        (".", "a/in", "holds"),
        ("folder", "a/in", "holds"),
        ("a", "a/none/model.ckpt", "holds"),
        ("none", "none", "is"),
        ("a/out", "a/in", None),
        ("a/in.2", "a/in", None),
        ("a/in", "a", None),
    ],
)
def test_what_would_destroy_an_input_is_refused(tmp_path, monkeypatch, output, input, found):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "in").write_text("x")
    (tmp_path / "link").symlink_to("a/in")
    (tmp_path / "folder").symlink_to("a")
    (tmp_path / "hard").hardlink_to("a/in")
    read = {"nothing": [], "the input": ["/elsewhere", input]}
    if found is None:
        files.check_apart("ctxfast.x", {"-o": [output]}, read)
        return
    with pytest.raises(ValueError) as error:
        files.check_apart("ctxfast.x", {"-o": [output]}, read)
    assert str(error.value) == f"ctxfast.x: -o {output} {found} the input {input}; expected another place."


@pytest.mark.parametrize("make", [make_file, make_folder])
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_rights_are_those_of_the_umask(tmp_path, make, mask):
    before = os.umask(mask)
    try:
        make(tmp_path / "x", "a")
        make(tmp_path / "x", "b")
    finally:
        os.umask(before)
    full = 0o777 if make is make_folder else 0o666
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == full & ~mask


@pytest.mark.parametrize("is_folder", [False, True])
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_that_a_library_keeps_to_their_owner_get_the_rights_too(tmp_path, is_folder, mask):
    """As safetensors makes them."""

    def write(path):
        path.write_text("weights")
        path.chmod(0o600)

    before = os.umask(mask)
    try:
        if is_folder:
            with replacing_folder(tmp_path / "x") as temporary:
                (temporary / "below").mkdir()
                write(temporary / "below" / "weights")
        else:
            with replacing(tmp_path / "x") as temporary:
                write(temporary)
    finally:
        os.umask(before)
    made = tmp_path / "x" / "below" / "weights" if is_folder else tmp_path / "x"
    assert stat.S_IMODE(made.stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("make", [make_file, make_folder])
@pytest.mark.parametrize("is_cleared", [False, True])
def test_killed_at_every_step(tmp_path, make, is_cleared):
    """What stood there stays until the new one is whole; the next one clears away what is left, or ``clear_left``."""
    (path := tmp_path / "folder" / "x").parent.mkdir()
    step, seen, results = 0, [], set()
    while seen is not None:
        make(path, "old")
        seen = run_until(step, lambda: make(path, "new"))
        if seen is not None:
            clear_left(path.parent) if is_cleared else make(path, "new")
        results.add(path.read_text() if make is make_file else names(path)[0])
        assert names(path.parent) in (["x"], ["x", "x/old"], ["x", "x/new"]), (step, seen)
        step += 1
    assert step > 5 and results == ({"old", "new"} if is_cleared else {"new"})


@pytest.mark.parametrize("make", [make_file, make_folder])
def test_an_error_leaves_what_stood_there(tmp_path, make):
    make(tmp_path / "x", "old")
    with pytest.raises(ZeroDivisionError), (replacing if make is make_file else replacing_folder)(tmp_path / "x"):
        raise ZeroDivisionError
    assert names(tmp_path) in (["x"], ["x", "x/old"])


def test_the_folder_of_the_one_before_goes_while_the_next_one_looks(tmp_path, monkeypatch):
    mkdir, calls = os.mkdir, []

    def there_and_gone(path, *args) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise FileExistsError(errno.EEXIST, "File exists", path)
        mkdir(path, *args)

    monkeypatch.setattr(os, "mkdir", there_and_gone)
    with replacing(tmp_path / "x") as temporary:
        temporary.write_text("written")
    assert len(calls) == 2 and (tmp_path / "x").read_text() == "written" and names(tmp_path) == ["x"]


def test_who_comes_second_waits(tmp_path):
    path, order = tmp_path / "x", []
    inside, go = threading.Event(), threading.Event()

    def first() -> None:
        with replacing(path) as temporary:
            inside.set()
            go.wait()
            clear_left(tmp_path)  # nothing that is being made is cleared away
            temporary.write_text("first")
            order.append("first")

    def second() -> None:
        inside.wait()
        go.set()
        with replacing(path) as temporary:
            order.append("second")
            temporary.write_text("second")

    threads = [threading.Thread(target=call) for call in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order == ["first", "second"] and path.read_text() == "second" and names(tmp_path) == ["x"]


@pytest.mark.parametrize("make", [make_file, make_folder])
def test_links_are_not_followed(tmp_path, make):
    """Where others can write, they may have put links under the names that are used on the way."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "precious").write_text("precious")
    (tmp_path / ".x.ctxfast").symlink_to(theirs)
    make(tmp_path / "x", "new")
    (tmp_path / ".x.ctxfast").mkdir()
    (tmp_path / ".x.ctxfast" / "new").symlink_to(theirs / "precious")
    make(tmp_path / "x", "new")
    (tmp_path / ".x.ctxfast").symlink_to(theirs)
    clear_left(tmp_path)
    assert names(theirs) == ["precious"] and (theirs / "precious").read_text() == "precious"


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "pipe"])
def test_what_is_no_lock(tmp_path, kind):
    """A link is replaced and what it points to left alone; anything else is refused."""
    path, theirs = tmp_path / "lock", tmp_path / "theirs"
    if kind == "link":
        theirs.write_text("precious")
    if "link" in kind:
        path.symlink_to(theirs)
        locked(path, "ctxfast.x", "another process").release()
        assert path.is_file() and not path.is_symlink() and path.stat().st_size == 0
        assert theirs.exists() == (kind == "link") and (kind != "link" or theirs.read_text() == "precious")
        return
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(ValueError, match=r"^ctxfast\.x: .*lock is not a file; expected one to lock\. Remove it\.$"):
        locked(path, "ctxfast.x", "another process")
    assert path.exists()


def test_a_lock_empties_nothing_and_is_held_once(tmp_path):
    (tmp_path / "lock").write_text("precious")
    lock = locked(tmp_path / "lock", "ctxfast.x", "another process works there.")
    with pytest.raises(RuntimeError, match=r"^ctxfast\.x: another process works there\.$"):
        locked(tmp_path / "lock", "ctxfast.x", "another process works there.")
    lock.release()
    locked(tmp_path / "lock", "ctxfast.x", "").release()
    assert (tmp_path / "lock").read_text() == "precious"


def test_a_lock_that_lost_its_name_is_taken_anew(tmp_path, monkeypatch):
    """Whoever held it removed it between our opening and locking it."""
    flock, seen = fcntl.flock, []

    def once(handle, how):
        if not seen:
            seen.append(os.unlink(tmp_path / "lock"))
        return flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", once)
    lock = locked(tmp_path / "lock", "ctxfast.x", "")
    with open(tmp_path / "lock") as named, pytest.raises(BlockingIOError):
        flock(named, fcntl.LOCK_EX | fcntl.LOCK_NB)
    lock.release()
    assert seen


def test_create_replaces_what_is_there(tmp_path):
    (tmp_path / "theirs").write_text("precious")
    (tmp_path / "x").symlink_to(tmp_path / "theirs")
    with create(tmp_path / "x") as file:
        file.write(b"new")
    assert (tmp_path / "theirs").read_text() == "precious" and not (tmp_path / "x").is_symlink()


def _full() -> None:
    raise OSError(errno.ENOSPC, "full")


def _hidden() -> None:
    try:
        _full()
    except OSError:
        raise RuntimeError("unexpected position") from None


def _rust() -> None:
    raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


def _other() -> None:
    open("/no/such/file")


@pytest.mark.parametrize(
    ("fail", "kind", "text"),
    [
        (_full, OSError, "No space left on device: '/a/name'"),
        (_hidden, OSError, "No space left on device: '/a/name'"),
        (_rust, OSError, "No space left on device: '/a/name'"),
        (_other, FileNotFoundError, "No such file or directory: '/no/such/file'"),
        (lambda: 1 // 0, ZeroDivisionError, "by zero"),
    ],
)
def test_errors_of_the_system_have_a_name(fail, kind, text):
    with pytest.raises(kind, match=text), naming(Path("/a/name")):
        fail()


@pytest.mark.parametrize("room", [0, 100, 1000, 3000, 10_000, 50_000])
def test_hdf5_on_a_full_disk(tmp_path, monkeypatch, room):
    """One error, no crash: also when it is closed, again at every write before."""

    class Small(LatchedFile):
        def write(self, data):
            if self.error is None and self.tell() + memoryview(data).nbytes > room:
                self.error = OSError(errno.ENOSPC, "full")
            return super().write(data)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device: .*x.hdf5'"):
        patch.setattr("ctxfast._core.hdf5.LatchedFile", Small)
        with new_hdf5(tmp_path / "x.hdf5") as (file, check):
            for number in range(200):
                file[str(number)] = np.zeros(100, np.float32)
                if number > 100:
                    check()
    with new_hdf5(tmp_path / "y.hdf5") as (file, check):
        file["a"] = np.arange(3)
        check()
    with h5py.File(tmp_path / "y.hdf5") as file:
        assert file["a"][...].tolist() == [0, 1, 2]
