# SPDX-License-Identifier: Apache-2.0
"""Which files of a folder are an ELMo model: options and weights, and what lies beside them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ..bert.weights import resolve_model

STEADY_STATE = "steady_state.safetensors"
OPTIONS = "options.json"
# By this name alone: a steady state and an output layer are safetensors, too.
PACKED_WEIGHTS = "weights.safetensors"
_WHO = "ctxfast.Elmo"
_HDF5 = (".hdf5", ".h5")
_OF_BERT = ("config.json", "bert_config.json", "modules.json", "0_Transformer")

_Path = str | os.PathLike[str]


def elmo_files(path_or_name: _Path, *, download: bool = False) -> tuple[Path, Path]:
    """Options and weights of an ELMo model.

    Args:
        path_or_name, download: as ``ctxfast.models.bert.weights.resolve_model``; a folder or a name, not a file.

    Raises:
        FileNotFoundError: no such folder, and no model of that name.
        ValueError: what is found is no ELMo model.
    """
    folder = resolve_model(path_or_name, download=download)
    if not folder.is_dir():
        raise ValueError(f"{_WHO}: {folder} is a file; expected a folder with {OPTIONS} and weights.")
    found = find_elmo_files(folder, _WHO)
    if found is None:
        raise ValueError(f"{_WHO}: {folder} holds a BERT model; expected ELMo's files. ctxfast.Bert reads it.")
    return found


def find_elmo_files(folder: Path, who: str, options_file: _Path | None = None) -> tuple[Path, Path] | None:
    """Options and weights of the ELMo model in a folder; None if a BERT model stands there.

    The options are options.json or the one file that is named ``*options*.json``; the weights are weights.hdf5,
    weights.safetensors, the one HDF5 file that is named ``*weights*``, or the only one.

    Args:
        folder: exists.
        who: the public name that errors begin with.
        options_file: the options, where they are given.

    Raises:
        ValueError: both ELMo and BERT, neither, or no telling which file.
    """
    names = sorted(file.name for file in folder.iterdir())
    found = f"It holds: {', '.join(names[:20]) or 'nothing'}{' ...' if len(names) > 20 else ''}."
    name = _the_one(names, (OPTIONS,), lambda name: "options" in name and name.endswith(".json"))
    options = Path(options_file) if options_file is not None else folder / name if name is not None else None
    tables = [name for name in names if name.endswith(_HDF5)]
    weights = _the_one(names, ("weights.hdf5", PACKED_WEIGHTS), lambda name: name in tables and "weights" in name)
    weights = weights or _the_one(tables, (), lambda _: True)
    is_bert = options_file is None and any(name in names for name in _OF_BERT)
    if options is not None and (tables or weights) and is_bert:
        raise ValueError(
            f"{who}: {folder} could be a BERT or an ELMo model; expected one of them. {found} Name the files of ELMo "
            "themselves (options_file, weight_file)."
        )
    if is_bert:
        return None
    if options is not None and weights is not None:
        return options, folder / weights
    if options is not None and tables:
        raise ValueError(
            f"{who}: {folder} has several HDF5 files ({', '.join(tables)}); expected one that is named *weights*. Name "
            "the file itself (weight_file)."
        )
    raise ValueError(
        f"{who}: {folder} is not a model: expected config.json (BERT) or {OPTIONS} with weights (ELMo: HDF5, "
        f"{PACKED_WEIGHTS}). {found}"
    )


def _the_one(names: Sequence[str], best: Sequence[str], fits: Callable[[str], bool]) -> str | None:
    for name in best:
        if name in names:
            return name
    found = [name for name in names if fits(name)]
    return found[0] if len(found) == 1 else None
