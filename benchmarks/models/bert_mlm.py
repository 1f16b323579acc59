# SPDX-License-Identifier: Apache-2.0
"""A masked-LM training step: forward with dropout 0.1, backward, AdamW. ctxfast's model and Hugging Face's.

float32 weights; in bfloat16 cases autocast lowers the products. The gate looks at the loss: with dropout on it may
differ from the right one (no dropout, float32) by the draw, so its bound is wide; parity of gradients and training
curves is tested in tests/.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ctxfast._core import choice
from ctxfast.models.bert.heads import BertForMaskedLM

from ..cases import SEED, Case, Row, Work
from ..inputs import RAGGED_32
from ..provider import Call, Outputs, Provider, Unavailable, require
from . import bert

ROWS = (
    Row("minilm step ragged 32 (fill 0.39)", dict(model="minilm", lengths=RAGGED_32)),
    Row("bert-base step 32x128", dict(model="bert-base", lengths=(128,) * 32), cpu=(), cuda=("bfloat16",)),
    Row("bert-base step 32x512", dict(model="bert-base", lengths=(512,) * 32), cpu=(), cuda=("bfloat16",)),
    Row("bert-base step ragged 256", dict(model="bert-base", lengths=RAGGED_32 * 8), cpu=(), cuda=("bfloat16",)),
)
# Of the loss, about ln(vocabulary) at random weights: what dropout's draw may move it by.
BOUND = 5e-2


def make(random: torch.Generator, model: str, lengths: tuple[int, ...]) -> dict[str, Any]:
    args = bert.make(random, model, lengths)
    ids = args["input_ids"]
    chosen = (torch.rand(ids.shape, generator=random) < 0.15) & (ids > 0)
    return args | dict(input_ids=torch.where(chosen, 103, ids), labels=torch.where(chosen, ids, -100))


def work(sizes: dict[str, Any], itemsize: int, backward: bool) -> Work:
    return bert.work(sizes, itemsize, True)


def _ours(args: Mapping[str, Any], dropout: float) -> BertForMaskedLM:
    torch.manual_seed(SEED)
    return BertForMaskedLM(
        bert.config(args["model"], hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    )


def _hugging_face(case: Case, args: Mapping[str, Any]) -> torch.nn.Module:
    require("transformers")
    import transformers

    transformers.logging.set_verbosity_error()
    ours = _ours(args, 0.1)
    config = transformers.BertConfig.from_dict(ours.config.to_dict())
    config._attn_implementation = "sdpa"
    model = transformers.BertForMaskedLM(config)
    model.load_state_dict(ours.state_dict(), strict=True)
    return model


def _step(case: Case, args: Mapping[str, Any], model: torch.nn.Module, run: Callable[..., Any] | None = None) -> Call:
    model.to(case.device).train()
    run = model if run is None else run
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=case.device == "cuda")
    ids, mask, labels = args["input_ids"], args["attention_mask"], args["labels"]

    def forward() -> Outputs:
        lower = (
            torch.autocast(case.device, torch.bfloat16) if case.dtype == torch.bfloat16 else contextlib.nullcontext()
        )
        with torch.enable_grad():
            with lower:
                loss = run(ids, attention_mask=mask, labels=labels).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return (loss.detach().float().reshape(1).clone(),)  # the next run of a CUDA graph overwrites it

    forward()  # the optimiser's state is not the step's memory
    return Call(forward)


def _build_ours(case: Case, args: Mapping[str, Any]) -> Call:
    return _step(case, args, _ours(args, 0.1))


def _build_reference(case: Case, args: Mapping[str, Any]) -> Call:
    model = _ours(args, 0.1)

    def on_references(*inputs: Any, **options: Any) -> Any:
        with choice.use_impl("reference"):
            return model(*inputs, **options)

    return _step(case, args, model, on_references)


def _build_hf(case: Case, args: Mapping[str, Any]) -> Call:
    return _step(case, args, _hugging_face(case, args))


def _build_hf_compiled(mode: str | None) -> Callable[[Case, Mapping[str, Any]], Call]:
    def build(case: Case, args: Mapping[str, Any]) -> Call:
        if mode is not None and case.device != "cuda":
            raise Unavailable("compared on a GPU only")
        torch.compiler.reset()
        model = _hugging_face(case, args)
        if case.device == "cuda" and args["attention_mask"] is None:
            # Without a mask Transformers falls onto a slow attention path under compile.
            args = {**args, "attention_mask": torch.ones_like(args["input_ids"])}
        return _step(case, args, model, torch.compile(model, mode=mode))

    return build


def oracle(case: Case, args: Mapping[str, Any]) -> Outputs:
    """The loss at the first weights: no dropout, float32, plain references."""
    model = _ours(args, 0.0).to(case.device).eval()
    with choice.use_impl("reference"):
        loss = model(args["input_ids"], attention_mask=args["attention_mask"], labels=args["labels"]).loss
    return (loss.reshape(1),)


OURS = (
    Provider("ctxfast", _build_ours, "BertForMaskedLM", ours=True),
    Provider("ctxfast reference", _build_reference, "every op on plain PyTorch", ours=True),
)
PEERS = (Provider("Hugging Face, eager", _build_hf, "BertForMaskedLM, SDPA"),)
COMPILED = (
    Provider("Hugging Face, torch.compile", _build_hf_compiled(None)),
    Provider("Hugging Face, torch.compile reduce-overhead", _build_hf_compiled("reduce-overhead"), "explicit mask"),
    Provider("Hugging Face, torch.compile max-autotune", _build_hf_compiled("max-autotune"), "explicit mask"),
)
