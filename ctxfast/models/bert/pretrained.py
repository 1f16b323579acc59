# SPDX-License-Identifier: Apache-2.0
"""What ``Bert`` and the models built on it share: initialization, reading and writing of files."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ...nn import AddLayerNorm, SelfAttention, tools
from .config import BertConfig
from .weights import Checkpoint, load_checkpoint, save_checkpoint

_Model = TypeVar("_Model", bound="Pretrained")


class Pretrained(tools.NotScriptable):
    """What ``Bert`` and the models built on it share: initialization, reading and writing of files."""

    # What stands before this module's names in the names of files (``load_checkpoint``'s normal form).
    _file_prefix = ""
    # End of Hugging Face's class name, where the heads alone do not give it.
    _task: str | None = None

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def init_weights(self, *parts: nn.Module) -> None:
        """Initializes these modules and their submodules as Hugging Face does: see ``Bert``."""
        for part in parts:
            part.apply(self._init_module)

    def tie_weights(self) -> None:
        """Ties parameters that share one tensor under two names again; most models have none."""

    @torch.no_grad()
    def _init_module(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            module.weight.normal_(0.0, std)
            module.bias.zero_()
        elif isinstance(module, SelfAttention):
            module.qkv_weight.normal_(0.0, std)
            module.qkv_bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(0.0, std)
            if module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
        elif isinstance(module, (nn.LayerNorm, AddLayerNorm)):
            module.reset_parameters()

    @staticmethod
    def _read(path_or_name: str | os.PathLike[str], gelu: str | None, download: bool) -> Checkpoint:
        return load_checkpoint(path_or_name, gelu=gelu, download=download)

    @classmethod
    def _from_checkpoint(
        cls: type[_Model],
        read: Checkpoint,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        **options: Any,
    ) -> _Model:
        """The model with the weights that were read; heads that the file lacks are initialized, with a warning."""
        prefix = cls._file_prefix
        with torch.device("meta"):  # allocate and initialize nothing that would be overwritten
            model = cls(read.config, **options)
        if dtype is None:
            dtype = read.state_dict["bert.embeddings.word_embeddings.weight"].dtype
        place = {"device": torch.device("cpu" if device is None else device), "dtype": dtype}
        state_dict = {
            name.removeprefix(prefix): tensor.to(**place)
            for name, tensor in read.state_dict.items()
            if name.startswith(prefix)
        }
        known = model.state_dict().keys()
        state_dict = {name: tensor for name, tensor in state_dict.items() if name in known}
        missing = model.load_state_dict(state_dict, strict=False, assign=True).missing_keys
        for module in model.modules():
            own = dict(module.named_parameters(recurse=False))
            if any(parameter.is_meta for parameter in own.values()):
                for name, parameter in own.items():
                    fresh = torch.zeros(parameter.shape, **place)
                    setattr(module, name, nn.Parameter(fresh, requires_grad=parameter.requires_grad))
                model._init_module(module)
                for name, parameter in own.items():  # the file may have the weight and not the bias
                    if not parameter.is_meta:
                        setattr(module, name, parameter)
        model.tie_weights()
        if missing:
            warnings.warn(
                f"ctxfast.{cls.__name__}: {read.source} has no {', '.join(missing)}. They start at "
                f"random: train them before use.",
                stacklevel=3,
            )
        return model.eval()

    def save_pretrained(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> list[Path]:
        """Writes config.json and model.safetensors as Hugging Face lays them out.

        Args:
            directory: made if absent.
            overwrite: replace files that are there.

        Returns:
            The paths written.

        Raises:
            FileExistsError: a file is there and ``overwrite`` is not set.
        """
        prefix = self._file_prefix
        state_dict = {prefix + name: tensor for name, tensor in self.state_dict().items()}
        # The decoder is stored once: its bias as cls.predictions.bias, its weight, when tied, as the word table.
        state_dict.pop("cls.predictions.decoder.bias", None)
        if self.config.tie_word_embeddings:
            state_dict.pop("cls.predictions.decoder.weight", None)
        return save_checkpoint(directory, self.config, state_dict, task=self._task, overwrite=overwrite)
