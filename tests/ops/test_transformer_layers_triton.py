# SPDX-License-Identifier: Apache-2.0
"""``transformer_layers`` in Triton, which encoders train with on a GPU: precision under autocast, dropout, what gets a
gradient, and when a layer is still called."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import transformers
from torch import Tensor, nn

import ctxfast
from ctxfast._core import capability, registry
from ctxfast.models.bert.config import BertConfig
from ctxfast.models.bert.modeling import Bert
from ctxfast.ops.attention import triton_blocks
from ctxfast.ops.shared import philox

if not torch.cuda.is_available() and not capability.is_triton_interpreted():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
SIZES = dict(
    vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
    max_position_embeddings=32, initializer_range=0.2,
)  # fmt: skip
# The compiled embeddings have other bits with a gradient than without.
TRITON = dict(transformer_layers="triton", embed_layer_norm="reference")


def test_layers_of_a_pass_share_a_list_of_blocks(monkeypatch, runs) -> None:
    """Where layers are one step each, too; a pass with other lengths makes its own."""
    calls, plain = [], triton_blocks.list_blocks

    class Counted:
        def __getitem__(self, grid):
            calls.append(grid)
            return plain[grid]

    monkeypatch.setattr(triton_blocks, "list_blocks", Counted())
    config = BertConfig(**{**SIZES, "hidden_size": 64, "num_hidden_layers": 3, "max_position_embeddings": 256})
    model = Bert(config).to(DEVICE).eval()
    for lengths in ([170, 1, 1, 1, 1], [3, 168, 1, 1, 1]):
        mask = torch.arange(max(lengths), device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]
        ids = torch.randint(1, 60, mask.shape, device=DEVICE)
        with torch.no_grad():
            with ctxfast.use_impl("reference"):
                expected = model(ids, mask).last_hidden_state
            calls.clear()
            with ctxfast.use_impl(**TRITON):
                found = model(ids, mask).last_hidden_state
        assert len(calls) == 1 and runs
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def runs(monkeypatch) -> Iterator[list[int]]:
    """One entry for every layer that ran as one step."""
    module, seen = registry.OPS["transformer_layers"].module("triton"), []
    forward = module._forward
    monkeypatch.setattr(module, "_forward", lambda *args: seen.append(1) or forward(*args))
    yield seen


def _pair(**options: float) -> tuple[Bert, nn.Module]:
    """A model and Hugging Face's with its weights, none of them as they start."""
    config = BertConfig(**SIZES | options)
    theirs_config = transformers.BertConfig.from_dict(config.to_dict())
    theirs_config._attn_implementation = "eager"
    theirs = transformers.BertModel(theirs_config, add_pooling_layer=False)
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    ours = Bert(config, add_pooling_layer=False)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(DEVICE), theirs.to(DEVICE)


def _model(p: float = 0.0) -> Bert:
    torch.manual_seed(0)
    return _pair(hidden_dropout_prob=p, attention_probs_dropout_prob=p)[0].train()


def _batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, 60, (3, 7), device=DEVICE)
    lengths = torch.tensor([7, 1, 4], device=DEVICE)
    return ids, (torch.arange(7, device=DEVICE) < lengths[:, None]).long()


def _grads(model: nn.Module, *inputs: Tensor, amp: torch.dtype | None = None, **options) -> tuple[Tensor, list[Tensor]]:
    """Hidden states of the real tokens, and the gradients of their product with given numbers."""
    model.zero_grad(set_to_none=True)
    with torch.autocast(DEVICE, amp or torch.float16, enabled=amp is not None):
        out = model(*inputs[:1], attention_mask=inputs[1]).last_hidden_state[inputs[1].bool()]
    given = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    (out * given).sum().backward(**options)
    return out.detach(), [parameter.grad for parameter in model.parameters()]


