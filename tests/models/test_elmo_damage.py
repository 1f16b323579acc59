# SPDX-License-Identifier: Apache-2.0
"""Hostile and damaged ELMo files: no number is read before its dataset was looked at, and nothing outside the file."""

from __future__ import annotations

import copy
import json
import resource
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from ctxfast.models.elmo.config import ElmoConfig
from ctxfast.models.elmo.weights import load_weights, random_weights, save_weights, weights_from_state_dict

CONFIG = ElmoConfig(6, 10, 2, ((1, 3), (2, 4)), 4, num_highways=1, cell_clip=3.0, proj_clip=3.0)
TABLE = (261, 4)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    options, weights = tmp_path / "options.json", tmp_path / "weights.hdf5"
    save_weights(random_weights(CONFIG), CONFIG, options, weights)
    return options, weights


def memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def refuse(files: tuple[Path, Path], said: str, named: Path, error: type[Exception] = ValueError) -> None:
    before = memory()
    with pytest.raises(error, match=said) as caught:
        load_weights(files[1], ElmoConfig.from_file(files[0]))
    assert str(caught.value).startswith("ctxfast.") and str(named) in str(caught.value)
    assert len(str(caught.value)) < 1000 and memory() - before < 100


def instead(name: str, make: Callable[[h5py.File], None]) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        values = file[name][...]
        del file[name]
        made = make(file)
        if made is not None and made.shape == values.shape:
            made[...] = values

    return change


def table(**options) -> Callable[[h5py.File], None]:
    return instead("char_embed", lambda file: file.create_dataset("char_embed", **options))


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout(TABLE, "f4")
    layout[:] = h5py.VirtualSource("other.hdf5", "x", TABLE)
    file.create_virtual_dataset("char_embed", layout)


def filtered(file: h5py.File) -> None:
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_chunk(TABLE)
    plan.set_filter(32000, h5py.h5z.FLAG_OPTIONAL)
    h5py.h5d.create(file.id, b"char_embed", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple(TABLE), plan)


def unknown_type(file: h5py.File) -> None:
    h5py.h5d.create(file.id, b"char_embed", h5py.h5t.UNIX_D32LE, h5py.h5s.create_simple(TABLE))


def deflated(size: int) -> Callable[[h5py.File], None]:
    """A chunk that is 4 KB by its shape, and ``size`` once it is unpacked."""

    def make(file: h5py.File) -> None:
        made = file.create_dataset("char_embed", TABLE, "f4", chunks=TABLE, compression="gzip")
        made.id.write_direct_chunk((0, 0), zlib.compress(bytes(size), 9))

    return make


def looped(file: h5py.File) -> None:
    file["RNN_0/again"] = file["RNN_0"]


_DATASETS = [
    (table(shape=(2 * 10**9, 4), dtype="f4", chunks=(10**6, 4)), "has shape (2000000000, 4); expected (261, 4)"),
    (table(shape=(), dtype="f4"), "has shape (); expected (261, 4)"),
    (instead("char_embed", lambda f: f.__setitem__("char_embed", h5py.Empty("f4"))), "has shape None; expected"),
    (instead("char_embed", lambda f: f.__setitem__("char_embed", h5py.SoftLink("/char_embed"))), "is a soft link"),
    (
        instead("char_embed", lambda f: f.__setitem__("char_embed", h5py.ExternalLink("other.hdf5", "/x"))),
        "is an external link to other.hdf5; expected a dataset",
    ),
    (table(shape=TABLE, dtype="f4", external=[("secret", 0, 4176)]), "stores its data in other files"),
    (instead("char_embed", virtual), "stores its data in other files"),
    (instead("char_embed", filtered), "packed by HDF5's filters [32000]; expected none, gzip"),
    (table(shape=TABLE, dtype="f4", chunks=TABLE, compression="lzf"), "packed by HDF5's filters [32000]"),
    (instead("char_embed", lambda f: f.create_group("char_embed") and None), "has no char_embed"),
    (instead("char_embed", lambda f: f.__setitem__("char_embed", np.dtype("f4"))), "is a Datatype; expected a dataset"),
    (instead("char_embed", lambda f: f.create_dataset("char_embed", TABLE, "f4") and None), "has 0 of its 4176 bytes"),
    (instead("char_embed", deflated(200 << 20)), "the chunks of char_embed in"),
    (instead("char_embed", deflated(4 << 20)), "the chunks of char_embed in"),
    (looped, "has more or deeper groups"),
    (lambda f: f.create_dataset("CNN/W_cnn_9", (10**9,), "f4", chunks=(10**6,)), "also holds CNN/W_cnn_9"),
]


