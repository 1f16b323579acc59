# SPDX-License-Identifier: Apache-2.0
"""Lines of text files: marks, encodings, and archives that are damaged."""

from __future__ import annotations

import gzip
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from ctxfast import cli
from ctxfast._core.text_files import MAX_LINE_BYTES
from ctxfast.embedding.lines import Corpus
from ctxfast.training.pretraining.text import text_lines
from ctxfast.training.readers.files import read_text

PACK = {".gz": lambda data: gzip.compress(data, mtime=0), ".xz": lzma.compress}
LINES = 2000


def harmed(suffix: str, how: str) -> bytes:
    """An archive of ``LINES`` lines that is cut short, has wrong bytes inside, or is none."""
    draw = random.Random(0)
    words = " ".join(draw.choice("abcdefgh") for _ in range(40))
    packed = PACK[suffix]("".join(f"{words} {draw.random()}\n" for _ in range(LINES)).encode())
    if how == "cut":
        return packed[: len(packed) // 2]
    if how == "wrong bytes":
        middle = len(packed) // 2
        return packed[:middle] + bytes(byte ^ 255 for byte in packed[middle : middle + 64]) + packed[middle + 64 :]
    return b"plain text under a packed file's name\n"


def by_windows(path: Path) -> None:
    for _ in Corpus(path).windows():
        pass


@pytest.mark.parametrize("how", ["cut", "wrong bytes", "no archive"])
@pytest.mark.parametrize("suffix", list(PACK))
@pytest.mark.parametrize("read", [lambda path: list(text_lines(path)), read_text, by_windows])
def test_a_damaged_archive_is_named(tmp_path: Path, read: Callable[[Path], object], suffix: str, how: str) -> None:
    path = tmp_path / f"text{suffix}"
    path.write_bytes(harmed(suffix, how))
    # Wrong bytes that unpack all the same are no text, most likely; the checksum comes after them.
    reason = f"(is damaged, cut short or no {suffix} file|is not UTF-8)" if how == "wrong bytes" else "is damaged"
    tool = {".gz": "gzip", ".xz": "xz"}[suffix]
    with pytest.raises(ValueError, match=rf"^ctxfast\..* {reason}.* {tool} -t tests it") as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_a_damaged_archive_is_named_with_the_last_good_line(tmp_path: Path) -> None:
    path = tmp_path / "text.gz"
    path.write_bytes(harmed(".gz", "cut"))
    read = []
    with pytest.raises(ValueError) as caught:
        read.extend(line for line in text_lines(path))
    seen = 0
    with pytest.raises(ValueError):
        for _ in text_lines(path):
            seen += 1
    assert 0 < seen < LINES and f"after line {seen}, is damaged" in str(caught.value)


@pytest.mark.parametrize("kind", ["bert", "elmo"])
def test_commands_name_a_damaged_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    path = tmp_path / "text.xz"
    path.write_bytes(harmed(".xz", "cut"))
    more = ["--train-vocab", "90", "--size", "tiny"] if kind == "bert" else []
    assert cli.main(["pretrain", kind, str(path), "-o", str(tmp_path / "run"), "--steps", "1", *more]) == 2
    message = capsys.readouterr().err
    assert str(path) in message and "xz -t" in message and "Traceback" not in message


@pytest.mark.parametrize("suffix", ["", *PACK])
def test_marks_and_line_ends(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"text{suffix}"
    path.write_bytes(PACK.get(suffix, bytes)("\ufeffone\r\ntwo \ufeff\n\nlast\u2028same line".encode()))
    assert list(text_lines(path)) == ["one", "two \ufeff", "", "last\u2028same line"]


def test_a_file_without_line_ends_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"first line\n" + b"x" * (MAX_LINE_BYTES + 1))
    with pytest.raises(ValueError, match=r"line 2 of .*text has more than 16777216 bytes; expected lines of text"):
        list(text_lines(path))
    path.write_bytes(b"x" * MAX_LINE_BYTES)
    assert [len(line) for line in text_lines(path)] == [MAX_LINE_BYTES]


def test_other_encodings_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("good\ncafé\n".encode("latin-1"))
    with pytest.raises(ValueError, match="line 2 of .*latin is not UTF-8 .*iconv"):
        list(text_lines(tmp_path / "latin"))
    with pytest.raises(FileNotFoundError, match="is a directory; expected a text file"):
        list(text_lines(tmp_path))


ONE = b"a\tx\nb\ty\n"


@pytest.mark.parametrize(
    ("suffix", "data", "is_sound"),
    [
        (".xz", lambda one: one + one, True),
        (".xz", lambda one: one + bytes(8) + one + bytes(4), True),
        (".xz", lambda one: one + bytes(3), False),
        (".xz", lambda one: one + b"junk", False),
        (".xz", lambda one: one + one[:-6], False),
        (".xz", lambda one: one + one[:6] + b"zz" + one[8:], False),
        (".xz", lambda one: b"", False),
        (".xz", lambda one: bytes(8), False),
        (".gz", lambda one: one + one, True),
        (".gz", lambda one: one + bytes(8), True),
        (".gz", lambda one: one + b"junk", False),
        (".gz", lambda one: one + one[:-6], False),
        (".gz", lambda one: b"", False),
    ],
)
def test_archives_are_read_to_their_end(tmp_path: Path, suffix: str, data: Callable, is_sound: bool) -> None:
    """What follows a whole part is another, or damage: nothing is left out in silence. As ``gzip -t`` and ``xz -t``."""
    path = tmp_path / f"text{suffix}"
    path.write_bytes(data(PACK[suffix](ONE)))
    for read in (lambda path: list(text_lines(path)), read_text, by_windows):
        if is_sound:
            read(path)
            assert len(list(text_lines(path))) % 2 == 0
        else:
            with pytest.raises(ValueError, match=f"is damaged, cut short or no {suffix} file"):
                read(path)


def test_windows_of_a_packed_file_go_on_in_the_middle(tmp_path: Path) -> None:
    (path := tmp_path / "text.xz").write_bytes(lzma.compress(b"a b\n" * 3000) + lzma.compress(b"c d\n" * 3000))
    windows = list(Corpus(path, window=500).windows())
    rest = list(Corpus(path, window=500).windows(windows[7].end))
    assert [window.texts for window in rest] == [window.texts for window in windows[8:]] and rest[0].texts[-1] == b"c d"


def test_an_archive_that_asks_for_too_much_memory(tmp_path: Path) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 30}]
    (path := tmp_path / "a.tsv.xz").write_bytes(lzma.compress(ONE, filters=filters))
    with pytest.raises(ValueError, match="Memory usage limit"):
        read_text(path)