def _error(found: list[Tensor], right: list[Tensor]) -> float:
    return sum(float((one.double() - two).square().sum() / two.square().sum()) for one, two in zip(found, right)) ** 0.5


def test_under_autocast_it_errs_no_more_than_hugging_face(runs) -> None:
    """float16, as the interpreter has no products of bfloat16. Squares of errors over three models; the bias of key has
    no gradient but for rounding, as a softmax does not see it."""
    errors = torch.zeros(2, 2, dtype=torch.float64)
    for seed in range(3):
        torch.manual_seed(seed)
        models, inputs = _pair(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), _batch()
        for i, model in enumerate(models):
            right, right_grads = _grads(copy.deepcopy(model).double(), *inputs)
            del runs[:]
            with ctxfast.use_impl(**TRITON):
                found, grads = _grads(model, *inputs, amp=torch.float16)
            assert len(runs) == (0 if i else 2)
            assert all(each.dtype == torch.float32 for each in (found, *grads))
            names = [name for name, _ in model.named_parameters()]
            kept = [at for at, name in enumerate(names) if "qkv_bias" not in name and "key.bias" not in name]
            errors[i, 0] += _error([found], [right]) ** 2
            errors[i, 1] += _error([grads[at] for at in kept], [right_grads[at] for at in kept]) ** 2
    assert (errors[0] <= 1.05**2 * errors[1]).all(), errors.sqrt()


def test_autocast_by_ops_and_by_layers_agree() -> None:
    inputs, model = _batch(), _model()
    with ctxfast.use_impl(**TRITON):
        found, grads = _grads(model, *inputs, amp=torch.float16)
    with ctxfast.use_impl("reference"):
        right, right_grads = _grads(model, *inputs)
        plain, plain_grads = _grads(model, *inputs, amp=torch.float16)
    assert _error([found], [right.double()]) < 1.2 * _error([plain], [right.double()])
    wide = [grad.double() for grad in right_grads]
    assert _error(grads, wide) < 1.2 * _error(plain_grads, wide)


@pytest.mark.parametrize("amp", [None, torch.float16], ids=str)
def test_hidden_states_have_their_whole_gradient(amp) -> None:
    """A layer reads its input twice, as a sum and as a product's factor; whoever is handed it gets both gradients."""
    inputs, model = _batch(), _model().eval()
    found = {}
    for choice in (TRITON, dict(impl="reference")):
        with ctxfast.use_impl(**choice), torch.autocast(DEVICE, amp or torch.float16, enabled=amp is not None):
            out = model(*inputs, output_hidden_states=True, return_packed=True)
        states = out.packed_hidden_states
        found[len(found)] = torch.autograd.grad((out.packed_last_hidden_state**3).sum(), states[:-1])
    for one, two in zip(found[0], found[1]):
        torch.testing.assert_close(one, two, rtol=0, atol=(1e-4 if amp is None else 3e-2) * float(two.abs().max()))


@pytest.mark.parametrize("amp", [None, torch.float16], ids=str)
def test_only_what_is_wanted_gets_a_gradient(amp) -> None:
    """Whatever is frozen, the others' gradients are what they were, and nothing is made for nobody."""
    inputs, model = _batch(), _model()
    with ctxfast.use_impl(**TRITON):
        _, whole = _grads(model, *inputs, amp=amp)
        names = [name for name, _ in model.named_parameters()]
        picks = ("bias", "layer.0.", "output.LayerNorm.weight", "qkv", "layer.1.output")
        for pick in picks:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(pick in name)
            _, some = _grads(model, *inputs, amp=amp)
            for name, one, two in zip(names, some, whole):
                assert (one is None) == (pick not in name)
                assert one is None or torch.equal(one, two), (pick, name)


