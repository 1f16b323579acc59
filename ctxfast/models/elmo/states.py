# SPDX-License-Identifier: Apache-2.0
"""What state the LSTMs of ELMo start a text from: carried from batch to batch, or fixed."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..._core.files import replacing
from ..._core.reading import reading
from .config import ElmoConfig

State = tuple[Tensor, Tensor]
# Beside a weight file: the steady state that belongs to it.
_WEIGHTS = "sha256_of_first_rows"


def _usable(value: Tensor, like: Tensor) -> Tensor:
    """``value`` on the device and in the dtype of ``like``; a copy if autograd could not save it otherwise."""
    value = value.to(like)
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not value.is_inference():
        return value
    return value.clone()


class _HeldState(nn.Module):
    """h and c in buffers that follow the module to its device and stay out of its state_dict."""

    h: Tensor | None
    c: Tensor | None

    def __init__(self, config: ElmoConfig) -> None:
        super().__init__()
        self._sizes = (config.num_layers, config.projection_dim, config.cell_size)
        self.register_buffer("h", None, persistent=False)
        self.register_buffer("c", None, persistent=False)

    def held(self) -> State:
        """h and c, where they are set."""
        assert self.h is not None and self.c is not None
        return self.h, self.c

    def _hold(self, state: State, like: Tensor, kind: str, legend: str, *rows: int) -> None:
        """Keep h (L, 2, *rows, P) and c (L, 2, *rows, H) on the device and in the dtype of ``like``."""
        layers, size, cells = self._sizes
        for name, value, width in zip("hc", state, (size, cells)):
            expected = (layers, 2, *rows, width)
            if tuple(value.shape) != expected:
                raise ValueError(
                    f"ctxfast.Elmo: {kind} state {name} has shape {tuple(value.shape)}; expected ({legend}) = "
                    f"{expected}. It belongs to another model."
                )
        self.h, self.c = (value.detach().to(like) for value in state)


class CarriedState(_HeldState):
    """The state each row of a batch ended in, from which the same row of the next batch starts (AllenNLP's rule).

    A larger batch gets zeros for its new rows; a smaller one uses and changes the first rows only. Under DataParallel
    the replicas' states are lost, as in AllenNLP.
    """

    @property
    def rows(self) -> int:
        """Rows a state is held for."""
        return 0 if self.h is None else self.h.shape[2]

    def take(self, batch: int, like: Tensor) -> State:
        """The state of the first ``batch`` rows: (L, 2, batch, P) and (L, 2, batch, H), in the dtype of ``like``."""
        layers, size, cells = self._sizes
        missing = batch - self.rows
        if missing > 0:
            fresh = [like.new_zeros(layers, 2, missing, width) for width in (size, cells)]
            if self.rows:
                fresh = [torch.cat([old.to(like), new], 2) for old, new in zip(self.held(), fresh)]
            self.h, self.c = fresh
        h, c = (_usable(value[:, :, :batch], like) for value in self.held())
        return h, c

    def put(self, state: State) -> None:
        """Keep the state the first rows ended in, cut off from the graph."""
        batch = state[0].shape[2]
        kept = []
        for old, new in zip(self.held(), state):
            new = new.detach().to(old)
            kept.append(new if batch == old.shape[2] else torch.cat([new, old[:, :, batch:]], 2))
        self.h, self.c = kept

    def set(self, state: State | None, like: Tensor) -> None:
        """Go on from ``state``, to the device and dtype of ``like``."""
        self.reset()
        if state is None:
            return
        self._hold(state, like, "carried", "layers, 2, rows, size", state[0].shape[-2])

    def reset(self, mask: Tensor | None = None) -> None:
        """Forget all rows, or set those to zero where ``mask`` (rows,) is True."""
        if mask is None:
            self.h = self.c = None
            return
        mask = torch.as_tensor(mask)
        if tuple(mask.shape) != (self.rows,):
            raise ValueError(
                f"ctxfast.Elmo: mask of reset_states has shape {tuple(mask.shape)}; expected (rows,) = ({self.rows},), "
                f"the rows a state is held for."
            )
        if self.h is not None and self.c is not None:
            keep = ~mask.to(self.h.device, torch.bool)[None, None, :, None]
            self.h, self.c = self.h * keep, self.c * keep


class SteadyState(_HeldState):
    """One fixed state every text starts from, whatever came before it and stands beside it in the batch."""

    @property
    def is_set(self) -> bool:
        return self.h is not None

    def set(self, state: State, like: Tensor) -> None:
        """h (L, 2, P) and c (L, 2, H), to the device and dtype of ``like``."""
        self._hold(state, like, "steady", "layers, 2, size")

    def clear(self) -> None:
        self.h = self.c = None

    def take(self, batch: int, like: Tensor) -> State:
        h, c = (_usable(value, like)[:, :, None].expand(-1, -1, batch, -1) for value in self.held())
        return h, c

    def save(self, path: str | os.PathLike[str], weights: str) -> None:
        """Write the state as safetensors (``h``, ``c``), under a temporary name first.

        Args:
            path: the file.
            weights: digest of the weights it belongs to, kept in the file.
        """
        if not self.is_set:
            raise RuntimeError("ctxfast.Elmo: there is no steady state yet. Call calibrate() first.")
        with replacing(Path(path)) as temporary:
            h, c = self.held()
            tensors = {"h": h.contiguous(), "c": c.contiguous()}
            save_file(tensors, temporary, {_WEIGHTS: weights})

    def load(self, path: str | os.PathLike[str], like: Tensor, weights: str) -> None:
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another kind of file, or the state of other weights.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"ctxfast.Elmo: there is no steady state file {path}.")
        with reading(path, "ctxfast.Elmo", "steady state, as save_steady_state writes it"):
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                digest = (file.metadata() or {}).get(_WEIGHTS)
            if set(tensors) != {"h", "c"} or not all(value.is_floating_point() for value in tensors.values()):
                raise ValueError(f"ctxfast.Elmo: {path} holds no steady state; expected what save_steady_state wrote.")
            if digest is not None and digest != weights:
                raise ValueError(
                    f"ctxfast.Elmo: {path} was calibrated with other weights than the model's; expected its own. "
                    "Remove the file, or call calibrate() and save_steady_state() anew."
                )
            self.set((tensors["h"], tensors["c"]), like)
