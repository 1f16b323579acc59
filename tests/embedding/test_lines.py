# SPDX-License-Identifier: Apache-2.0
"""Reading text in windows, and batches."""

from __future__ import annotations

import gzip
import io
import lzma
from pathlib import Path

import numpy as np
import pytest

from ctxfast._core import digests, text_files
from ctxfast.embedding import batch_encoder, job, lines
from ctxfast.embedding.lines import Corpus, Position


def read(path: Path, start: Position | None = None, **options) -> tuple[list[bytes], list[int], list[Position]]:
    texts, numbers, ends = [], [], []
    windows = list(Corpus(path, **options).windows(start))
    assert [window.is_last for window in windows] == [False] * (len(windows) - 1) + [True]
    for window in windows:
        texts += window.texts
        numbers += window.numbers
        ends.append(window.end)
    return texts, numbers, ends


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", []),
        (b"one", [b"one"]),
        (b"one\n", [b"one"]),
        (b"one\ntwo", [b"one", b"two"]),
        (b"one\r\ntwo\r\n", [b"one", b"two"]),
        (b"\n\n", [b"", b""]),
        (b"\xef\xbb\xbfone\n\xef\xbb\xbftwo", [b"one", b"\xef\xbb\xbftwo"]),
        ("a\u2028b\x0cc\x85\x1cd\n".encode(), ["a\u2028b\x0cc\x85\x1cd".encode()]),
        (b"a\rb\n", [b"a\rb"]),
        (b"\xff\xfe\x00\n", [b"\xff\xfe\x00"]),
    ],
)
def test_lines(tmp_path, content, expected):
    path = tmp_path / "in.txt"
    path.write_bytes(content)
    for window in (1, 2, 100):
        texts, numbers, ends = read(path, window=window)
        assert texts == expected and numbers == list(range(len(expected)))
        assert ends[-1] == Position(len(content), len(expected))


def test_windows_resume_anywhere(tmp_path):
    path = tmp_path / "in.txt"
    path.write_bytes(b"".join(b"line %d\r\n" % i + b"\n" * (i % 3 == 0) for i in range(50)))
    texts, numbers, ends = read(path, empty="skip", window=7)
    assert len(texts) == 50 and numbers[:4] == [0, 2, 3, 4]
    for k, end in enumerate(ends[:-1]):
        rest = read(path, end, empty="skip", window=7)
        assert rest[0] == texts[7 * (k + 1) :] and rest[1] == numbers[7 * (k + 1) :] and rest[2] == ends[k + 1 :]


@pytest.mark.parametrize("suffix, compress", [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_compressed(tmp_path, suffix, compress):
    path = tmp_path / f"in.txt{suffix}"
    path.write_bytes(compress(b"one\ntwo\nthree\n"))
    texts, _, ends = read(path, window=2)
    assert texts == [b"one", b"two", b"three"] and Corpus(path).size is None
    assert read(path, ends[0], window=2)[0] == [b"three"]
    path.write_bytes(compress(b"one\ntwo\n" * 1000)[:-20])
    with pytest.raises(ValueError, match="is damaged, cut short or no"):
        read(path)


def test_window_ends_by_bytes_at_a_multiple(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "_WINDOW_BYTES", 100)
    path = tmp_path / "in.txt"
    path.write_bytes(b"0123456789\n" * 64)
    sizes = [len(window.texts) for window in Corpus(path).windows()]
    assert sizes == [10, 10, 10, 10, 10, 10, 4]
    sizes = [len(window.texts) for window in Corpus(path, multiple=4).windows()]
    assert sizes == [12, 12, 12, 12, 12, 4]
    assert Corpus(path, window=10, multiple=4).window == 8 and Corpus(path, window=3, multiple=4).window == 4


@pytest.mark.parametrize("blank", [b"", b"  \t", "\u3000\xa0".encode(), b"\r"])
def test_blank_lines(tmp_path, blank):
    path = tmp_path / "in.txt"
    path.write_bytes(b"a\n" + blank + b"\nb\n")
    assert lines.is_blank(blank) and not lines.is_blank(blank + b"a") and not lines.is_blank("\xe9".encode() + blank)
    assert len(read(path)[0]) == 3
    assert read(path, empty="skip")[:2] == ([b"a", b"b"], [0, 2])
    assert sum(window.skipped for window in Corpus(path, empty="skip").windows()) == 1
    with pytest.raises(ValueError, match="line 2 of .*in.txt is blank"):
        read(path, empty="error")


def test_errors(tmp_path, monkeypatch):
    path = tmp_path / "in.txt"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Corpus(path)
    with pytest.raises(FileNotFoundError, match="is a directory"):
        Corpus(tmp_path)
    path.write_bytes(b"short\n" + b"x" * 50)
    with pytest.raises(ValueError, match="empty is 'drop'; expected one of keep, skip, error"):
        Corpus(path, empty="drop")
    with pytest.raises(ValueError, match="window is 0"):
        Corpus(path, window=0)
    monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 20)
    with pytest.raises(ValueError, match="line 2 of .* has more than 20 bytes"):
        read(path)


@pytest.mark.parametrize("is_padded", [True, False])
@pytest.mark.parametrize("budget", [1, 64, 1000])
def test_token_batches(is_padded, budget):
    lengths = np.random.default_rng(0).integers(0, 90, 300).tolist()
    batches = batch_encoder.token_batches(lengths, budget, is_padded=is_padded)
    assert sorted(index for batch in batches for index in batch) == list(range(300))
    order = [lengths[index] for batch in batches for index in batch]
    assert order == sorted(lengths, reverse=True)
    for batch in batches:
        cost = len(batch) * lengths[batch[0]] if is_padded else sum(lengths[index] for index in batch)
        assert cost <= budget or len(batch) == 1
    # No batch could have taken the next text, too.
    for batch, following in zip(batches, batches[1:]):
        extra = lengths[following[0]]
        cost = (len(batch) + 1) * lengths[batch[0]] if is_padded else sum(lengths[i] for i in batch) + extra
        assert cost > budget


def test_equal_lengths_keep_their_order():
    assert batch_encoder.token_batches([3, 5, 3, 5, 3], 100, is_padded=False) == [[1, 3, 0, 2, 4]]
    assert batch_encoder.token_batches([], 100, is_padded=True) == []
    assert batch_encoder.fixed_batches(5, 2) == [[0, 1], [2, 3], [4]] and batch_encoder.fixed_batches(0, 2) == []


def test_fingerprint_and_spool(tmp_path):
    path = tmp_path / "file"
    content = bytes(range(256)) * 2048
    assert job.copy_stream(io.BytesIO(content), path) == len(content)
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]
    before = digests.fingerprint(path)
    assert before == digests.fingerprint(path) and before["size"] == len(content)
    other = bytearray(content)
    other[-1] ^= 1
    path.write_bytes(other)
    after = digests.fingerprint(path)
    assert after["ends"] != before["ends"]
    assert digests.digest(path) != digests.digest(__file__)
