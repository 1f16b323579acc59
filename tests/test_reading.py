# SPDX-License-Identifier: Apache-2.0
"""The edge of file readers: every error is a sentence of the package's own and names the file."""

from __future__ import annotations

import json
import struct

import pytest

from ctxfast._core.reading import read_json, reading

_WHO = "ctxfast.test"


def _deep():
    json.loads("[" * 200_000)


def _digits():
    int("9" * 5000)


def _keyed():
    raise KeyError("ctxfast.Thing: no such name")


def _own(kind, text):
    def fail():
        raise kind(text)

    return fail


class Awkward(Exception):
    """Takes two arguments, so it cannot be made from a text alone."""

    def __init__(self, code, text):
        super().__init__(text)


def _awkward():
    raise Awkward(3, "ctxfast.other: is wrong")


@pytest.mark.parametrize(
    ("fail", "kind", "words"),
    [
        (_deep, ValueError, "RecursionError"),
        (_digits, ValueError, "damaged"),
        (lambda: b"\xff".decode(), ValueError, "UnicodeDecodeError"),
        (lambda: {}["x"], ValueError, "KeyError"),
        (lambda: [][3], ValueError, "IndexError"),
        (lambda: struct.unpack("<Q", b""), ValueError, "error"),
        (lambda: 1 // 0, ValueError, "ZeroDivisionError"),
        (lambda: None.shape, ValueError, "AttributeError"),
        (lambda: "x" + 1, ValueError, "TypeError"),
        (lambda: next(iter(())), ValueError, "StopIteration"),
        (_own(MemoryError, ""), MemoryError, "needs more memory"),
        (_own(OSError, "no file handle"), ValueError, "no file handle"),
        (_own(ValueError, "a" * 3000), ValueError, "..."),
        (lambda: open("/no such file"), FileNotFoundError, "cannot be read"),
        (lambda: open("/"), IsADirectoryError, "cannot be read"),
        (_own(TypeError, "ctxfast.other: x is 3; expected 4."), TypeError, "x is 3; expected 4. (in "),
        (_keyed, KeyError, "no such name (in "),
        (_awkward, ValueError, "is wrong (in "),
    ],
)
def test_whatever_goes_wrong_names_the_file(tmp_path, fail, kind, words):
    path = tmp_path / "model.bin"
    with pytest.raises(Exception) as caught, reading(path, _WHO):
        fail()
    text = str(caught.value.args[0])
    assert type(caught.value) is kind
    assert text.startswith("ctxfast.") and str(path) in text and words in text
    assert len(text) < 500 and "\n" not in text
    assert caught.value.__cause__ is not None


def test_an_error_that_names_the_file_already_is_left_alone(tmp_path):
    path = tmp_path / "model.bin"
    error = ValueError(f"ctxfast.other: {path} is wrong")
    with pytest.raises(ValueError) as caught, reading(path, _WHO):
        raise error
    assert caught.value is error


def test_an_interruption_is_no_damage(tmp_path):
    with pytest.raises(KeyboardInterrupt), reading(tmp_path, _WHO):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "JSONDecodeError"),
        (b"{", "JSONDecodeError"),
        (b"[]", "holds a JSON list"),
        (b"null", "holds a JSON NoneType"),
        (b"\xff{}", "UnicodeDecodeError"),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "RecursionError"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
    ],
)
def test_read_json_refuses(tmp_path, data, words):
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(ValueError) as caught:
        read_json(path, _WHO)
    assert str(caught.value).startswith(f"{_WHO}: {path} ") and words in str(caught.value)


def test_read_json_of_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ctxfast\.test: .*x\.json cannot be read"):
        read_json(tmp_path / "x.json", _WHO)
