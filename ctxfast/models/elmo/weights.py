# SPDX-License-Identifier: Apache-2.0
"""ELMo weight files: the HDF5 layout of bilm-tf and AllenNLP to and from a state dict under AllenNLP's names; and that
state dict as safetensors.

The HDF5 file holds TensorFlow's matrices, (in, out), with the gates of a cell in the order i, j (= g), f, o, a forget
bias that 1 is added to at run time, and highways whose gate says how much of the transformed side to take. The state
dict holds torch's: (out, in), gates i, f, g, o, the 1 folded into the bias, and a gate that says how much of the input
to keep. The character table of the file has no row for "no word"; the state dict's has one more, row 0, of zeros.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import h5py
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..._core.files import replacing
from ..._core.hdf5 import new_hdf5
from ..._core.reading import reading
from ..._core.texts import some
from .config import ElmoConfig
from .datasets import find_datasets, read_datasets

_LOAD, _SAVE, _STATE = ("ctxfast.load_weights", "ctxfast.save_weights", "ctxfast.weights_from_state_dict")
_TABLE_ROWS = 261
_CHAR_TABLE = "_token_embedder._char_embedding_weights"


@dataclasses.dataclass(frozen=True)
class _Part:
    """One parameter: its datasets (name -> shape in the file), and how it is made from them and back."""

    datasets: dict[str, tuple[int, ...]]
    shape: tuple[int, ...]
    read: Callable[..., np.ndarray]
    write: Callable[[np.ndarray], tuple[np.ndarray, ...]]


def _swap_gates(array: np.ndarray) -> np.ndarray:
    """i, j, f, o <-> i, f, j, o along the last axis: the same exchange both ways."""
    i, second, third, o = np.split(array, 4, axis=-1)
    return np.concatenate([i, third, second, o], axis=-1)


def _read_bias(bias: np.ndarray) -> np.ndarray:
    bias = _swap_gates(bias.astype(np.float64))
    bias[len(bias) // 4 : len(bias) // 2] += 1
    return bias


def _write_bias(bias: np.ndarray) -> tuple[np.ndarray, ...]:
    bias = bias.astype(np.float64)
    bias[len(bias) // 4 : len(bias) // 2] -= 1
    return (_swap_gates(bias),)


def _transposed(name: str, rows: int, columns: int) -> _Part:
    return _Part({name: (rows, columns)}, (columns, rows), lambda a: a.T, lambda a: (a.T,))


def _same(name: str, *shape: int) -> _Part:
    return _Part({name: shape}, shape, lambda a: a, lambda a: (a,))


def _parts(config: ElmoConfig) -> dict[str, _Part]:
    """Every parameter of the model by AllenNLP's name."""
    size, filters = config.projection_dim, config.num_filters
    parts: dict[str, _Part] = {
        _CHAR_TABLE: _Part(
            {"char_embed": (_TABLE_ROWS, config.char_embedding_dim)},
            (_TABLE_ROWS + 1, config.char_embedding_dim),
            lambda a: np.concatenate([np.zeros_like(a[:1]), a]),
            lambda a: (a[1:],),
        )
    }
    for i, (width, count) in enumerate(config.filters):
        parts[f"_token_embedder.char_conv_{i}.weight"] = _Part(
            {f"CNN/W_cnn_{i}": (1, width, config.char_embedding_dim, count)},
            (count, config.char_embedding_dim, width),
            lambda a: a[0].transpose(2, 1, 0),
            lambda a: (a.transpose(2, 1, 0)[None],),
        )
        parts[f"_token_embedder.char_conv_{i}.bias"] = _same(f"CNN/b_cnn_{i}", count)
    for k in range(config.num_highways):
        parts[f"_token_embedder._highways._layers.{k}.weight"] = _Part(
            {f"CNN_high_{k}/W_transform": (filters, filters), f"CNN_high_{k}/W_carry": (filters, filters)},
            (2 * filters, filters),
            lambda transform, carry: np.concatenate([transform.T, -carry.T]),
            lambda a: (a[: len(a) // 2].T, -a[len(a) // 2 :].T),
        )
        parts[f"_token_embedder._highways._layers.{k}.bias"] = _Part(
            {f"CNN_high_{k}/b_transform": (filters,), f"CNN_high_{k}/b_carry": (filters,)},
            (2 * filters,),
            lambda transform, carry: np.concatenate([transform, -carry]),
            lambda a: (a[: len(a) // 2], -a[len(a) // 2 :]),
        )
    if config.has_cnn_projection:
        parts["_token_embedder._projection.weight"] = _transposed("CNN_proj/W_proj", filters, size)
        parts["_token_embedder._projection.bias"] = _same("CNN_proj/b_proj", size)
    for direction, side in enumerate(("forward", "backward")):
        for layer in range(config.num_layers):
            parts.update(_cell_parts(config, direction, side, layer))
    return parts


def _cell_parts(config: ElmoConfig, direction: int, side: str, layer: int) -> dict[str, _Part]:
    size, cells = config.projection_dim, config.cell_size
    group = f"RNN_{direction}/RNN/MultiRNNCell/Cell{layer}/LSTMCell"
    name = f"_elmo_lstm.{side}_layer_{layer}"
    # One matrix of the file, inputs above recurrent rows, makes two parameters.
    matrix = {f"{group}/W_0": (2 * size, 4 * cells)}
    parts = {
        f"{name}.input_linearity.weight": _Part(
            matrix, (4 * cells, size), lambda a: _swap_gates(a)[:size].T, lambda a: ()
        ),
        f"{name}.state_linearity.weight": _Part(
            matrix, (4 * cells, size), lambda a: _swap_gates(a)[size:].T, lambda a: ()
        ),
        f"{name}.state_linearity.bias": _Part({f"{group}/B": (4 * cells,)}, (4 * cells,), _read_bias, _write_bias),
    }
    if config.has_lstm_projection:
        parts[f"{name}.state_projection.weight"] = _transposed(f"{group}/W_P_0", cells, size)
    return parts


def _check_counts(config: ElmoConfig, count: int, place: str, who: str) -> None:
    """Refuse options with more layers than the file has tensors, before a table of all their parameters is made."""
    for option, value in (
        ("lstm.n_layers", config.num_layers),
        ("char_cnn.n_highway", config.num_highways),
        ("the number of char_cnn.filters", len(config.filters)),
    ):
        if value > count:
            raise ValueError(
                f"{who}: {option} is {value}, but {place} has {count} tensors in all. Does options.json belong to it?"
            )


def _check_names(found: Mapping[str, h5py.Dataset], expected: Mapping[str, tuple[int, ...]], path: Path) -> None:
    table = found.get("char_embed")
    if table is not None and table.shape and len(table.shape) == 2 and table.shape[0] == _TABLE_ROWS + 1:
        raise ValueError(
            f"{_LOAD}: char_embed in {path} has {_TABLE_ROWS + 1} rows; expected {_TABLE_ROWS}, without the row of the "
            f"padding id 0. The file was not written by bilm-tf; drop its first row."
        )
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(
            f"{_LOAD}: {path} has no {some(missing)}. The options ask for it; does options.json belong to this file?"
        )
    extra = [name for name in found if name not in expected]
    if extra:
        raise ValueError(
            f"{_LOAD}: {path} also holds {some(extra)}, which the options know nothing of (fewer layers, filters "
            f"or highways). Does options.json belong to this file?"
        )


def _warn_not_finite(name: str, place: str, finite: int, size: int, who: str) -> None:
    if finite < size:
        warnings.warn(f"{who}: {name}{place} holds {size - finite} values that are not finite.", stacklevel=4)


def load_weights(weight_file: str | os.PathLike[str], config: ElmoConfig) -> tuple[ElmoConfig, dict[str, Tensor]]:
    """Read a weight file.

    Args:
        weight_file: HDF5 of AllenNLP or bilm-tf; or ``.safetensors`` with AllenNLP's names of parameters, in any
            floating-point dtype.
        config: from the options that belong to it.

    Returns:
        The config, with the two projections set as the file has them (a file may leave one out where sizes are equal),
        and the state dict of ``ElmoBiLm``, float32 on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not HDF5 or damaged; a dataset missing, not known to the options, or of another shape; one that
            lies in another file, was never written, or is packed so that few bytes become many.
        TypeError: a dataset that is not floating point.

    Warns:
        UserWarning: values that are not finite, by dataset; names that are not part of ELMo.

    Reference: the layout of bilm-tf's dump; AllenNLP's loaders.
    """
    path = Path(weight_file)
    if not path.is_file():
        raise FileNotFoundError(f"{_LOAD}: there is no weight file {path}.")
    if path.suffix == ".safetensors":
        with reading(path, _LOAD, "safetensors file of weights"):
            config, state_dict = weights_from_state_dict(load_file(path), config)
        return config, {name: value.float() for name, value in state_dict.items()}
    with reading(path, _LOAD, "HDF5 file of weights"), h5py.File(path, "r") as file:
        return _load(file, path, config)


def _load(file: h5py.File, path: Path, config: ElmoConfig) -> tuple[ElmoConfig, dict[str, Tensor]]:
    found, others = find_datasets(file, path, _LOAD)
    choices = {}
    if config.num_filters == config.projection_dim:
        choices["has_cnn_projection"] = "CNN_proj/W_proj" in found
    if config.cell_size == config.projection_dim:
        choices["has_lstm_projection"] = any(name.endswith("/W_P_0") for name in found)
    config = dataclasses.replace(config, **choices)
    _check_counts(config, len(found), str(path), _LOAD)
    parts = _parts(config)
    expected = {name: shape for part in parts.values() for name, shape in part.datasets.items()}
    _check_names(found, expected, path)
    arrays = read_datasets(found, expected, path, _LOAD)
    for name, array in arrays.items():
        _warn_not_finite(name, f" in {path}", int(np.isfinite(array).sum()), array.size, _LOAD)
    if others:
        warnings.warn(f"{_LOAD}: {path} also holds {some(others)}, which is not part of ELMo: not read.", stacklevel=3)
    state_dict = {}
    for name, part in parts.items():
        made = part.read(*(arrays[dataset] for dataset in part.datasets))
        state_dict[name] = torch.from_numpy(np.ascontiguousarray(made, dtype=np.float32))
    return config, state_dict


def weights_from_state_dict(
    state_dict: Mapping[str, Tensor], config: ElmoConfig
) -> tuple[ElmoConfig, dict[str, Tensor]]:
    """The language model's part of an AllenNLP state dict.

    Args:
        state_dict: of AllenNLP's ``_ElmoBiLm`` or ``Elmo``, or of a model that holds one: whatever stands before the
            biLM's names (``_elmo_lstm.``, or the path inside a whole model) is dropped, and names that are not the
            biLM's are left out.
        config: sizes it must have.

    Returns:
        The config, with the two projections set as the state dict has them, and the state dict of ``ElmoBiLm``.

    Raises:
        ValueError: no ELMo in it, or several; a parameter missing or of another shape.
        TypeError: a parameter that is not floating point.

    Warns:
        UserWarning: values that are not finite, by parameter; the names that are left out, such as a tagger's layers
            and the weights of its scalar mix.
    """
    tables = [name for name in state_dict if name.endswith(_CHAR_TABLE)]
    if len(tables) != 1:
        found = f"{len(tables)} ({', '.join(tables)})" if tables else "none"
        raise ValueError(f"{_STATE}: state_dict has {found} of {_CHAR_TABLE}; expected exactly one ELMo model in it.")
    prefix = tables[0][: -len(_CHAR_TABLE)]
    found_names = {name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)}
    choices = {}
    if config.num_filters == config.projection_dim:
        choices["has_cnn_projection"] = "_token_embedder._projection.weight" in found_names
    if config.cell_size == config.projection_dim:
        choices["has_lstm_projection"] = any("state_projection" in name for name in found_names)
    config = dataclasses.replace(config, **choices)
    _check_counts(config, len(found_names), "state_dict", _STATE)
    result = {}
    for name, part in _parts(config).items():
        if name not in found_names:
            raise ValueError(f"{_STATE}: state_dict has no {prefix}{name}; the config asks for it.")
        value = found_names[name]
        if tuple(value.shape) != part.shape:
            raise ValueError(
                f"{_STATE}: {prefix}{name} has shape {tuple(value.shape)}; expected {part.shape} by the config."
            )
        if not value.is_floating_point():
            raise TypeError(f"{_STATE}: {prefix}{name} has dtype {value.dtype}; expected floating point.")
        _warn_not_finite(prefix + name, "", int(torch.isfinite(value).sum()), value.numel(), _STATE)
        result[name] = value
    own = ("_token_embedder.", "_elmo_lstm.forward_layer_", "_elmo_lstm.backward_layer_")
    extra = [name for name in found_names if name.startswith(own) and name not in result]
    if extra:
        raise ValueError(f"{_STATE}: state_dict also holds {some(extra)}, which the config knows nothing of.")
    left = sorted(set(state_dict) - {prefix + name for name in result})
    if left:
        warnings.warn(
            f"{_STATE}: {len(left)} tensors of state_dict are not part of the language model and are left out: "
            f"{some(left)}.",
            stacklevel=2,
        )
    return config, result


def save_weights(
    state_dict: Mapping[str, Tensor],
    config: ElmoConfig,
    options_path: str | os.PathLike[str],
    weights_path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> None:
    """Write options.json and a weight file: HDF5 that AllenNLP and bilm-tf read, or safetensors.

    Args:
        state_dict: as ``weights_from_state_dict`` takes it.
        config: sizes.
        options_path, weights_path: the two files; their folders exist. The weights come into place first; they are
            safetensors if their name ends so.
        dtype: of the numbers; HDF5 has float32 alone.
        overwrite: whether files of these names may be replaced.

    In HDF5 a forget bias is stored less 1, so it returns within 6e-8; all else returns bit by bit.

    Raises:
        FileExistsError: a target exists and ``overwrite`` is False.
        ValueError: as ``weights_from_state_dict``; another dtype for HDF5.
    """
    options_path, weights_path = Path(options_path), Path(weights_path)
    for path in (options_path, weights_path):
        if path.exists() and not overwrite:
            raise FileExistsError(f"{_SAVE}: {path} exists. Pass overwrite=True to replace it.")
    is_packed = weights_path.suffix == ".safetensors"
    if dtype != torch.float32 and not is_packed:
        raise ValueError(
            f"{_SAVE}: dtype is {dtype}; expected float32 for HDF5. A name with .safetensors takes others."
        )
    config, tensors = weights_from_state_dict(state_dict, config)
    if is_packed:
        with replacing(weights_path) as temporary:
            save_file(
                {name: value.detach().to("cpu", dtype).contiguous() for name, value in tensors.items()}, temporary
            )
        config.save(options_path)
        return
    arrays = {name: value.detach().cpu().to(torch.float32).numpy() for name, value in tensors.items()}
    datasets: dict[str, np.ndarray] = {}
    for name, part in _parts(config).items():
        if name.endswith("input_linearity.weight"):
            recurrent = arrays[name.replace("input_linearity", "state_linearity")]
            (dataset,) = part.datasets
            datasets[dataset] = _swap_gates(np.concatenate([arrays[name].T, recurrent.T]))
        else:
            datasets.update(zip(part.datasets, part.write(arrays[name])))
    with replacing(weights_path) as temporary, new_hdf5(temporary) as (file, check):
        for name, array in datasets.items():
            file.create_dataset(name, data=np.ascontiguousarray(array, dtype=np.float32))
            check()
    config.save(options_path)


def random_weights(config: ElmoConfig, seed: int = 0) -> dict[str, Tensor]:
    """Untrained weights, drawn as bilm-tf draws them.

    Args:
        config: sizes.
        seed: of the generator; the same seed gives the same weights.

    Characters are uniform in +-1, convolutions uniform in +-0.05 (relu) or normal with 1/sqrt(inputs) (tanh), all
    other matrices normal with 1/sqrt(inputs); highways begin by carrying their input (bias 2), forget biases are 1.

    Returns:
        The state dict of ``ElmoBiLm``, float32 on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    state_dict = {}
    for name, part in _parts(config).items():
        value = torch.zeros(part.shape)
        if name == _CHAR_TABLE:
            value[1:].uniform_(-1, 1, generator=generator)
        elif name.endswith(".bias"):
            if "_highways" in name:
                value[len(value) // 2 :] = 2
            elif "state_linearity" in name:
                value[len(value) // 4 : len(value) // 2] = 1
        elif "char_conv" in name and config.activation == "relu":
            value.uniform_(-0.05, 0.05, generator=generator)
        else:
            value.normal_(0, value[0].numel() ** -0.5, generator=generator)
        state_dict[name] = value
    return state_dict
