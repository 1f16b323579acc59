# SPDX-License-Identifier: Apache-2.0
"""What sentence-transformers' files in a model's folder say: pooling, what follows it, prompts, the longest text."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ... import functional

_WHO = "ctxfast.Embedder"
POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
# Keys of Pooling's config before version 5.7, in the order in which the parts of several modes follow one another.
_OLD_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# A module's type is its class's full name, which moved between versions.
_NAMESPACES = (
    "sentence_transformers.models",
    "sentence_transformers.base.modules",
    "sentence_transformers.sentence_transformer.modules",
    "sentence_transformers.sentence_transformer.models",
)
_KNOWN = ("Transformer", "Pooling", "Dense", "LayerNorm", "Normalize", "Dropout")
_TRANSFORMER_CONFIGS = tuple(
    f"sentence_{kind}_config.json" for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta")
)
# Settings of the Transformer module that do not change what a text's vector is, or only its rounding.
_HARMLESS = {
    *("torch_dtype", "dtype", "attn_implementation", "low_cpu_mem_usage", "device_map", "use_safetensors"),
    *("trust_remote_code", "add_pooling_layer", "cache_dir", "token", "revision", "local_files_only", "use_fast"),
}
_OPTIONS = ("model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs")
_SETTINGS = {*_OPTIONS, "max_seq_length", "do_lower_case", "transformer_task", "modality_config", "module_output_name"}
_SETTINGS |= {"unpad_inputs", "backend", "cache_dir"}
# A folder inside the model's: no control characters, not longer than file systems allow.
_PLACE = re.compile(r"[^\x00-\x1f\ud800-\udfff]{0,255}")
_STEP_KEYS = {
    "LayerNorm": {"dimension"},
    "Dense": {
        *("in_features", "out_features", "bias", "activation_function", "use_residual"),
        *("module_input_name", "module_output_name"),
    },
}
_PLAIN_OUTPUT = {"method": "forward", "method_output_name": "last_hidden_state"}
_WAY_OUT = "Pass pooling='mean' (or another) to pool the encoder's own vectors instead"


@dataclass(frozen=True)
class SentenceModel:
    """How a model's token vectors become a vector of a text, and what is said of its texts.

    Attributes:
        dim: size of the vector that comes out.
        pooling: names of ``POOLINGS``; the parts of several stand one after another.
        include_prompt: whether a prompt's tokens are pooled, too.
        steps: modules that follow, in order, (M, N) to (M, N'); without a Normalize at the end.
        is_normalized: whether a Normalize is the last one.
        prompts: what is written before a text, by name.
        default_prompt: the prompt of a text for which none is named.
        max_length: most tokens of a text; None for no limit.
        do_lower_case: whether texts are lower-cased whatever the tokenizer does.
        files: files that were read.
        problem: why the files cannot be followed, as the text of an error; None where they can.
    """

    dim: int
    pooling: tuple[str, ...] = ("mean",)
    include_prompt: bool = True
    steps: tuple[nn.Module, ...] = ()
    is_normalized: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str = ""
    max_length: int | None = None
    do_lower_case: bool = False
    files: tuple[Path, ...] = ()
    problem: str | None = None

    @property
    def after_pooling(self) -> str:
        """Names of the modules that follow pooling, but for a Normalize at the end; "" for none."""
        return ", ".join(type(step).__name__ for step in self.steps)


class Dense(nn.Module):
    """A linear layer, its activation and perhaps a residual; (M, N_in) to (M, N_out)."""

    def __init__(self, size: tuple[int, int], bias: bool, activation: nn.Module, use_residual: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(*size, bias=bias)
        self.activation_function = activation
        self.use_residual = use_residual
        if use_residual and size[0] != size[1]:
            self.residual = nn.Linear(*size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # Not nn.Linear's forward: here a row's result does not depend on what else is in the batch.
        out = self.activation_function(functional.linear_act(x, self.linear.weight, self.linear.bias))
        if self.use_residual:
            out = out + (functional.linear_act(x, self.residual.weight) if hasattr(self, "residual") else x)
        return out


class LayerNorm(nn.Module):
    """sentence-transformers' LayerNorm over the last axis."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Normalize(nn.Module):
    """Length 1 along the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1)


class Truncate(nn.Module):
    """The first ``size`` components."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x[..., : self.size]


def _read(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{_WHO}: {path} is damaged or no JSON file ({type(error).__name__}: {error}).") from error
    if not isinstance(value, kind):
        raise ValueError(f"{_WHO}: {path} holds a JSON {type(value).__name__}; expected a {kind.__name__}.")
    return value


def _take(config: dict[str, Any], name: str, kind: type | tuple[type, ...], default: Any, path: Path) -> Any:
    """A value of a config, checked; null is the default."""
    value = config.get(name)
    if value is None:
        return default
    if (
        not isinstance(value, kind)
        or (isinstance(value, bool) and kind is int)
        or (kind is int and not 1 <= value < 1 << 31)
    ):
        wanted = "a positive integer" if kind is int else getattr(kind, "__name__", "another type")
        raise ValueError(f"{_WHO}: {name} in {path} is {value!r:.80}; expected {wanted}.")
    return value


def _entries(root: Path) -> list[tuple[str, Path]]:
    """(type, folder) of every module of modules.json; none where there is no such file.

    Raises:
        ValueError: a damaged file, or a path that leads out of the folder.
    """
    path = root / "modules.json"
    if not path.is_file():
        return []
    entries = []
    for entry in _read(path, list):
        kind, place = (entry.get(name) for name in ("type", "path")) if isinstance(entry, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(place, str):
            raise ValueError(f"{_WHO}: {path} holds {entry!r:.80}; expected objects with 'type' and 'path'.")
        if PurePosixPath(place).is_absolute() or ".." in PurePosixPath(place).parts or not _PLACE.fullmatch(place):
            raise ValueError(f"{_WHO}: {path} names the path {place!r:.80}; expected one inside the folder.")
        entries.append((kind, root / place))
    return entries


def _known_name(kind: str) -> str | None:
    """The class that a module's type names; None for one that is not supported."""
    for namespace in _NAMESPACES:
        parts = kind.removeprefix(namespace + ".").split(".") if kind.startswith(namespace + ".") else []
        # The class, or a file of the namespace and the class.
        if parts and len(parts) <= 2 and parts[-1] in _KNOWN:
            return parts[-1]
    return None


def transformer_folder(root: Path) -> Path:
    """The folder of the encoder in a model's folder, which modules.json may keep one level down."""
    entries = _entries(root)
    return entries[0][1] if entries and _known_name(entries[0][0]) == "Transformer" else root


def read_sentence_model(root: Path, hidden_size: int, positions: int, model_max_length: int | None) -> SentenceModel:
    """Reads sentence-transformers' files in a model's folder; without any the mean over tokens, as that library has it.

    Args:
        root: folder with modules.json, or without.
        hidden_size: size of the encoder's vectors.
        positions: most tokens of a text that the encoder has positions for.
        model_max_length: most tokens of a text by the tokenizer's files.

    What cannot be followed becomes ``problem``: vectors of tokens can be had all the same.

    Raises:
        ValueError: the settings of the encoder itself are damaged.
    """
    entries = _entries(root)
    limit = positions if model_max_length is None else min(positions, model_max_length)
    if not entries:
        leftover = [name for name in ("1_Pooling", "2_Dense", "2_Normalize") if (root / name).is_dir()]
        problem = None
        if leftover:
            problem = (
                f"{_WHO}: {root} holds {', '.join(leftover)}, but no modules.json that says how they follow one "
                f"another. {_WAY_OUT}."
            )
        return SentenceModel(hidden_size, max_length=limit, problem=problem)
    files = [root / "modules.json"]
    found: dict[str, Any] = {"max_length": limit}
    if _known_name(entries[0][0]) == "Transformer":
        config = next((entries[0][1] / name for name in _TRANSFORMER_CONFIGS if (entries[0][1] / name).is_file()), None)
        if config is not None:
            files.append(config)
            settings = _read_transformer(config)
            # The folder's own limit goes before the tokenizer's; nothing goes beyond the model's positions.
            found.update(settings, max_length=min(settings["max_length"] or limit, positions))
    try:
        # Prompts hold whatever is wrong with the modules.
        truncate_dim = _read_config(root / "config_sentence_transformers.json", found, files)
        found.update(_read_modules(root, entries, hidden_size, truncate_dim, files))
    except ValueError as error:
        found.update(dim=hidden_size, problem=found.get("problem") or str(error))
    return SentenceModel(**found, files=tuple(files))


def _read_transformer(path: Path) -> dict[str, Any]:
    """Settings of the Transformer module; what has no counterpart here is a ``problem``."""
    config = _read(path, dict)
    odd = [name for name, value in config.items() if value and name not in _SETTINGS]
    limit = _take(config, "max_seq_length", int, None, path)
    for name in _OPTIONS:
        options = _take(config, name, dict, {}, path)
        if name in ("tokenizer_args", "processor_kwargs"):
            limit = _take(options, "model_max_length", int, limit, path)
            options = {key: value for key, value in options.items() if key != "model_max_length"}
        odd += [f"{name}.{key}" for key in options if key not in _HARMLESS]
    if config.get("transformer_task", "feature-extraction") != "feature-extraction":
        odd.append("transformer_task")
    output = config.get("modality_config")
    if output is not None:
        output = output.get("text") if isinstance(output, dict) else output
        name = output.get("method_output_name") if isinstance(output, dict) else None
        name = name[0] if isinstance(name, list) and len(name) == 1 else name
        is_plain = isinstance(output, dict) and {**output, "method_output_name": name} == _PLAIN_OUTPUT
        if not is_plain or config.get("module_output_name", "token_embeddings") != "token_embeddings":
            odd.append("modality_config")
    found = {"max_length": limit, "do_lower_case": _take(config, "do_lower_case", bool, False, path)}
    if odd:
        found["problem"] = f"{_WHO}: {path} sets {', '.join(odd)}, which is not followed here. {_WAY_OUT}."
    return found


def _read_config(path: Path, found: dict[str, Any], files: list[Path]) -> int | None:
    """Prompts of config_sentence_transformers.json, into ``found``, and the size that vectors are cut to."""
    if not path.is_file():
        return None
    files.append(path)
    config = _read(path, dict)
    found.update(_read_prompts(config, path))
    kind = _take(config, "model_type", str, "SentenceTransformer", path)
    if kind != "SentenceTransformer":
        raise ValueError(f"{_WHO}: {path} is of a {kind}; expected a SentenceTransformer. {_WAY_OUT}.")
    return _take(config, "truncate_dim", int, None, path)


def _read_modules(
    root: Path, entries: list[tuple[str, Path]], hidden_size: int, truncate_dim: int | None, files: list[Path]
) -> dict[str, Any]:
    where = root / "modules.json"
    for position, (kind, _) in enumerate(entries):
        name = _known_name(kind)
        wanted = "Transformer" if position == 0 else "Pooling" if position == 1 else None
        if name is None:
            raise ValueError(
                f"{_WHO}: {where} has a module {kind!r}; expected {', '.join(_KNOWN)} of sentence-transformers. "
                f"{_WAY_OUT}."
            )
        if (wanted or name) != name or (wanted is None and name in ("Transformer", "Pooling")):
            order = ", ".join(kind.rpartition(".")[2] for kind, _ in entries)
            raise ValueError(
                f"{_WHO}: {where} has the modules {order}; expected one Transformer, one Pooling, then others. "
                f"{_WAY_OUT}."
            )
    if len(entries) < 2:
        raise ValueError(f"{_WHO}: {where} has no Pooling module, so that a text has no vector. {_WAY_OUT}.")
    found = _read_pooling(entries[1][1], files)
    dim = hidden_size * len(found["pooling"])
    steps: list[nn.Module] = []
    for kind, folder in entries[2:]:
        name = _known_name(kind)
        assert name is not None  # others were refused above
        step, dim = _read_step(name, folder, dim, files)
        if step is not None:
            steps.append(step)
    if truncate_dim is not None:
        steps.append(Truncate(truncate_dim))
        dim = min(dim, truncate_dim)
    while steps and isinstance(steps[-1], Normalize):
        found["is_normalized"] = True
        steps.pop()
    return {**found, "dim": dim, "steps": tuple(step.requires_grad_(False) for step in steps)}


def _read_prompts(config: dict[str, Any], path: Path) -> dict[str, Any]:
    prompts = {"query": "", "document": ""}
    for name, text in _take(config, "prompts", dict, {}, path).items():
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{_WHO}: prompt {name!r} in {path} is {text!r:.80}; expected a string.")
        prompts[name] = text or ""
    default = _take(config, "default_prompt_name", str, None, path)
    if default is not None and default not in prompts:
        raise ValueError(
            f"{_WHO}: default_prompt_name in {path} is {default!r}; expected one of its prompts, {', '.join(prompts)}."
        )
    return {"prompts": prompts, "default_prompt": "" if default is None else prompts[default]}


def _config_of(folder: Path, files: list[Path], *, is_needed: bool = True) -> tuple[dict[str, Any], Path]:
    path = folder / "config.json"
    if not path.is_file():
        if is_needed:
            raise ValueError(f"{_WHO}: {path} does not exist, but modules.json names its folder. {_WAY_OUT}.")
        return {}, path
    files.append(path)
    return _read(path, dict), path


def _read_pooling(folder: Path, files: list[Path]) -> dict[str, Any]:
    config, path = _config_of(folder, files)
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in _OLD_POOLINGS.items() if _take(config, key, bool, False, path)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    known = {*_OLD_POOLINGS, "pooling_mode", "include_prompt", "embedding_dimension", "word_embedding_dimension"}
    unknown = sorted(set(config) - known)
    if unknown:
        raise ValueError(f"{_WHO}: {path} sets {', '.join(unknown)}, which is not followed here. {_WAY_OUT}.")
    if not isinstance(modes, list) or not modes or any(mode not in POOLINGS for mode in modes):
        raise ValueError(f"{_WHO}: pooling_mode in {path} is {modes!r:.80}; expected one of {', '.join(POOLINGS)}.")
    return {"pooling": tuple(modes), "include_prompt": _take(config, "include_prompt", bool, True, path)}


def _read_step(name: str, folder: Path, dim: int, files: list[Path]) -> tuple[nn.Module | None, int]:
    """A module after pooling, None for one without effect, and the size of its vectors."""
    if name == "Dropout":
        return None, dim
    config, path = _config_of(folder, files, is_needed=name != "Normalize")
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise ValueError(
                f"{_WHO}: {key} in {path} is {config[key]!r:.80}; expected 'sentence_embedding'. {_WAY_OUT}."
            )
    if name == "Normalize":
        return Normalize(), dim
    odd = [key for key, value in config.items() if value and key not in _STEP_KEYS[name]]
    if odd:
        raise ValueError(f"{_WHO}: {path} sets {', '.join(odd)}, which is not followed here. {_WAY_OUT}.")
    if name == "LayerNorm":
        sizes = {"dimension": _take(config, "dimension", int, None, path)}
    else:
        sizes = {"in_features": _take(config, "in_features", int, None, path)}
        out = _take(config, "out_features", int, None, path)
        if out is None:
            raise ValueError(f"{_WHO}: {path} has no out_features; expected the size of a vector.")
        bias = _take(config, "bias", bool, True, path)
        activation = _activation(config, path)
        is_residual = _take(config, "use_residual", bool, False, path)
    ((key, size),) = sizes.items()
    if size != dim:
        raise ValueError(f"{_WHO}: {key} in {path} is {size!r}; expected {dim}, what the module before gives.")
    with torch.device("meta"):  # the file brings the memory: a config alone claims none
        step = LayerNorm(dim) if name == "LayerNorm" else Dense((dim, out), bias, activation, is_residual)
    _load(step, folder, files)
    step = step.float().eval()
    return step, _size_of(step, dim, path)


def _size_of(step: nn.Module, dim: int, path: Path) -> int:
    """The size of the vectors that a module makes of those of size ``dim``: an activation may make it another."""
    problem = f"{_WHO}: the module of {path} makes no vector of a vector"
    with torch.no_grad():
        try:
            made = step(torch.zeros(2, dim))
        except Exception as error:  # whatever an activation raises that takes more than one tensor
            reason = " ".join(str(error).split())
            raise ValueError(f"{problem} ({type(error).__name__}: {reason:.200}). {_WAY_OUT}.") from error
    if not isinstance(made, Tensor) or made.dim() != 2 or len(made) != 2 or not made.is_floating_point():
        found = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise ValueError(f"{problem}: of two it makes {found}; expected (2, N). {_WAY_OUT}.")
    return made.shape[1]


def _activation(config: dict[str, Any], path: Path) -> nn.Module:
    """An activation by its class's full name. Only classes of torch.nn: a folder's words start no other code."""
    name = _take(config, "activation_function", str, "torch.nn.modules.activation.Tanh", path)
    found = getattr(nn, name.rpartition(".")[2], None) if name.startswith("torch.nn.") else None
    if isinstance(found, type) and issubclass(found, nn.Module) and f"{found.__module__}.{found.__name__}" == name:
        try:
            activation = found()
        except TypeError:
            pass
        else:
            if getattr(activation, "dim", 1) is None:
                activation.__dict__["dim"] = 1  # what Softmax and its kin choose for rows, with a warning
            return activation
    raise ValueError(
        f"{_WHO}: activation_function in {path} is {name!r:.80}; expected a module of torch.nn that takes no "
        f"arguments, by its full name. {_WAY_OUT}."
    )


def _load(step: nn.Module, folder: Path, files: list[Path]) -> None:
    paths = [folder / name for name in ("model.safetensors", "pytorch_model.bin")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ValueError(f"{_WHO}: {folder} has neither model.safetensors nor pytorch_model.bin. {_WAY_OUT}.")
    files.append(path)
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        step.load_state_dict(tensors, assign=True)
    except Exception as error:  # pickle raises what it likes
        reason = " ".join(str(error).split())
        raise ValueError(f"{_WHO}: {path} is damaged or does not fit its config.json ({reason:.300}).") from error
