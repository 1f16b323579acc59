# SPDX-License-Identifier: Apache-2.0
"""Self-attention over packed tokens: one fused projection for query, key and value under three parameters' names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._core import torch_ops
from . import encoder, tools
from .all_rows import AllRows

_PARTS = ("query", "key", "value")


class SelfAttention(tools.NotScriptable):
    """Query, key and value projections, then bidirectional attention within each packed sequence.

    The three projections are one parameter pair, ``qkv_weight`` (3N, N) and ``qkv_bias`` (3N,), so that they are one
    product. A state_dict has them under Hugging Face's names: ``query.weight``, ``query.bias``, ``key.weight``, ...

    Args:
        hidden_size: N, a multiple of ``num_heads``.
        num_heads: H.
        dropout: probability of dropping an attention weight in training.
        impl: implementation of ``attention``; None chooses.

    Raises:
        ValueError: ``hidden_size`` is not a multiple of ``num_heads``.

    Reference: Vaswani et al. 2017; names as in Hugging Face's BertSelfAttention.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        dropout: float = 0.0,
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(
                f"ctxfast.nn.SelfAttention: hidden_size is {hidden_size}; expected a multiple of "
                f"num_heads = {num_heads}."
            )
        self.hidden_size, self.num_heads, self.head_dim = (
            hidden_size,
            num_heads,
            hidden_size // num_heads,
        )
        self.dropout, self.impl = dropout, impl
        self.weight_dtype: torch.dtype | None = None
        self.qkv_weight = nn.Parameter(torch.empty(3 * hidden_size, hidden_size, device=device, dtype=dtype))
        self.qkv_bias = nn.Parameter(torch.empty(3 * hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize as three torch.nn.Linear layers."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        nn.init.uniform_(self.qkv_weight, -bound, bound)
        nn.init.uniform_(self.qkv_bias, -bound, bound)

    @tools.fx_leaf
    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        rows: AllRows | None = None,
        relative_bias: Tensor | None = None,
    ) -> Tensor:
        """x (T, N), cu_seqlens (S + 1,) int32, max_seqlen -> (T, N), heads side by side.

        With ``rows``, x holds every row of a padded batch, and each looks at the real tokens of its text.
        ``relative_bias`` as in ``functional.attention``, without ``rows``.
        """
        return encoder.self_attention(
            x, *self.qkv(), self.num_heads, cu_seqlens, max_seqlen, rows,
            dropout_p=self.dropout if self.training else 0.0, weight_dtype=self.weight_dtype,
            relative_bias=relative_bias, impl=self.impl,
        )  # fmt: skip

    def qkv(self) -> tuple[Tensor, Tensor]:
        """Weight (3N, N) and bias (3N,) of the fused projection."""
        if torch_ops.is_traced() and torch.onnx.is_in_onnx_export():
            return self.qkv_weight.data, self.qkv_bias.data  # constants there: the state_dict has no such names
        return self.qkv_weight, self.qkv_bias

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, num_heads={self.num_heads}, dropout={self.dropout}, impl={self.impl or 'auto'}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for kind in ("weight", "bias"):
            fused = getattr(self, f"qkv_{kind}")
            slices = (fused if keep_vars else fused.detach()).chunk(3)
            for part, tensor in zip(_PARTS, slices):
                destination[f"{prefix}{part}.{kind}"] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        is_assigned = local_metadata.get("assign_to_params_buffers", False)
        for kind in ("weight", "bias"):
            fused = getattr(self, f"qkv_{kind}")
            keys = [f"{prefix}{part}.{kind}" for part in _PARTS]
            given = {key: state_dict[key] for key in keys if key in state_dict}
            missing_keys.extend(key for key in keys if key not in given)
            wrong = False
            for key, tensor in given.items():
                expected = (fused.shape[0] // 3, *fused.shape[1:])
                if not isinstance(tensor, Tensor):
                    wrong = True
                    error_msgs.append(
                        f'While copying the parameter named "{key}", expected a tensor but got {type(tensor)}.'
                    )
                elif tuple(tensor.shape) != expected:
                    wrong = True
                    error_msgs.append(
                        f"size mismatch for {key}: copying a param with shape {tuple(tensor.shape)} from checkpoint, "
                        f"the shape in current model is {expected}."
                    )
                elif fused.is_meta and not tensor.is_meta and not is_assigned:
                    wrong = True
                    error_msgs.append(
                        f"{key} cannot be copied to the meta device. Pass assign=True to keep its tensor."
                    )
            if wrong or not given:
                continue
            if not is_assigned:
                with torch.no_grad():
                    for key, target in zip(keys, fused.chunk(3)):
                        if key in given:
                            target.copy_(given[key])
            elif len({(tensor.dtype, tensor.device) for tensor in given.values()}) > 1:
                error_msgs.append(f"{', '.join(given)} differ in dtype or device; they are kept as one parameter.")
            elif len(given) == 3:
                joined = torch.cat([given[key].detach() for key in keys])
                setattr(self, f"qkv_{kind}", nn.Parameter(joined, requires_grad=fused.requires_grad))
            else:
                error_msgs.append(
                    f"{', '.join(given)} cannot be assigned without the rest of query, key and value: they are kept "
                    "as one parameter. Load without assign=True."
                )
        names = {f"{prefix}{part}.{kind}" for part in _PARTS for kind in ("weight", "bias")}
        if strict:
            unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key not in names)
