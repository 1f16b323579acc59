# SPDX-License-Identifier: Apache-2.0
"""Embedding files: kills at every step, going on, refusals, blank and long lines, standard input."""

from __future__ import annotations

import fcntl
import gzip
import io
import json
import os
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from support.fake_encoder import FakeEncoder, vectors
from support.kills import Killed, run_until

from ctxfast.embedding import job
from ctxfast.embedding.embedder import Embedder

LINES = [" ".join("abcdefghij"[i % 7 : i % 7 + 1 + i % 4]) for i in range(40)]


@pytest.fixture(autouse=True)
def no_power_cuts(monkeypatch):
    """What a killed process has written stays; waiting for the disk takes most of the time here."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "in.txt"
    path.write_text("\n".join(LINES) + "\n")
    return path


def embedder(**options) -> Embedder:
    state = options.pop("state", "steady")
    batches = {"batch_size": 4} if state == "carry" else {"batch_tokens": 8}
    return Embedder(FakeEncoder(**options), state=state, **batches)


def embed(source: Path | str, target: Path, model: Embedder | None = None, **options) -> job.Report:
    return (model or embedder()).embed_file(source, target, **{"window": 8, **options})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Kills


@pytest.mark.parametrize("state, overwrite", [("carry", False), pytest.param("steady", True, marks=pytest.mark.slow)])
def test_killed_at_every_step(source, tmp_path, state, overwrite):
    """Before every operation on files, those of the removal of the work directory included."""

    def run() -> job.Report:
        model = embedder(carries=state == "carry", state=state)
        return embed(source, target, model, layers="all", overwrite=overwrite)

    source.write_text("\n".join(LINES[:16]) + "\n")
    whole = tmp_path / "whole.npz"
    embed(source, whole, embedder(carries=state == "carry", state=state), layers="all")
    target = tmp_path / "out.npz"
    step, resumed, refused = 0, set(), []
    while True:
        if overwrite:
            target.write_text("old")
        seen = run_until(step, run)
        if seen is not None:
            try:
                resumed.add(run().resumed)
            except FileExistsError:  # nothing is left that could say who made it
                refused.append(step)
        assert target.read_bytes() == whole.read_bytes(), seen
        assert names(tmp_path) == ["in.txt", "out.npz", "whole.npz"], seen
        target.unlink()
        if seen is None:
            break
        step += 1
    # Two windows and the empty one that finds the end. Only before the very last operation is there no note any more.
    assert step > 40 and resumed >= {0, 8, 16} and refused == ([] if overwrite else [step - 1])


def test_killed_again_and_again(source, tmp_path):
    embed(source, tmp_path / "whole.jsonl")
    target = tmp_path / "out.jsonl"
    for _ in range(200):
        if run_until(60, lambda: embed(source, target)) is None:
            break
        assert not target.exists() or target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert names(tmp_path) == ["in.txt", "out.jsonl", "whole.jsonl"]


@pytest.mark.parametrize("again", [{"layers": 0}, {"empty": "error"}])
def test_a_finished_job_is_not_taken_for_another(source, tmp_path, again):
    """Killed in the removal: the same call is done, other arguments are refused as for any output that exists."""
    target, step = tmp_path / "out.jsonl", 0
    while not target.exists() or "finished.json" not in os.listdir(f"{target}.partial"):
        target.unlink(missing_ok=True)
        step += 1
        assert run_until(step, lambda: embed(source, target)) is not None
    with pytest.raises(FileExistsError, match="exists. Pass --overwrite"):
        embed(source, target, **again)
    assert names(tmp_path) == ["in.txt", "out.jsonl"]


def stop_after(count: int, **options) -> Embedder:
    """A model that is killed after so many batches."""
    model = embedder(**options)
    encode = model.encoder.encode

    def encode_or_die(batch, selection):
        if len(model.encoder.batches) == count:
            raise Killed
        return encode(batch, selection)

    model.encoder.encode = encode_or_die
    return model


def leave_unfinished(source: Path, target: Path, **options) -> None:
    with pytest.raises(Killed):
        embed(source, target, stop_after(8), **options)
    assert not target.exists() and (target.parent / f"{target.name}.partial").is_dir()


def test_only_what_is_missing_is_computed(source, tmp_path):
    target = tmp_path / "out.hdf5"
    leave_unfinished(source, target)
    model = embedder()
    report = embed(source, target, model)
    assert report.resumed in (8, 16, 24) and sum(map(len, model.encoder.batches)) == len(LINES) - report.resumed
    with h5py.File(target) as file:
        for number, line in enumerate(LINES):
            np.testing.assert_array_equal(file[str(number)][...], vectors(line.split())[-1])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(layers="all"), r"options.layers was \[2\] and is \[0, 1, 2\] now"),
        (dict(layers=0), r"options.layers was \[2\] and is \[0\] now"),
        (dict(level="sentence"), "options.level was 'token' and is 'sentence' now"),
        (dict(normalize=True), "options.normalize was False and is True now"),
        (dict(window=9), "options.window was 8 and is 9 now"),
        (dict(empty="skip"), "options.empty was 'keep' and is 'skip' now"),
    ],
)
def test_other_arguments_are_refused(source, tmp_path, options, message):
    target = tmp_path / "out.hdf5"
    leave_unfinished(source, target)
    with pytest.raises(ValueError, match=f"unfinished work of another job: .*{message}"):
        embed(source, target, **options)
    fresh = tmp_path / "fresh.hdf5"
    embed(source, fresh, **options)
    report = embed(source, target, **options, overwrite=True)
    assert report.resumed == 0 and target.read_bytes() == fresh.read_bytes()


def test_another_input_is_refused(source, tmp_path):
    target = tmp_path / "out.hdf5"
    leave_unfinished(source, target)
    source.write_text(source.read_text().replace("a", "x"))
    with pytest.raises(ValueError, match="input.ends was .* and is .* now"):
        embed(source, target)
    assert embed(source, target, overwrite=True).resumed == 0


def test_another_model_is_refused(source, tmp_path):
    target, weights = tmp_path / "out.hdf5", tmp_path / "weights"
    for content in ("one", "two"):
        weights.write_text(content)
        model = stop_after(8)
        model.encoder.files = (weights,)
        with pytest.raises(
            Killed if content == "one" else ValueError, match=None if content == "one" else "model.weights"
        ):
            embed(source, target, model)


def test_another_version_is_refused(source, tmp_path, monkeypatch):
    target = tmp_path / "out.hdf5"
    leave_unfinished(source, target)
    monkeypatch.setattr(job, "facts", lambda: {"ctxfast": "99", "gpu": ""})
    with pytest.raises(ValueError, match="versions.ctxfast was .* and is '99' now"):
        embed(source, target)


def test_options_of_the_output_may_change(source, tmp_path):
    target = tmp_path / "out.hdf5"
    leave_unfinished(source, target)
    assert embed(source, target, forget_sentences=True).resumed > 0
    with h5py.File(target) as file:
        assert "sentence_to_index" not in file


def test_overwrite_goes_on_with_its_own_work(source, tmp_path):
    target = tmp_path / "out.hdf5"
    target.write_text("old")
    with pytest.raises(Killed):
        embed(source, target, stop_after(8), overwrite=True)
    assert target.read_text() == "old"
    assert embed(source, target, overwrite=True).resumed > 0
    assert h5py.is_hdf5(target)


def stored(arrays: dict, compress: bool = False) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(file, **arrays)
    return file.getvalue()


def lying(arrays: dict) -> bytes:
    """The texts of a shard are 8 GB, says their header."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, values in arrays.items():
            with archive.open(f"{name}.npy", "w") as part:
                shape = (8 << 30,) if name == "texts" else values.shape
                header = {"descr": values.dtype.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(part, header)
                part.write(values.tobytes())
    return file.getvalue()


def counts(arrays: dict, **changes) -> dict:
    """The arrays with other counts."""
    values = {**json.loads(arrays["done"].tobytes()), **changes}
    return {**arrays, "done": np.frombuffer(json.dumps(values).encode(), np.uint8)}


BIG = np.zeros(0, np.int64)
DAMAGES = {
    "no archive": ("index", lambda data, arrays: b"PK"),
    "cut short": ("index", lambda data, arrays: data[: len(data) // 2]),
    "a byte changed": ("index", lambda data, arrays: data[:300] + bytes([data[300] ^ 255]) + data[301:]),
    "a lying header": ("index", lambda data, arrays: lying(arrays)),
    "compressed": ("index", lambda data, arrays: stored(arrays, compress=True)),
    "objects": ("index", lambda data, arrays: stored({**arrays, "state.x": np.array([{}], dtype=object)})),
    "no rows": ("index", lambda data, arrays: stored({k: v for k, v in arrays.items() if k != "rows"})),
    "rows as text": ("index", lambda data, arrays: stored({**arrays, "rows": arrays["rows"].astype(str)})),
    "rows below 0": ("index", lambda data, arrays: stored({**arrays, "rows": arrays["rows"] - 9})),
    "lines in disorder": ("index", lambda data, arrays: stored({**arrays, "numbers": arrays["numbers"][::-1]})),
    "offsets in disorder": ("index", lambda data, arrays: stored({**arrays, "texts_offsets": BIG})),
    "counts below 0": ("index", lambda data, arrays: stored(counts(arrays, offset=-5))),
    "counts of another kind": ("index", lambda data, arrays: stored(counts(arrays, line="7"))),
    "more counts": ("index", lambda data, arrays: stored(counts(arrays, more=1))),
    "empty values": ("values", lambda data, arrays: b""),
    "no JSON": ("json", lambda data, arrays: b"{"),
    "a list": ("json", lambda data, arrays: b"[]"),
    "a deep list": ("json", lambda data, arrays: b'{"a":' + b"[" * 100_000),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_work_is_refused_and_overwritten(source, tmp_path, damage):
    """The error names the file and the ways out, and both are."""
    target = tmp_path / "out.npz"
    leave_unfinished(source, target, window=16)
    kind, change = DAMAGES[damage]
    folder = tmp_path / "out.npz.partial"
    file = folder / ("manifest.json" if kind == "json" else f"00000000.{kind}")
    with np.load(folder / "00000000.index") as arrays:
        file.write_bytes(change(file.read_bytes(), dict(arrays)))
    with pytest.raises(ValueError, match=rf"^ctxfast\.embed: .*{file.name} .*Remove the directory .*--overwrite"):
        embed(source, target, window=16)
    assert not target.exists()
    assert embed(source, target, window=16, overwrite=True).resumed == 0
    assert names(tmp_path) == ["in.txt", "out.npz"]


def test_two_at_once(source, tmp_path):
    target = tmp_path / "out.hdf5"
    (tmp_path / "out.hdf5.partial").mkdir()
    with open(tmp_path / "out.hdf5.partial" / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="another process is writing"):
            embed(source, target)
    embed(source, target)


def test_foreign_files_are_left_alone(source, tmp_path):
    folder = tmp_path / "out.hdf5.partial"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="not a work directory .*thesis.tex"):
            embed(source, tmp_path / "out.hdf5", overwrite=overwrite)
    assert (folder / "thesis.tex").read_text() == "years of work"


def test_existing_output(source, tmp_path):
    target = tmp_path / "out.hdf5"
    target.write_text("old")
    with pytest.raises(FileExistsError, match="exists. Pass --overwrite"):
        embed(source, target)
    assert target.read_text() == "old" and names(tmp_path) == ["in.txt", "out.hdf5"]
    embed(source, target, overwrite=True)
    assert h5py.is_hdf5(target)
    with pytest.raises(FileNotFoundError, match="the folder of output"):
        embed(source, tmp_path / "no" / "out.hdf5")
    with pytest.raises(FileExistsError, match="is a directory"):
        embed(source, tmp_path, format="npz")


# Lines


def test_blank_lines(source, tmp_path):
    source.write_text("a b\n\n \t\nc\n")
    target = tmp_path / "out.hdf5"
    assert embed(source, target, layers="all").done.texts == 4
    with h5py.File(target) as file:
        assert file["1"].shape == (3, 0, 5) and file["3"].shape == (3, 1, 5)
    report = embed(source, target, layers="all", empty="skip", overwrite=True)
    assert report.notes == ("blank lines skipped: 2",)
    with h5py.File(target) as file:
        assert set(file) == {"0", "3", "sentence_to_index"}
    target.unlink()
    with pytest.raises(ValueError, match="line 2 of .*in.txt is blank"):
        embed(source, target, empty="error")
    assert names(tmp_path) == ["in.txt"]


def test_a_bad_line_far_on_keeps_the_work(source, tmp_path):
    target = tmp_path / "out.hdf5"
    lines = [*LINES[:20], "", *LINES[20:]]
    source.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="line 21 of .* is blank"):
        embed(source, target, empty="error")
    assert not target.exists() and names(tmp_path) == ["in.txt", "out.hdf5.partial"]
    # Nothing done under "error" can have met a blank line: another rule goes on with it.
    report = embed(source, target, empty="skip")
    assert report.resumed == 16 and report.done.skipped == 1
    fresh = tmp_path / "fresh.hdf5"
    embed(source, fresh, empty="skip")
    assert target.read_bytes() == fresh.read_bytes()


def test_long_lines(source, tmp_path):
    target = tmp_path / "out.safetensors"
    source.write_text("\n".join([*LINES[:20], "a b c d e f g", *LINES[20:]]))
    with pytest.raises(ValueError, match="line 21 of .*in.txt has 7 tokens; expected at most 4"):
        embed(source, target, embedder(limit=4))
    report = embed(source, target, embedder(limit=4), truncate=True)
    assert report.resumed == 16 and (report.done.cut_texts, report.done.cut_tokens) == (1, 3)
    (note,) = report.notes
    assert note.startswith("lines too long for the model and cut: 1; tokens they lost: 3") and "--split" in note


def test_invalid_bytes_are_counted(source, tmp_path):
    source.write_bytes(b"a \xff\xfe\nb\n")
    report = embed(source, tmp_path / "out.jsonl")
    assert report.done.replaced == 2 and "invalid UTF-8 sequences replaced by U+FFFD: 2" in report.notes
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["text"] == "a \ufffd\ufffd"


def test_compressed_input(source, tmp_path):
    (tmp_path / "in.txt.gz").write_bytes(gzip.compress(source.read_bytes()))
    for path, name in ((source, "a.npz"), (tmp_path / "in.txt.gz", "b.npz")):
        embed(path, tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_input_that_changes_meanwhile(source, tmp_path):
    model = embedder()
    encode = model.encoder.encode

    def encode_and_append(batch, selection):
        with open(source, "a") as file:
            file.write("more\n")
        return encode(batch, selection)

    model.encoder.encode = encode_and_append
    with pytest.raises(ValueError, match="in.txt changed while it was read"):
        embed(source, tmp_path / "out.npz", model)
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize(
    "lines, message",
    [
        (["a", "b", "c", "b "], "line 4 of .* is the same as line 2"),
        (["a", "b/c"], "line 2 of .* cannot be a key: it holds '/'"),
        (["."], "line 1 of .* cannot be a key: HDF5 reads '.'"),
        (["a", "", "b"], "line 2 of .* cannot be a key: it is blank"),
        (["a\0b"], "line 1 of .* cannot be a key: it holds a NUL"),
    ],
)
def test_sentences_that_cannot_be_keys(source, tmp_path, lines, message):
    source.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        embed(source, tmp_path / "out.hdf5", use_sentence_keys=True)
    assert names(tmp_path) == ["in.txt"]


def test_equal_hashes_of_different_sentences(source, monkeypatch, tmp_path):
    monkeypatch.setattr(job, "_hash", lambda sentence: 7)
    source.write_text("a\nb\nc")
    embed(source, tmp_path / "out.hdf5", use_sentence_keys=True)
    source.write_text("a\nb\na")
    with pytest.raises(ValueError, match="line 3 of .* is the same as line 1"):
        embed(source, tmp_path / "out.hdf5", use_sentence_keys=True, overwrite=True)


def test_too_many_sentences_for_one_string(source, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "_INDEX_LIMIT", 20)
    with pytest.raises(ValueError, match="sentence_to_index would have more than .* Pass --forget-sentences"):
        embed(source, tmp_path / "out.hdf5")
    embed(source, tmp_path / "out.hdf5", forget_sentences=True)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("out.npz", dict(use_sentence_keys=True), "use_sentence_keys is set; expected HDF5 at token level"),
        ("out.hdf5", dict(forget_sentences=True, level="sentence"), "forget_sentences is set; expected HDF5"),
        ("out.jsonl", dict(format="extract-features"), "expected a BERT model"),
        ("out.jsonl", dict(format="extract-features", words=True), "with words set"),
        ("out.jsonl", dict(format="extract-features", layers="average"), "with layers set"),
        ("out.npz", dict(window=0), "window is 0"),
    ],
)
def test_options_that_do_not_go_together(source, tmp_path, name, options, message):
    with pytest.raises(ValueError, match=message):
        embed(source, tmp_path / name, **options)
    assert names(tmp_path) == ["in.txt"]


# Standard input


def test_stdin(source, tmp_path):
    embed(source, tmp_path / "whole.npz")
    target = tmp_path / "out.npz"
    content = source.read_bytes()
    embed("-", target, stdin=io.BytesIO(content))
    assert target.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert names(tmp_path) == ["in.txt", "out.npz", "whole.npz"]


def test_stdin_again_after_a_kill(source, tmp_path):
    embed(source, tmp_path / "whole.npz")
    target, content = tmp_path / "out.npz", source.read_bytes()

    def leave() -> None:
        with pytest.raises(Killed):
            embed("-", target, stop_after(8), stdin=io.BytesIO(content))

    leave()
    with pytest.raises(ValueError, match="standard input is not what the unfinished job"):
        embed("-", target, stdin=io.BytesIO(content + b"more\n"))
    assert embed("-", target, stdin=io.BytesIO(content)).resumed > 0
    assert target.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    target.unlink()
    leave()
    report = embed("-", target, stdin=io.BytesIO(b""))
    assert report.resumed > 0 and "Standard input was empty" in report.notes[0]
    assert target.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    target.unlink()
    leave()
    report = embed("-", target, stdin=io.BytesIO(content + b"more\n"), overwrite=True)
    assert report.resumed == 0 and report.done.texts == len(LINES) + 1


@pytest.mark.parametrize("suffix", [".hdf5", ".safetensors", ".npz", ".jsonl", ".parquet"])
def test_links_are_not_followed(source, tmp_path, suffix):
    """Where others can write, they may have put links under the names that are used on the way."""
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    folder = tmp_path / f"out{suffix}.partial"
    folder.mkdir()
    planted = ["lock", "output.tmp", "00000000.values.tmp", "00000000.index.tmp", "manifest.json.tmp", "input.tmp"]
    planted += ["finished.json.tmp"]
    for name in planted:
        (theirs / name).write_text("precious")
        (folder / name).symlink_to(theirs / name)
    model = embedder()
    model.embed_file("-", tmp_path / f"out{suffix}", window=8, stdin=io.BytesIO(source.read_bytes()))
    assert {path.read_text() for path in theirs.iterdir()} == {"precious"}
    assert names(tmp_path) == ["in.txt", f"out{suffix}", "theirs"]
    folder.symlink_to(theirs)
    with pytest.raises(FileExistsError, match=r"not a work directory of an embedding job \(it is a link\)"):
        embed(source, tmp_path / f"out{suffix}", overwrite=True)
    assert len(list(theirs.iterdir())) == len(planted)
