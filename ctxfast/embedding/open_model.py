# SPDX-License-Identifier: Apache-2.0
"""Models, BERT or ELMo, opened from their files behind the face of ``TextEncoder``."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..models.bert.config import read_json
from ..models.bert.modeling import Bert
from ..models.bert.sentence_modules import read_sentence_model, transformer_folder
from ..models.bert.tokenization import BertTokenizer
from ..models.bert.weights import resolve_model
from ..models.elmo.bilm import ElmoBiLm
from ..models.elmo.files import find_elmo_files
from . import transformers_model
from .encoders import BertEncoder, ElmoEncoder, TextEncoder

_MODEL_SUFFIXES = (".json", ".txt", ".safetensors", ".bin", ".model", ".pt", ".pth")

_Path = str | os.PathLike[str]


def chosen_device(name: str | torch.device) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"ctxfast.Embedder: device is {name!r}; expected 'auto', 'cpu' or 'cuda'.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"ctxfast.Embedder: device is {str(device)!r}, but torch sees no GPU. Pass device='cpu'.")
    return device


def computes_in_on(device: torch.device, asked: str | None) -> str:
    """What a model computes in on a device: what was asked for, else float16 on a GPU, float32 elsewhere.

    On a GPU half precision is many times as fast as float32. Of its two kinds float16 has 11 bits to bfloat16's 8, and
    what these models compute with stays far below its largest number, 65504; where it does not, ``BatchEncoder`` says
    so.

    Raises:
        ValueError: float16 on a CPU, int8 elsewhere.
    """
    if asked is None:
        return "float16" if device.type == "cuda" else "float32"
    if asked == "float16" and device.type == "cpu":
        raise ValueError(
            "ctxfast.Embedder: dtype is 'float16' on a CPU; expected 'float32', 'bfloat16' or 'int8' there. For "
            "vectors of float16 pass vector_dtype='float16' (--vector-dtype)."
        )
    if asked == "int8" and device.type != "cpu":
        raise ValueError(
            f"ctxfast.Embedder: dtype is 'int8' on {device}; expected 'float16', 'bfloat16' or 'float32' there: "
            f"products of 8 bits are the CPU's alone. Pass device='cpu' (--device cpu) for them."
        )
    return asked


def open_encoder(
    model: _Path | None,
    device: torch.device,
    dtype: str | None = None,
    *,
    state: str = "steady",
    options_file: _Path | None = None,
    weight_file: _Path | None = None,
    download: bool = False,
    split: int | None = None,
) -> TextEncoder:
    """Open a model, BERT or ELMo, told apart by its files; see ``Embedder``."""
    computes_in = computes_in_on(device, dtype)
    if (options_file is None) != (weight_file is None):
        given, missing = ("options_file", "weight_file") if weight_file is None else ("weight_file", "options_file")
        raise ValueError(f"ctxfast.Embedder: {given} is given without {missing}; an ELMo model needs both.")
    if options_file is not None and weight_file is not None:
        if model is not None:
            raise ValueError("ctxfast.Embedder: model is given beside options_file; expected one or the other.")
        files = (Path(options_file), Path(weight_file))
    elif model is None:
        raise ValueError("ctxfast.Embedder: model is None; expected a folder or a name, or an ELMo model's two files.")
    else:
        folder = Path(model).expanduser()
        path = resolve_model(model, download=download)
        root = folder if folder.is_dir() else path if path.is_dir() else path.parent
        files = find_elmo_files(root, "ctxfast.Embedder") if path.is_dir() else None
        if files is None:
            return _open_bert(path, root, device, computes_in, split)
    if split is not None:
        raise ValueError(f"ctxfast.Embedder: split is {split}; expected None: an ELMo model takes texts of any length.")
    # On a CPU the rest of an ELMo is fastest, and exact, in float32.
    narrow = getattr(torch, computes_in) if device.type == "cpu" and computes_in != "float32" else None
    bilm = ElmoBiLm.from_files(*files, state=state, weight_dtype=narrow)
    return ElmoEncoder(bilm.to(device, torch.float32 if narrow else getattr(torch, computes_in)), files)


def _open_bert(path: Path, root: Path, device: torch.device, dtype: str, split: int | None) -> BertEncoder:
    """Args: ``path``: what ``resolve_model`` found; ``root``: the folder that was meant."""
    folder = transformer_folder(root)
    if path.is_dir() and folder != root:
        path = folder
    folder = path if path.is_dir() else path.parent
    _refuse_adapters(folder)
    held = torch.float32 if dtype == "int8" else getattr(torch, dtype)
    other = transformers_model.other_type(folder) if path.is_dir() else None
    if other is not None:
        narrow = torch.int8 if dtype == "int8" else None
        bert, tokenizer, positions = transformers_model.open_model(path, other, device, held, narrow)
    else:
        bert = Bert.from_pretrained(path, dtype=held, device=device, add_pooling_layer=False)
        if dtype == "int8":
            bert.quantize("int8")
        tokenizer = BertTokenizer.from_pretrained(path)
        positions = bert.config.max_length
    # A checkpoint of TensorFlow is several files that begin alike.
    files = [
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and (file.suffix in _MODEL_SUFFIXES or file.name.startswith(path.name + "."))
    ]
    sentence = read_sentence_model(root, bert.config.hidden_size, positions, tokenizer.max_length)
    if sentence.do_lower_case:
        tokenizer.add_lower_case()
    files += [file for file in sentence.files if file not in files]
    return BertEncoder(bert, tokenizer, files, sentence, split)


def _refuse_adapters(folder: Path) -> None:
    """Raise ValueError for a folder whose vectors are made by more than its config and weights say here."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        raise ValueError(
            f"ctxfast.Embedder: {adapter} makes this an adapter of another model; expected a whole model. Merge it "
            f"first: peft's merge_and_unload(), then save_pretrained()."
        )
    path = folder / "config.json"
    config = read_json(path, "ctxfast.Embedder") if path.is_file() else {}
    if config.get("quantization_config") is not None:
        raise ValueError(
            f"ctxfast.Embedder: {path} has a quantization_config; expected weights that are not quantized. Save the "
            f"model dequantized first."
        )
    auto_map = config.get("auto_map")
    if isinstance(auto_map, dict) and "AutoModel" in auto_map:
        raise ValueError(
            f"ctxfast.Embedder: {path} names code of its own for the model, {auto_map['AutoModel']!r}; no code of a "
            f"folder is run here. Remove auto_map from a copy of it if the model is a plain {config.get('model_type')}."
        )