@pytest.mark.slow
@pytest.mark.parametrize("amp", [None, torch.float16], ids=str)
def test_dropout_is_drawn_again_and_kept_by_checkpoints(amp) -> None:
    inputs, model, runs = _batch(), _model(0.3), []
    with ctxfast.use_impl(**TRITON):
        for is_checkpointed in (False, False, True):
            model.gradient_checkpointing_enable(is_checkpointed)
            torch.manual_seed(0)
            runs.append(_grads(model, *inputs, amp=amp))
        torch.manual_seed(0)
        runs.append(_grads(model, *inputs, amp=amp))
    assert torch.equal(runs[0][0], runs[1][0]) and all(map(torch.equal, runs[0][1], runs[1][1]))
    # Checkpointed layers draw their seeds one by one, and draw them again in the backward.
    assert torch.equal(runs[2][0], runs[3][0]) and all(map(torch.equal, runs[2][1], runs[3][1]))


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_gradients_are_those_of_the_definition_with_the_same_masks(p, monkeypatch) -> None:
    """A backward that is differentiated itself answers with the definition; its first gradients are the kernels'."""
    inputs, model = _batch(), _model(p)
    with ctxfast.use_impl(**TRITON):
        torch.manual_seed(3)
        _, grads = _grads(model, *inputs)
        torch.manual_seed(3)
        _, recorded = _grads(model, *inputs, create_graph=True)
    for one, two in zip(grads, recorded):
        assert two.requires_grad
        torch.testing.assert_close(one, two, rtol=1e-3, atol=2e-5 * float(two.abs().max()) + 1e-6)


def test_a_graph_that_is_kept_gives_the_same_again() -> None:
    inputs, model = _batch(), _model(0.2)
    with ctxfast.use_impl(**TRITON):
        loss = model(*inputs).last_hidden_state.square().mul(torch.arange(32, device=DEVICE)).sum()
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, parameters)))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, parameters)


def test_a_weight_changed_before_the_backward_is_noticed() -> None:
    inputs, model = _batch(), _model()
    with ctxfast.use_impl(**TRITON):
        loss = model(*inputs).last_hidden_state.sum()
    with torch.no_grad():
        model.encoder.layer[1].intermediate.dense.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_steps_under_one_autocast_see_the_weights_of_the_moment() -> None:
    """torch's own autocast would multiply by the first step's weights to the end of the context."""
    inputs, model = _batch(), _model().eval()
    with ctxfast.use_impl(**TRITON), torch.autocast(DEVICE, torch.float16):
        before = model(*inputs).last_hidden_state
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
            changed = model(*inputs).last_hidden_state
        after = model(*inputs).last_hidden_state
    with ctxfast.use_impl(**TRITON), torch.autocast(DEVICE, torch.float16):
        alone = model(*inputs).last_hidden_state
    assert torch.equal(after, alone) and torch.equal(changed, alone) and not torch.equal(before, after)


def test_hooks_are_called(runs) -> None:
    inputs, model, seen = _batch(), _model(), []
    layer = model.encoder.layer[1]
    hooks = [
        layer.output.register_forward_hook(lambda *args: seen.append("forward")),
        layer.attention.self.register_full_backward_hook(lambda *args: seen.append("backward")),
        layer.intermediate.dense.weight.register_post_accumulate_grad_hook(lambda *args: seen.append("parameter")),
    ]
    with ctxfast.use_impl(**TRITON):
        _grads(model, *inputs)
        assert sorted(seen) == ["backward", "forward", "parameter"] and len(runs) == 1
        for hook in hooks[:2]:
            hook.remove()
        _grads(model, *inputs)
    assert seen[3:] == ["parameter"] and len(runs) == 3


def test_seeds_are_drawn_once_for_all_layers(monkeypatch) -> None:
    drawn = []
    randint = torch.randint
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: drawn.append(args[2]) or randint(*args, **kwargs))
    monkeypatch.setattr(philox, "draw_seeds", lambda x, p: None)
    inputs = _batch()
    drawn.clear()
    with ctxfast.use_impl(**TRITON):
        _model(0.1)(*inputs)
    assert drawn == [(6, 2)]