@pytest.mark.parametrize("suffix", list(PACK))
def test_a_small_file_that_unpacks_to_a_large_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr("ctxfast._core.text_files._SURE_BYTES", 1 << 16)
    (path := tmp_path / f"a.tsv{suffix}").write_bytes(PACK[suffix](b"a good film\tpositive\n" * 200_000))
    with pytest.raises(ValueError, match=rf"a.tsv{suffix}: is packed to less than a 50th: more than .* Unpack it"):
        read_text(path)
    path.write_bytes(PACK[suffix](b"a good film\tpositive\n" * 2000))
    assert len(read_text(path)) == 42_000


def test_what_is_read_whole_has_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path := tmp_path / "a.tsv").write_bytes(b"a\tx\n" + b"b" * 3000 + b"\tx\n")
    monkeypatch.setattr("ctxfast.training.readers.files.MAX_LINE_BYTES", 1000)
    with pytest.raises(ValueError, match="a.tsv, line 2: has more than 1000 bytes; expected lines"):
        read_text(path)
    read_text(path, has_lines=False)
    monkeypatch.setattr("ctxfast._core.text_files.MAX_WHOLE_BYTES", 2000)
    with pytest.raises(ValueError, match="a.tsv: is large: more than"):
        read_text(path, has_lines=False)
