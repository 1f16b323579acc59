# SPDX-License-Identifier: Apache-2.0
"""``ctxfast convert``: model files of one format into those of another."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .loop_options import DOWNLOAD, check_model
from .progress import say

_WHO = "ctxfast.convert"
_DTYPES = ("float32", "float16", "bfloat16")
_SENTENCE_PARTS = ("modules.json", "sentence_*_config.json", "config_sentence_transformers.json", "[0-9]*_*")
_ELMO_SUFFIXES = (".hdf5", ".h5", ".th", ".pt")
# Beside a biLM that `ctxfast pretrain elmo` made: its output layer and the words of it.
_OF_TRAINING = ("softmax.safetensors", "vocabulary.txt")
_HELP = """\
Convert a model. What SRC is decides what DST gets; DST is a folder that appears when it is whole.

  BERT (Google's TensorFlow checkpoint, pytorch_model.bin, safetensors, a package's name)
       -> config.json, model.safetensors and the tokenizer's files, as Hugging Face lays them out
  ELMo (folder with options.json and weights, a name, or a state dict .th / .pt of AllenNLP with --options-file)
       -> options.json, weights.hdf5, as AllenNLP and bilm-tf lay them out, or weights.safetensors with --dtype; the
          steady state beside them; of a whole AllenNLP model the language model alone (what is left out is named)

  ctxfast convert uncased_L-12_H-768_A-12/bert_model.ckpt bert-base
  ctxfast convert archive/weights.th elmo --options-file options.json
