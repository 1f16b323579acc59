# SPDX-License-Identifier: Apache-2.0
"""Whole models on the Triton kernels: beside Hugging Face's, on ragged shapes, in training; what the backward keeps."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers
from support.hf_models import pair
from torch import Tensor, nn

import ctxfast
from ctxfast._core import capability
from ctxfast.models.bert.config import BertConfig
from ctxfast.models.bert.heads import BertForMaskedLM
from ctxfast.models.bert.modeling import Bert
from ctxfast.nn import TransformerLayer

if not torch.cuda.is_available() and not capability.is_triton_interpreted():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
SIZES = dict(
    vocab_size=120, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
    max_position_embeddings=512, initializer_range=0.1,
)  # fmt: skip
EDGES = (0, 1, 2, 63, 64, 65, 127, 128, 129)


@contextmanager
def on_triton() -> Iterator[None]:
    """Every op of a model that has a Triton kernel runs it, or raises."""
    ops = ("attention", "add_layer_norm", "embed_layer_norm", "feed_forward", "linear_cross_entropy")
    with ctxfast.use_impl(**dict.fromkeys(ops, "triton")):
        yield


def _pair(head: str = "Model", **fields: object) -> tuple[nn.Module, nn.Module]:
    ours, theirs = pair(head=head, **{**SIZES, **fields})
    return ours.to(DEVICE), theirs.to(DEVICE)


def _ragged(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 120, (len(lengths), max(lengths)), generator=generator)
    return ids.to(DEVICE), (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long().to(DEVICE)


@torch.no_grad()
@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new"])
def test_every_layer_agrees_with_hugging_face(hidden_act: str) -> None:
    ours, theirs = _pair(hidden_act=hidden_act)
    ids, mask = _ragged([40, 3, 17, 64])
    mask[1, 1] = 0  # a hole
    with on_triton():
        found = ours(ids, mask, output_hidden_states=True)
    wanted = theirs(ids, attention_mask=mask, output_hidden_states=True)
    for one, other in zip(found.hidden_states, wanted.hidden_states, strict=True):
        assert float((one - other)[mask.bool()].abs().max()) <= 1e-5
        assert not one[mask == 0].any()
    assert float((found.pooler_output - wanted.pooler_output).abs().max()) <= 1e-5


def _named(model: nn.Module) -> dict[str, Tensor]:
    """Gradients under the state_dict's names: fused parameters are split as their values are."""
    double = copy.deepcopy(model)
    with torch.no_grad():
        for target, source in zip(double.parameters(), model.parameters(), strict=True):
            target.copy_(source.grad)
    return double.state_dict()


def test_gradients_of_the_masked_language_model() -> None:
    ours, theirs = _pair("ForMaskedLM")
    ids, mask = _ragged([33, 2, 65, 16])
    labels = torch.where((torch.rand(ids.shape, device=DEVICE) < 0.2) & mask.bool(), ids, -100)
    with on_triton():
        loss = ours(ids, mask, labels=labels).loss
        loss.backward()
    wanted = theirs(ids, attention_mask=mask, labels=labels).loss
    wanted.backward()
    assert abs(float(loss.detach() - wanted.detach())) <= 1e-5
    mine, want = _named(ours), _named(theirs)
    for name in want:
        # A key's bias shifts every score of a query alike, so its gradient is zero but for rounding.
        scale = float(want[name.replace("key.bias", "query.bias")].abs().max())
        assert scale > 0 and float((mine[name] - want[name]).abs().max()) <= 1e-4 * scale, name


