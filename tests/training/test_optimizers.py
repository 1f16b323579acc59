# SPDX-License-Identifier: Apache-2.0
"""Optimisers against their formulas written out, and against torch's where they meet."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ctxfast.training.loop import optimizers
from ctxfast.training.loop.config import LoopConfig
from ctxfast.training.loop.optimizers import BertAdam, Lamb, parameter_groups, share_of_rate
from ctxfast.training.loop.train import make_optimizer


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()


def _gradients(model: nn.Module, steps: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()] for _ in range(steps)
    ]


def _run(optimizer: torch.optim.Optimizer, model: nn.Module, gradients: list[list[Tensor]]) -> list[Tensor]:
    for given in gradients:
        for parameter, gradient in zip(model.parameters(), given):
            parameter.grad = gradient.clone()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def test_adagrad_on_a_cpu_is_one_pass_and_the_same_formula() -> None:
    model = _model()
    other, gradients = copy.deepcopy(model), _gradients(model, 5)
    config = LoopConfig(steps=5, optimizer="adagrad", learning_rate=0.1, weight_decay=0.01, initial_accumulator=0.5)
    made = make_optimizer(config, [{"params": list(model.parameters())}], torch.device("cpu"))
    assert made.defaults["fused"]
    plain = torch.optim.Adagrad(
        other.parameters(), lr=0.1, weight_decay=0.01, initial_accumulator_value=0.5, foreach=False
    )
    for found, wanted in zip(_run(made, model, gradients), _run(plain, other, gradients)):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", ["bert", "lamb"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_formulas(kind: str, decay: float) -> None:
    model = _model()
    wanted, gradients = [p.detach().clone() for p in model.parameters()], _gradients(model, 5)
    for i, weight in enumerate(wanted):
        first, second = torch.zeros_like(weight), torch.zeros_like(weight)
        for step, given in enumerate(gradients, 1):
            first = 0.9 * first + 0.1 * given[i]
            second = 0.999 * second + 0.001 * given[i] ** 2
            if kind == "bert":
                weight -= 0.01 * (first / (second.sqrt() + 1e-6) + decay * weight)
            else:
                update = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-6) + decay * weight
                ratio = weight.norm() / update.norm() if decay and weight.norm() > 0 else 1.0
                weight -= 0.01 * ratio * update
    optimizer = (BertAdam if kind == "bert" else Lamb)(model.parameters(), lr=0.01, weight_decay=decay)
    for mine, want in zip(_run(optimizer, model, gradients), wanted):
        torch.testing.assert_close(mine, want, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("kind", [BertAdam, Lamb])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_steps_are_the_same(kind, dtype, monkeypatch) -> None:
    """By torch's kernel, which a CPU has too; going on from a state of either."""
    model, gradients = _model().to(dtype), _gradients(_model(), 6)
    gradients = [[each.to(dtype) for each in given] for given in gradients]
    gradients[2][0].zero_()
    kernels, fused = [], torch._fused_adamw_
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *args, **kwargs: kernels.append(1) or fused(*args, **kwargs))
    found = {}
    for order in ((False, False), (True, True), (False, True), (True, False)):
        own = copy.deepcopy(model)
        optimizer = kind(parameter_groups(own, 0.1), lr=0.01)
        for is_fused, part in zip(order, (gradients[:3], gradients[3:])):
            monkeypatch.setattr(optimizers, "_can_fuse", lambda *lists, is_fused=is_fused: is_fused)
            fresh = kind(parameter_groups(own, 0.1), lr=0.5)
            fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer = fresh
            found[order] = _run(optimizer, own, part)
            assert bool(kernels) == (is_fused or any(order[:1]))
        kernels.clear()
        assert {type(state["step"]) for state in optimizer.state.values()} == {int}
    for each in found.values():
        for one, two in zip(each, found[False, False]):
            torch.testing.assert_close(one, two, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-6)


def test_only_a_gpus_own_tensors_are_fused() -> None:
    assert not optimizers._can_fuse([nn.Parameter(torch.zeros(3))], [torch.zeros(3)])


def test_without_decay_lamb_is_torchs_adam() -> None:
    model = _model()
    other, gradients = copy.deepcopy(model), _gradients(model, 4)
    mine = _run(Lamb(model.parameters(), lr=0.01, weight_decay=0.0, eps=1e-8), model, gradients)
    theirs = _run(torch.optim.Adam(other.parameters(), lr=0.01, eps=1e-8), other, gradients)
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b)


def test_state_is_saved_and_goes_on() -> None:
    model = _model()
    gradients = _gradients(model, 6)
    once = copy.deepcopy(model)
    whole = _run(BertAdam(once.parameters(), lr=0.01), once, gradients)
    optimizer = BertAdam(model.parameters(), lr=0.01)
    _run(optimizer, model, gradients[:3])
    resumed = BertAdam(model.parameters(), lr=0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for a, b in zip(_run(resumed, model, gradients[3:]), whole):
        assert torch.equal(a, b)


def test_parameters_without_gradient_stay() -> None:
    model = _model()
    before = [p.detach().clone() for p in model.parameters()]
    assert float(BertAdam(model.parameters()).step(lambda: torch.tensor(3.0))) == 3.0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before))


def test_groups_leave_biases_and_norms_undecayed() -> None:
    from ctxfast.models.bert.config import BertConfig
    from ctxfast.models.bert.modeling import Bert

    model = Bert(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                            intermediate_size=8))  # fmt: skip
    model.embeddings.word_embeddings.weight.requires_grad_(False)
    decayed, free = parameter_groups(model, 0.01)
    assert decayed["weight_decay"] == 0.01 and free["weight_decay"] == 0.0
    assert all(p.dim() == 2 for p in decayed["params"]) and all(p.dim() == 1 for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == sum(p.requires_grad for p in model.parameters())


def test_schedule() -> None:
    share = share_of_rate("linear", 4, 10)
    assert [share(step) for step in (0, 1, 4, 7, 10, 12)] == [0.0, 0.25, 1.0, 0.5, 0.0, 0.0]
    assert share_of_rate("linear", 0, 5)(0) == 1.0
    with pytest.raises(ValueError, match="warmup_steps is 11; expected 0 to total_steps = 10"):
        share_of_rate("linear", 11, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(lr=-1.0), "lr is -1.0"),
        (dict(betas=(1.0, 0.9)), r"betas\[0\] is 1.0"),
        (dict(eps=-1e-3), "eps is -0.001"),
        (dict(weight_decay=-0.1), "weight_decay is -0.1"),
    ],
)
def test_values_out_of_range(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"ctxfast.training.BertAdam: {message}; expected"):
        BertAdam([nn.Parameter(torch.zeros(1))], **arguments)