"""


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "convert",
        help="model files into another format",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="SRC", help="folder, weight file, TensorFlow prefix, package with a model, name on the hub")
    add("target", metavar="DST", help="folder to make")
    add("--download", action="store_true", help=DOWNLOAD)
    add("--dtype", help=f"store weights as {', '.join(_DTYPES)} (BERT: as they are; ELMo: float32 in HDF5)")
    add("--gelu", help="BERT: erf or tanh in place of the config's (default: the config's; Google's checkpoints: tanh)")
    add("--options-file", help="ELMo: options.json, where it lies apart")
    add("--overwrite", action="store_true", help="replace DST")
    add("--quiet", action="store_true", help="print nothing but errors")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert ``args.source``; returns the exit code."""
    source, target = Path(args.source), Path(args.target)
    from .._core.files import check_apart, replacing_folder

    read = {"SRC": [source], "--options-file": [] if args.options_file is None else [args.options_file]}
    check_apart(_WHO, {"DST": [target]}, read)
    if target.exists() and target.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{_WHO}: DST {target} is a part of SRC {source}; expected another place.")
    if target.exists() and not args.overwrite:
        raise FileExistsError(f"{_WHO}: {target} exists. Pass --overwrite to replace it.")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{_WHO}: {target} is a file; expected a folder to make.")
    if args.dtype is not None and args.dtype not in _DTYPES:
        raise ValueError(f"{_WHO}: dtype is {args.dtype!r}; expected one of {', '.join(_DTYPES)}.")
    elmo = _elmo_source(args, source)
    if elmo is not None and args.gelu is not None:
        raise ValueError(f"{_WHO}: --gelu is given for an ELMo model; expected it for BERT only.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(target) as folder:
        what = _bert(args, folder) if elmo is None else _elmo(elmo, folder, args.options_file, args.dtype)
    if not args.quiet:
        say("convert", f"{target}: {what}")
    return 0


def _elmo_source(args: argparse.Namespace, source: Path) -> Path | None:
    """Where the ELMo model is that ``args.source`` means; None if it means another kind."""
    if args.options_file is not None and not Path(args.options_file).is_file():
        raise FileNotFoundError(f"{_WHO}: --options-file {args.options_file} does not exist; expected options.json.")
    if source.suffix in _ELMO_SUFFIXES:
        return source
    from ..models.elmo.files import OPTIONS, PACKED_WEIGHTS

    if args.options_file is not None:
        is_packed = source.suffix == ".safetensors" or (source / PACKED_WEIGHTS).is_file()
        if not is_packed and not any(source.glob("*.h*5")):
            raise ValueError(
                f"{_WHO}: --options-file is given, but SRC {source} is not an ELMo model; expected it for those."
            )
        return source
    if source.name == PACKED_WEIGHTS and source.with_name(OPTIONS).is_file():
        return source
    check_model(args.source, "convert", "SRC", download=args.download)
    from ..models.bert.weights import resolve_model

    found = source if source.is_dir() else resolve_model(args.source)
    return found if (found / OPTIONS).is_file() else None


def _bert(args: argparse.Namespace, folder: Path) -> str:
    import torch

    from .._core.texts import some
    from ..models.bert.tokenization import BertTokenizer
    from ..models.bert.weights import load_checkpoint, save_checkpoint
    from ..training.tasks.predictor import SETTINGS_FILE

    found = load_checkpoint(args.source, gelu=args.gelu)
    state = found.state_dict
    if args.dtype is not None:
        state = {name: value.to(getattr(torch, args.dtype)) for name, value in state.items()}
    save_checkpoint(folder, found.config, state, overwrite=True)
    # A folder may hold weights alone; a model without its tokenizer is still a model.
    place = found.source if found.source.is_dir() else found.source.parent
    has_tokenizer = any((place / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json"))
    if has_tokenizer:
        BertTokenizer.from_pretrained(place).save(folder)
    if (place / SETTINGS_FILE).is_file():  # a fine-tuned model stays one
        shutil.copy(place / SETTINGS_FILE, folder)
    count = sum(value.numel() for value in state.values())
    what = f"{found.config.model_type}, {count:,} parameters" + ("" if has_tokenizer else "; no tokenizer found")
    if found.unexpected:
        what += f"; left out: {some(found.unexpected)}"
    rest = _not_converted(place, folder, found.files)
    return what + (f"; not copied: {some(rest)}" if rest else "")


def _not_converted(place: Path, folder: Path, read: Collection[Path]) -> list[str]:
    """What a sentence-transformers folder says of the model beside its encoder and tokenizer (pooling, normalisation,
    prompts, lengths): named, so that nobody takes the new folder for the whole model."""
    parts = [path for pattern in _SENTENCE_PARTS for path in sorted(place.glob(pattern))]
    return [path.name for path in parts if path not in read and not (folder / path.name).exists()]


def _elmo(source: Path, folder: Path, options_file: str | None, dtype: str | None) -> str:
    import torch

    from .._core.reading import reading
    from ..models.bert.sources import load_pickle
    from ..models.elmo.bilm import ElmoBiLm
    from ..models.elmo.config import ElmoConfig
    from ..models.elmo.files import OPTIONS, PACKED_WEIGHTS, STEADY_STATE, find_elmo_files
    from ..models.elmo.weights import load_weights, save_weights, weights_from_state_dict

    if not source.exists():
        raise FileNotFoundError(f"{_WHO}: {source} does not exist; expected an ELMo folder or weight file.")
    place = source if source.is_dir() else source.parent
    found = find_elmo_files(source, _WHO, options_file) if source.is_dir() else None
    weights = source if found is None else found[1]
    options = Path(options_file) if options_file is not None else place / OPTIONS if found is None else found[0]
    if not options.is_file():
        raise FileNotFoundError(f"{_WHO}: there is no {options}. Pass --options-file.")
    config = ElmoConfig.from_file(options)
    if weights.suffix in (".th", ".pt"):
        whole = load_pickle(weights, _WHO)
        tensors = {name: value for name, value in whole.items() if isinstance(value, torch.Tensor)}
        with reading(weights, _WHO, "state dict of an ELMo model"):
            config, state = weights_from_state_dict(tensors, config)
        left = len(whole) - len(state)
    else:
        config, state = load_weights(weights, config)
        left = 0
    target = folder / ("weights.hdf5" if dtype is None else PACKED_WEIGHTS)
    save_weights(state, config, folder / OPTIONS, target, dtype=getattr(torch, dtype or "float32"))
    what = f"elmo, {sum(value.numel() for value in state.values()):,} parameters"
    steady = place / STEADY_STATE
    if steady.is_file():
        # It names the weights that it belongs to, which are rounded in another dtype.
        model = ElmoBiLm.from_weights(config, state, state="steady")
        model.load_steady_state(steady)
        made = ElmoBiLm.from_files(folder / OPTIONS, target, state="steady")
        made.steady_state = model.steady_state
        made.save_steady_state(folder / STEADY_STATE)
        what += ", its steady state"
    if left:
        what += f"; {left} tensors beside the language model are left out"
    rest = [name for name in _OF_TRAINING if (place / name).is_file()]
    return what + (f"; not copied: {', '.join(rest)}" if rest else "")
