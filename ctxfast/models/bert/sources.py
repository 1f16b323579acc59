# SPDX-License-Identifier: Apache-2.0
"""Weight files of the BERT family, opened: which tensors they hold is known before any of them is read."""

from __future__ import annotations

import dataclasses
import math
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

from ..._core.reading import check_growth, read_json, reading
from .names import is_tensorflow_kernel
from .tf_checkpoint import TensorBundle, bundle_prefix

_WHO = "ctxfast.load_checkpoint"
# Each format's single file and the index of its sharded form, in order of preference.
_TORCH_FILES = (
    ("safetensors", "model.safetensors"),
    ("safetensors", "model.safetensors.index.json"),
    ("pytorch", "pytorch_model.bin"),
    ("pytorch", "pytorch_model.bin.index.json"),
)
_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor as its file describes it; `shape` and `dtype` are those it has when read."""

    shape: tuple[int, ...]
    dtype: str
    file: Path

    @property
    def is_float(self) -> bool:
        """Whether it is of a dtype that weights may have: float64, float32, float16, bfloat16."""
        return self.dtype in _ITEM_BYTES

    @property
    def nbytes(self) -> int:
        """Bytes when read; of floating-point tensors only."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclasses.dataclass(frozen=True)
class Source:
    """Tensors of one checkpoint by name, read one at a time.

    Attributes:
        kind: "safetensors", "pytorch" or "tensorflow".
        files: what was opened.
        tensors: every tensor by its name.
        others: names of values that are not tensors.
        read: the tensor of a name.
    """

    kind: str
    files: list[Path]
    tensors: dict[str, Stored]
    read: Callable[[str], torch.Tensor]
    others: tuple[str, ...] = ()

    @property
    def place(self) -> Path:
        """The file, or the folder of several."""
        return self.files[0] if len(self.files) == 1 else self.files[0].parent


def is_same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two copies hold the same values; NaN equals NaN, dtypes may differ."""
    if first.shape != second.shape:
        return False
    if first.dtype == second.dtype and torch.equal(first, second):
        return True
    dtype = torch.promote_types(first.dtype, second.dtype)
    return torch.allclose(first.to(dtype), second.to(dtype), 0, 0, equal_nan=True)


def open_source(model: Path) -> Source:
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
            shard_of = _shards(path) if name.endswith(".index.json") else {}
            files = list(dict.fromkeys(shard_of.values())) or [path]
            source = _open_safetensors(files) if kind == "safetensors" else _open_pickles(files)
            for tensor, shard in shard_of.items():
                if tensor not in source.tensors:
                    raise ValueError(f"{_WHO}: {path} says that {shard} holds {tensor}, which it does not")
            return source
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
        f"({', '.join(p.name for p in prefixes[:8])}); pass the prefix of one, such as {prefixes[-1]}"
    )


def _shards(index: Path) -> dict[str, Path]:
    """File of each tensor that a sharded checkpoint's index names."""
    weight_map = read_json(index, _WHO, "index of a sharded checkpoint").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{_WHO}: {index} has no weight_map")
    paths = {}
    with reading(index, _WHO, "index of a sharded checkpoint"):
        for tensor, name in sorted(weight_map.items()):
            is_name = isinstance(name, str) and Path(name).name == name and name not in ("", ".", "..")
            if not is_name or "\0" in name or "\\" in name or len(name) > 255:
                shown = repr(name) if len(repr(name)) < 80 else repr(name)[:80] + "..."
                raise ValueError(f"{_WHO}: {index} names {shown}; expected a file beside it")
            paths[tensor] = index.parent / name
        for path in set(paths.values()):
            if not path.is_file():
                raise FileNotFoundError(f"{_WHO}: {path} does not exist, but {index.name} names it")
    return paths


def _check_twice(name: str, first: Path, second: Path, is_equal: bool) -> None:
    if not is_equal:
        raise ValueError(f"{_WHO}: {first} and {second} both hold {name}, with different values; expected one of them")