@pytest.mark.parametrize(("change", "said"), _DATASETS, ids=range(len(_DATASETS)))
def test_datasets_that_are_not_what_they_say(files, change, said: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_bytes(bytes(4176))
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["x"] = np.ones(TABLE, "f4")
    with h5py.File(files[1], "r+") as file:
        change(file)
    refuse(files, said.replace("(", r"\(").replace(")", r"\)").replace("[", r"\["), files[1])


def test_a_chunk_of_which_little_is_used(files) -> None:
    """What may grow can have chunks that are larger than it is, and a chunk is unpacked whole: 400 MB here."""
    options = {"maxshape": (None, 4), "chunks": (25 << 20, 4), "compression": "gzip"}
    with h5py.File(files[1], "r+") as file:
        del file["char_embed"]
        made = file.create_dataset("char_embed", TABLE, "f4", **options)
        made.id.write_direct_chunk((0, 0), zlib.compress(bytes(1 << 20)))
    refuse(files, "would become 419,430,400 in memory", files[1])


_KINDS = ["i4", "S8", "c8", "bool", "V4", h5py.string_dtype(), h5py.ref_dtype, h5py.vlen_dtype("f4")]


@pytest.mark.parametrize("dtype", [*_KINDS, h5py.enum_dtype({"A": 0}), np.dtype([("a", "f4")]), None], ids=str)
def test_datasets_that_are_no_floating_point_numbers(files, dtype) -> None:
    with h5py.File(files[1], "r+") as file:
        del file["char_embed"]
        if dtype is None:
            unknown_type(file)
        else:
            file.create_dataset("char_embed", TABLE, dtype)
    said = "dtype without counterpart" if dtype is None else "char_embed in .* has dtype .*; expected floating point"
    refuse(files, said, files[1], TypeError)


@pytest.mark.parametrize(
    "kind",
    [
        {"dtype": ">f4"},
        {"dtype": "f8"},
        {"dtype": "f4", "chunks": (100, 3)},
        {"dtype": "f4", "compression": "gzip"},
        {"dtype": "f4", "compression": "gzip", "shuffle": True, "fletcher32": True},
    ],
)
def test_other_ways_to_store_the_same_numbers(files, kind: dict) -> None:
    config = ElmoConfig.from_file(files[0])
    before = load_weights(files[1], config)[1]
    with h5py.File(files[1], "r+") as file:
        table(shape=TABLE, **kind)(file)
    for name, value in load_weights(files[1], config)[1].items():
        assert torch.equal(value, before[name]), name


def test_groups_nested_without_end_are_left_alone(files) -> None:
    with h5py.File(files[1], "r+") as file:
        group = file
        for _ in range(500):
            group = group.create_group("g")
    with pytest.warns(UserWarning, match="also holds g, which is not part of ELMo: not read"):
        load_weights(files[1], CONFIG)


_OPTIONS = [
    ("lstm", "n_layers", 10**9, "lstm.n_layers is 1000000000, but .* has 23 tensors in all"),
    ("lstm", "n_layers", 3, "has no RNN_0/RNN/MultiRNNCell/Cell2"),
    ("char_cnn", "n_highway", 10**9, "char_cnn.n_highway is 1000000000, but"),
    ("char_cnn", "filters", [[1, 1]] * 10**4, "the number of char_cnn.filters is 10000, but"),
    ("char_cnn", "filters", [[1, 10**12], [2, 4]], "expected .*1000000000000"),
    ("char_cnn", "max_characters_per_token", 10**9, "is 1000000000; expected at most 1000: every word"),
    ("lstm", "dim", 10**12, "expected .*4000000000000"),
    ("lstm", "projection_dim", 10**12, "expected .*1000000000000"),
    ("lstm", "cell_clip", float("nan"), "lstm.cell_clip in .* is nan; expected a number"),
    ("lstm", "proj_clip", float("nan"), "lstm.proj_clip in .* is nan; expected a number"),
    ("char_cnn", "filters", "x" * 5000, "char_cnn.filters in .* is 'xxx"),
    (None, "bidirectional", False, "bidirectional in .* is False; expected true"),
]


@pytest.mark.parametrize(("section", "name", "value", "said"), _OPTIONS, ids=range(len(_OPTIONS)))
def test_options_that_the_file_does_not_have(files, section, name: str, value, said: str) -> None:
    options = json.loads(files[0].read_text())
    (options if section is None else options[section])[name] = value
    files[0].write_text(json.dumps(options))
    refuse(files, said, files[0].parent)


@pytest.mark.parametrize(
    "data", [b"", b"[]", b'{"lstm": 3}', b'{"a":' + b"[" * 100_000, b'{"a":' + b"9" * 5000 + b"}", b"\xff"]
)
def test_options_that_are_none(files, data: bytes) -> None:
    files[0].write_bytes(data)
    refuse(files, r"options\.json", files[0])


def test_state_dicts_with_sizes_or_numbers_that_cannot_be() -> None:
    tensors = random_weights(CONFIG)
    name = "_elmo_lstm.forward_layer_0.state_projection.weight"
    with pytest.raises(ValueError, match="lstm.n_layers is 1000000000, but state_dict has"):
        many = copy.copy(CONFIG)
        object.__setattr__(many, "num_layers", 10**9)
        weights_from_state_dict(tensors, many)
    with pytest.raises(TypeError, match=f"{name} has dtype torch.int64; expected floating point"):
        weights_from_state_dict({**tensors, name: tensors[name].long()}, CONFIG)
    with pytest.warns(UserWarning, match=f"{name} holds 60 values that are not finite"):
        weights_from_state_dict({**tensors, name: tensors[name] / 0}, CONFIG)
