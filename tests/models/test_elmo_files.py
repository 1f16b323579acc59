# SPDX-License-Identifier: Apache-2.0
"""ELMo options and weight files: read, checked, written, read again."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from oracles.elmo_models import SMALL, VARIANTS, write_model, write_variant
from safetensors.torch import save_file

from ctxfast.models.elmo.config import ElmoConfig
from ctxfast.models.elmo.modeling import ElmoBiLm
from ctxfast.models.elmo.weights import load_weights, random_weights, save_weights, weights_from_state_dict


def options(**changes) -> dict:
    """A valid options.json as a dictionary; ``lstm__dim=3`` changes one option, DELETE drops it."""
    made = copy.deepcopy(SMALL.to_dict())
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = made
        for parent in parents:
            place = place[parent]
        if value is DELETE:
            del place[last]
        else:
            place[last] = value
    return made


DELETE = object()


def test_options_of_the_fixture(shared_data: Path) -> None:
    config = ElmoConfig.from_file(shared_data / "elmo" / "allennlp_tiny" / "options.json")
    assert config == ElmoConfig(
        projection_dim=16,
        cell_size=64,
        num_layers=2,
        filters=((1, 4), (2, 8), (3, 16), (4, 32), (5, 64)),
        char_embedding_dim=4,
        num_highways=2,
        cell_clip=3,
        proj_clip=3,
    )
    assert (config.num_filters, config.output_dim) == (124, 32)
    assert config.has_lstm_projection and config.has_cnn_projection


def test_unknown_options_are_kept(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "elmo" / "allennlp_tiny_fr" / "options.json"
    config = ElmoConfig.from_file(path)
    config.save(tmp_path / "options.json")
    assert json.loads((tmp_path / "options.json").read_text()) == json.loads(path.read_text())


@pytest.mark.parametrize("value", [DELETE, None, 0, 0.0])
def test_clips_that_are_off(value) -> None:
    config = ElmoConfig.from_dict(options(lstm__cell_clip=value, lstm__proj_clip=value))
    assert config.cell_clip is None and config.proj_clip is None


def test_what_may_be_missing() -> None:
    config = ElmoConfig.from_dict(
        options(
            lstm__n_layers=DELETE,
            lstm__use_skip_connections=DELETE,
            char_cnn__n_highway=DELETE,
            char_cnn__max_characters_per_token=DELETE,
            char_cnn__n_characters=DELETE,
        )
    )
    assert (config.num_layers, config.use_skip_connections, config.num_highways) == (1, False, 0)
    assert (config.max_characters, config.num_characters) == (50, 262)


# Published parameter counts, without the character table's added row of zeros.
@pytest.mark.parametrize(("name", "millions"), [("small", 13.59), ("medium", 28.03), ("original", 93.60)])
def test_presets(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = ElmoBiLm(ElmoConfig.preset(name))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round((count - 16) / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(lstm=DELETE), "lstm in o.json is missing; expected a dictionary of options."),
        (
            dict(char_cnn=DELETE),
            "char_cnn in o.json is missing; expected a dictionary of options. Models without a character encoder are "
            "not supported.",
        ),
        (
            dict(char_cnn__embedding=4),
            "char_cnn.embedding in o.json is 4; expected a dictionary of options.",
        ),
        (
            dict(lstm__projection_dim=DELETE),
            "lstm.projection_dim in o.json is missing; every model needs it.",
        ),
        (
            dict(char_cnn__activation=DELETE),
            "char_cnn.activation in o.json is missing; every model needs it.",
        ),
        (
            dict(char_cnn__activation="gelu"),
            "char_cnn.activation in o.json is 'gelu'; expected 'relu' or 'tanh'.",
        ),
        (dict(lstm__dim="12"), "lstm.dim in o.json is '12'; expected a whole number, 1 or more."),
        (dict(lstm__dim=True), "lstm.dim in o.json is True; expected a whole number, 1 or more."),
        (dict(lstm__n_layers=0), "lstm.n_layers in o.json is 0; expected a whole number, 1 or more."),
        (
            dict(lstm__cell_clip=-3),
            "lstm.cell_clip in o.json is -3; expected a number, or null or 0 for no clipping.",
        ),
        (
            dict(lstm__use_skip_connections="yes"),
            "lstm.use_skip_connections in o.json is 'yes'; expected true or false.",
        ),
        (
            dict(char_cnn__n_characters=300),
            "char_cnn.n_characters in o.json is 300; expected 262, or 261 in the options of a training run.",
        ),
        (
            dict(char_cnn__filters=[[1, 2], [3]]),
            "char_cnn.filters in o.json is [[1, 2], [3]]; expected a list of [width, count] pairs of whole numbers "
            "above 0.",
        ),
        (
            dict(char_cnn__filters=[]),
            "char_cnn.filters in o.json is []; expected a list of [width, count] pairs of whole numbers above 0.",
        ),
        (
            dict(char_cnn__filters=[[9, 2]], char_cnn__max_characters_per_token=8),
            "char_cnn.filters in o.json is [[9, 2]]; expected widths up to 8, the characters of a word.",
        ),
    ],
)
def test_options_no_model_can_have(changes: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        ElmoConfig.from_dict(options(**changes), source="o.json")
    assert str(caught.value) == f"ctxfast.ElmoConfig: {message}"


def test_options_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no options file"):
        ElmoConfig.from_file(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text('{"lstm": {')
    with pytest.raises(ValueError, match="cut.json is damaged, cut short or no JSON"):
        ElmoConfig.from_file(tmp_path / "cut.json")
    with pytest.raises(ValueError, match="preset is 'huge'; expected one of small, medium, original"):
        ElmoConfig.preset("huge")
    with pytest.raises(ValueError, match="has_lstm_projection is False; expected True: lstm.dim 10 differ"):
        ElmoConfig(6, 10, 1, ((1, 3),), 4, has_lstm_projection=False)


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    files = write_variant(tmp_path, name)
    config, first = load_weights(files[1], ElmoConfig.from_file(files[0]))
    again = tmp_path / "again.json", tmp_path / "again.hdf5"
    save_weights(first, config, *again)
    config_again, second = load_weights(again[1], ElmoConfig.from_file(again[0]))
    assert config_again == config and first.keys() == second.keys()
    for parameter in first:
        if parameter.endswith("state_linearity.bias"):
            torch.testing.assert_close(second[parameter], first[parameter], atol=6e-8, rtol=0)
        else:
            assert torch.equal(second[parameter], first[parameter]), parameter
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "again.hdf5",
        "again.json",
        "options.json",
        "weights.hdf5",
    ]
    with h5py.File(files[1], "r") as old, h5py.File(again[1], "r") as new:
        names: list[str] = []
        old.visit(names.append)
        for dataset in (name for name in names if isinstance(old[name], h5py.Dataset)):
            np.testing.assert_allclose(new[dataset][...], old[dataset][...], atol=1.2e-7, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_safetensors(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = random_weights(SMALL)
    save_weights(tensors, SMALL, tmp_path / "options.json", tmp_path / "weights.safetensors", dtype=dtype)
    config, found = load_weights(tmp_path / "weights.safetensors", ElmoConfig.from_file(tmp_path / "options.json"))
    assert config == SMALL and found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(found[name], value.to(dtype).float()), name
    model = ElmoBiLm.from_pretrained(tmp_path)
    assert torch.equal(model.state_dict()[name], found[name])


def test_safetensors_that_do_not_fit(tmp_path: Path) -> None:
    path, tensors = tmp_path / "weights.safetensors", random_weights(SMALL)
    bias = "_elmo_lstm.forward_layer_0.state_linearity.bias"
    for changed, error, message in (
        ({**tensors, bias: torch.zeros(3)}, ValueError, rf"{bias} has shape \(3,\)"),
        ({**tensors, bias: tensors[bias].int()}, TypeError, f"{bias} has dtype torch.int32"),
        ({"x": torch.zeros(1)}, ValueError, "has none of _token_embedder"),
    ):
        save_file(changed, path)
        with pytest.raises(error, match=rf"{message}.*weights\.safetensors"):
            load_weights(path, SMALL)
    path.write_bytes(b"\x08" + bytes(7) + b"no json!")
    with pytest.raises(ValueError, match="weights.safetensors is damaged, cut short or no safetensors file"):
        load_weights(path, SMALL)


def test_fixture_file_is_written_as_it_was(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "elmo" / "allennlp_tiny"
    config, tensors = load_weights(folder / "lm_weights.hdf5", ElmoConfig.from_file(folder / "options.json"))
    save_weights(tensors, config, tmp_path / "o.json", tmp_path / "w.hdf5")
    with h5py.File(folder / "lm_weights.hdf5", "r") as old, h5py.File(tmp_path / "w.hdf5", "r") as new:
        names: list[str] = []
        old.visit(names.append)
        found: list[str] = []
        new.visit(found.append)
        assert sorted(names) == sorted(found)
        for name in names:
            if isinstance(old[name], h5py.Dataset):
                assert new[name].dtype == np.float32
                np.testing.assert_allclose(new[name][...], old[name][...], atol=6e-8, rtol=0)


def test_state_dicts_of_allennlp() -> None:
    tensors = random_weights(SMALL, 1)
    for prefix in ("", "_elmo_lstm.", "_text_field_embedder.token_embedder_elmo._elmo._elmo_lstm."):
        whole = {prefix + name: value for name, value in tensors.items()}
        whole["classifier.weight"] = torch.zeros(2)
        if prefix:
            whole[prefix.replace("_elmo_lstm.", "scalar_mix_0.gamma")] = torch.ones(1)
        with pytest.warns(UserWarning, match="not part of the language model and are left out: .*classifier.weight"):
            config, found = weights_from_state_dict(whole, SMALL)
        assert config == SMALL and found.keys() == tensors.keys()
        assert all(found[name] is tensors[name] for name in tensors)


def test_random_weights_are_those_of_the_seed() -> None:
    first, second, third = random_weights(SMALL, 3), random_weights(SMALL, 3), random_weights(SMALL, 4)
    name = "_elmo_lstm.forward_layer_0.input_linearity.weight"
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first[name], third[name])
    assert not first["_token_embedder._char_embedding_weights"][0].any()


def damage(file: Path, change) -> None:
    with h5py.File(file, "r+") as opened:
        change(opened)


def drop(name: str):
    def change(file: h5py.File) -> None:
        del file[name]

    return change


def replace(name: str, array: np.ndarray):
    def change(file: h5py.File) -> None:
        if name in file:
            del file[name]
        file.create_dataset(name, data=array)

    return change


_CELL = "RNN_0/RNN/MultiRNNCell/Cell1/LSTMCell"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            drop(f"{_CELL}/B"),
            ValueError,
            f"{{}} has no {_CELL}/B. The options ask for it; does options.json belong to this file?",
        ),
        (
            drop("CNN_proj"),
            ValueError,
            "{} has no CNN_proj/W_proj, CNN_proj/b_proj. The options ask for it; does options.json belong to this "
            "file?",
        ),
        (
            drop(f"{_CELL}/W_P_0"),
            ValueError,
            f"{{}} has no {_CELL}/W_P_0. The options ask for it; does options.json belong to this file?",
        ),
        (
            replace("CNN/b_cnn_1", np.zeros(9, np.float32)),
            ValueError,
            "CNN/b_cnn_1 in {} has shape (9,); expected (4,) by the options. Does options.json belong to this file?",
        ),
        (
            replace("CNN_high_2/W_carry", np.zeros((12, 12), np.float32)),
            ValueError,
            "{} also holds CNN_high_2/W_carry, which the options know nothing of (fewer layers, filters or highways). "
            "Does options.json belong to this file?",
        ),
        (
            replace("char_embed", np.zeros((262, 4), np.float32)),
            ValueError,
            "char_embed in {} has 262 rows; expected 261, without the row of the padding id 0. The file was not "
            "written by bilm-tf; drop its first row.",
        ),
        (
            replace("CNN/b_cnn_1", np.zeros(4, np.int32)),
            TypeError,
            "CNN/b_cnn_1 in {} has dtype int32; expected floating point.",
        ),
    ],
)
def test_files_that_do_not_fit(change, error: type[Exception], message: str, tmp_path: Path) -> None:
    _, weights = write_model(tmp_path)
    damage(weights, change)
    with pytest.raises(error) as caught:
        load_weights(weights, SMALL)
    assert str(caught.value) == "ctxfast.load_weights: " + message.format(weights)


def test_softmax_weights_in_the_file_are_named_and_not_read(tmp_path: Path) -> None:
    _, weights = write_model(tmp_path)
    damage(weights, replace("softmax/W", np.zeros((5, 6), np.float32)))
    with pytest.warns(UserWarning, match="also holds softmax, which is not part of ELMo: not read"):
        load_weights(weights, SMALL)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    _, weights = write_model(tmp_path)
    content = weights.read_bytes()
    with pytest.raises(FileNotFoundError, match="there is no weight file"):
        load_weights(tmp_path / "none.hdf5", SMALL)
    for name, bad in {
        "cut": content[:1000],
        "half": content[: len(content) // 2],
        "text": b"hello",
        "empty": b"",
    }.items():
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(ValueError, match=f"{name} is damaged, cut short or no HDF5"):
            load_weights(tmp_path / name, SMALL)


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    _, weights = write_model(tmp_path)
    damage(weights, replace("CNN/b_cnn_1", np.array([0, np.nan, np.inf, 1], np.float32)))
    with pytest.warns(UserWarning, match="CNN/b_cnn_1 in .* holds 2 values that are not finite"):
        load_weights(weights, SMALL)


def test_saving_refuses(tmp_path: Path) -> None:
    tensors = random_weights(SMALL)
    options_path, weights_path = write_model(tmp_path)
    with pytest.raises(FileExistsError, match=r"options.json exists. Pass overwrite=True to replace it."):
        save_weights(tensors, SMALL, options_path, tmp_path / "new")
    with pytest.raises(FileExistsError, match="weights.hdf5 exists"):
        save_weights(tensors, SMALL, tmp_path / "new", weights_path)
    assert not (tmp_path / "new").exists()
    name = "_elmo_lstm.forward_layer_1.state_projection.weight"
    new = tmp_path / "a", tmp_path / "b"
    with pytest.raises(ValueError, match=f"state_dict has no {name}; the config asks for it"):
        save_weights({key: value for key, value in tensors.items() if key != name}, SMALL, *new)
    with pytest.raises(ValueError, match=r"has shape \(2, 2\); expected \(6, 10\) by the config"):
        save_weights({**tensors, name: torch.zeros(2, 2)}, SMALL, *new)
    extra = name.replace("layer_1", "layer_2")
    with pytest.raises(ValueError, match=f"also holds {extra}, which the config knows nothing of"):
        save_weights({**tensors, extra: torch.zeros(2, 2)}, SMALL, *new)
    with pytest.raises(ValueError, match="state_dict has none of .*; expected exactly one ELMo model in it"):
        save_weights({}, SMALL, *new)
    with pytest.raises(ValueError, match=r"dtype is torch.float16; expected float32 for HDF5"):
        save_weights(tensors, SMALL, *new, dtype=torch.float16)
    assert not new[0].exists() and not new[1].exists()