def _open_safetensors(files: list[Path]) -> Source:
    tensors: dict[str, Stored] = {}
    handles = {}
    for path in files:
        with reading(path, _WHO, f"safetensors file, of {path.stat().st_size} bytes"):
            handle = handles[path] = safe_open(path, framework="pt")
            for name in handle.keys():
                part = handle.get_slice(name)
                dtype = str(part.get_dtype())
                stored = Stored(tuple(part.get_shape()), _SAFETENSORS_DTYPES.get(dtype, dtype), path)
                if name not in tensors:
                    tensors[name] = stored
                    continue
                other = handles[tensors[name].file]
                is_equal = tensors[name].shape == stored.shape and is_same(
                    other.get_tensor(name), handle.get_tensor(name)
                )
                _check_twice(name, tensors[name].file, path, is_equal)

    def read(name: str) -> torch.Tensor:
        path = tensors[name].file
        with reading(path, _WHO, "safetensors file"):
            return handles[path].get_tensor(name)

    return Source("safetensors", files, tensors, read)


def _open_pickles(files: list[Path]) -> Source:
    values: dict[str, torch.Tensor] = {}
    tensors: dict[str, Stored] = {}
    others = []
    for path in files:
        found = load_pickle(path, _WHO)
        for name, value in found.items():
            if not isinstance(value, torch.Tensor):
                others.append(name)
                continue
            if name in values:
                _check_twice(name, tensors[name].file, path, is_same(values[name], value))
                continue
            values[name] = value
            tensors[name] = Stored(tuple(value.shape), str(value.dtype).removeprefix("torch."), path)
    return Source("pytorch", files, tensors, values.__getitem__, tuple(others))


def load_pickle(path: Path, who: str) -> dict[str, object]:
    """The dict in a file of torch.save; no code in it runs, its tensors are plain ones that the file holds whole.

    Raises:
        ValueError: code, damage, a value that is not a dict or has keys that are not names, a tensor that is sparse,
            quantised, on the meta device, or larger than what the file stores of it.
    """
    size = path.stat().st_size
    what = f"PyTorch weight file, of {size} bytes"
    with reading(path, who, what):
        stored = size
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                records = archive.infolist()
            # torch.save does not compress: a file that does is a zip bomb, and so are overlapping records.
            stored = sum(record.file_size for record in records)
            if stored > size or any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise ValueError(f"{who}: {path} is compressed inside or damaged; expected a file of torch.save")
        try:
            values = torch.load(path, map_location="cpu", weights_only=True)
        except MemoryError as error:  # a damaged count as often as a small machine
            raise ValueError("more memory is asked for than there is") from error
        except Exception as error:
            text = str(error)
            if "Unsupported global" in text or "Unsupported class" in text or "GLOBAL" in text:
                raise ValueError(
                    f"{who}: {path} holds Python objects beside tensors, which would run code "
                    "when loaded. Convert it to safetensors where you trust it"
                ) from error
            raise
        if not isinstance(values, dict):
            raise ValueError(f"{who}: {path} holds a {type(values).__name__}; expected a dict of tensors")
        storages, total = {}, 0
        for name, value in values.items():
            if not isinstance(name, str):
                raise ValueError(f"{who}: {path} has the key {str(name)[:40]!r}; expected names of tensors")
            if not isinstance(value, torch.Tensor):
                continue
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                kind = "quantised" if value.is_quantized else f"{value.layout} on {value.device}"
                raise ValueError(f"{who}: {name} in {path} is {kind}; expected a plain tensor")
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            total += value.numel() * value.element_size()
        # torch enlarges a storage that is too short for its tensor, with uninitialised memory.
        if sum(storages.values()) > stored:
            raise ValueError(f"{who}: {path} has tensors of more bytes than the {size} of the file; it is damaged")
        check_growth(total, size, who, path)  # a stride of 0 makes a large matrix of one value
        return values


def _open_tensorflow(prefix: Path) -> Source:
    bundle = TensorBundle(prefix)
    tensors = {
        v.name: Stored(v.shape[::-1] if is_tensorflow_kernel(v.name) else v.shape, v.dtype, bundle.shard_path(v.shard))
        for v in bundle.variables()
    }

    def read(name: str) -> torch.Tensor:
        tensor = torch.from_numpy(bundle.read(name))
        return tensor.t().contiguous() if is_tensorflow_kernel(name) else tensor

    return Source("tensorflow", bundle.files, tensors, read)