def test_training_steps_have_hugging_faces_losses() -> None:
    """Weights change between the steps: what the kernels read is never stale."""
    off = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ours, theirs = _pair("ForMaskedLM", **off, initializer_range=0.02)
    curves = []
    for model in (ours, theirs):
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for step in range(6):
            ids, mask = _ragged([12, 5], step % 2)
            labels = torch.where((ids % 4 == 0) & mask.bool(), ids, -100)
            with on_triton():
                loss = model(ids, attention_mask=mask, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        curves.append(torch.tensor(losses))
    assert curves[1][-1] < curves[1][0] - 0.3  # it learns
    assert float((curves[0] - curves[1]).abs().max()) < 1e-3


@torch.no_grad()
def test_float16_errs_no_more_than_hugging_face() -> None:
    ours, theirs = _pair(num_hidden_layers=4)
    ids, mask = _ragged([48, 31, 16, 5, 40, 22, 9, 64])
    real = mask.bool()
    oracle = copy.deepcopy(theirs).half().double()(ids, attention_mask=mask).last_hidden_state[real]
    ours, theirs = ours.half(), theirs.half()
    with on_triton():
        found = ours(ids, mask).last_hidden_state[real]
    wanted = theirs(ids, attention_mask=mask).last_hidden_state[real]
    errors = [float((each.double() - oracle).square().mean().sqrt()) for each in (found, wanted)]
    assert errors[0] <= 1.05 * errors[1], errors


def _shapes() -> list[list[int]]:
    drawn = random.Random(0)
    shapes = [[1, 0, 0], [512, 0, 511], [drawn.randint(0, 4) for _ in range(999)] + [9]]
    return [*shapes, *(drawn.choices(EDGES, k=drawn.randint(1, 4)) + [2] for _ in range(4))]


@torch.no_grad()
@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param(each, marks=pytest.mark.slow if n > 4 or len(each) > 900 else ())
        for n, each in enumerate(_shapes())
    ],
    ids=lambda lengths: f"{len(lengths)}-texts-up-to-{max(lengths)}",
)
def test_ragged_shapes(lengths: list[int]) -> None:
    """Every kind of plan and grid: what plain PyTorch gives, zeros where there is no token."""
    torch.manual_seed(1)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=1)
    model = Bert(BertConfig(**{**SIZES, **sizes})).eval().to(DEVICE)
    ids, mask = _ragged(lengths)
    with on_triton():
        found = model(ids, mask)
    with ctxfast.use_impl("reference"):
        wanted = model(ids, mask)
    torch.testing.assert_close(found.last_hidden_state, wanted.last_hidden_state, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.pooler_output, wanted.pooler_output, rtol=0, atol=1e-5)
    assert not found.last_hidden_state[mask == 0].any()


@pytest.mark.slow
def test_dropout_comes_from_the_seed() -> None:
    """The same seed gives the same loss and gradients to the last bit, another seed others; nothing drops in eval."""
    model = BertForMaskedLM(BertConfig(**{**SIZES, "num_hidden_layers": 1})).to(DEVICE)
    ids, mask = _ragged([7, 33])
    labels = torch.where(mask.bool(), ids, -100)

    def step(seed: int) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(seed)
        model.zero_grad()
        with on_triton():
            loss = model(ids, mask, labels=labels).loss
            loss.backward()
        return loss.detach(), [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    model.train()
    (first, gradients), (again, same), (other, _) = step(5), step(5), step(6)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert all(torch.equal(one, two) for one, two in zip(gradients, same, strict=True))
    model.eval()
    assert torch.equal(step(5)[0], step(6)[0])


def test_compiles_in_one_graph_with_gradients() -> None:
    off = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = Bert(BertConfig(**{**SIZES, **off, "num_hidden_layers": 1})).train().to(DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = torch.randint(1, 120, (2, 9), device=DEVICE)
    found = []
    with on_triton():
        for run in (model, compiled):
            model.zero_grad()
            out = run(ids)
            (out.last_hidden_state.square().sum() + out.pooler_output.sum()).backward()
            grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            found.append([out.last_hidden_state.detach(), *(grad.clone() for grad in grads)])
    assert len(found[0]) == len(found[1]) > 15
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max() + 1))


def _kept_for_backward(run: Callable[[], object], module: nn.Module) -> int:
    """Bytes of all memory that autograd keeps of a run, parameters apart; each piece counts once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, Tensor] = {}  # held, so that no address is given out twice

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_a_layer_keeps_at_most_half_of_an_eager_layer() -> None:
    """Shapes of BERT-Base in small: heads of 64, four times as wide between the products, 512 tokens a text.

    Of N-wide rows: the input, query, key and value, attention's result, both products that end in a LayerNorm, the
    first LayerNorm's result, and four for the product before GELU; in float32 lse a head and two numbers a LayerNorm.
    Neither masks of dropout nor GELU's result, and nothing that grows with the square of a text's length.
    """
    N, H, T = 64, 1, 512
    ours = TransformerLayer(N, H, 4 * N, dropout=0.1, attention_dropout=0.1, device=DEVICE, dtype=torch.float16)
    config = transformers.BertConfig(hidden_size=N, num_attention_heads=H, intermediate_size=4 * N)
    config._attn_implementation = "eager"
    theirs = transformers.models.bert.modeling_bert.BertLayer(config).to(DEVICE, torch.float16)
    x = torch.randn(T, N, device=DEVICE, dtype=torch.float16, requires_grad=True)
    cu_seqlens = torch.tensor([0, T], dtype=torch.int32, device=DEVICE)
    with on_triton():
        mine = _kept_for_backward(lambda: ours.train()(x, cu_seqlens, T), ours)
    padded = x.detach()[None].requires_grad_()
    eager = _kept_for_backward(lambda: theirs.train()(padded), theirs)
    if DEVICE == "cpu":  # there torch keeps masks of dropout in two bytes an element, on a GPU in one
        eager -= H * T * T + 2 * T * N
    expected = T * (12 * N * 2 + H * 4 + 4 * 4)
    assert expected <= mine <= expected + 200  # seeds and offsets
    assert mine <= 0.5 * eager, (mine, eager)
