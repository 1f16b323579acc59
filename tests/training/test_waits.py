# SPDX-License-Identifier: Apache-2.0
"""A pretraining step reads nothing back from where the model is: a GPU would have to be waited for."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ctxfast._core import checks
from ctxfast.models.bert.config import BertConfig
from ctxfast.models.bert.heads import BertForMaskedLM, BertForPreTraining
from ctxfast.training.loop.config import LoopConfig
from ctxfast.training.loop.optimizers import parameter_groups
from ctxfast.training.loop.train import _parts, make_optimizer, moved
from ctxfast.training.pretraining.bert_instances import Instance
from ctxfast.training.pretraining.bert_task import BertPretraining

SIZES = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
READS = ("item", "tolist", "nonzero", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__")


class _NoReads(TorchDispatchMode):
    """What reads values on the host below Python, such as an index of bools."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2"), name
        if name in ("index", "index_put", "index_put_"):
            assert all(each is None or each.dtype != torch.bool for each in args[1]), name
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_reads(monkeypatch) -> Callable[[], TorchDispatchMode]:
    def begin() -> TorchDispatchMode:
        monkeypatch.setattr(checks, "is_readable", lambda value: False)  # as on a GPU

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("a value was read on the host")

        for name in READS:
            monkeypatch.setattr(Tensor, name, refuse)
        monkeypatch.setattr(torch, "nonzero", refuse)
        return _NoReads()

    return begin


def _batch(has_relation: bool) -> tuple[nn.Module, Any, BertPretraining]:
    task = BertPretraining.__new__(BertPretraining)  # no corpus: a batch needs the tokenizer's padding alone
    draw = random.Random(0)
    instances = []
    for length in (9, 4, 12):
        places = sorted(draw.sample(range(1, length), 3))
        ids = [draw.randrange(1, 40) for _ in range(length)]
        instances.append(Instance(ids, length // 2, False, places, [draw.randrange(1, 40) for _ in places], None))
    task.tokenizer = type("Tokenizer", (), {"pad_token_id": 0})()
    task._is_ernie, task.has_relation, task.impl = False, has_relation, None
    kind = BertForPreTraining if has_relation else BertForMaskedLM
    return kind(BertConfig(**SIZES)).train(), task._batch(instances), task


@pytest.mark.parametrize("optimizer", ["adamw", "bert_adam", "lamb"])
@pytest.mark.parametrize("has_relation", [False, True])
def test_a_step_reads_nothing(has_relation, optimizer, no_reads) -> None:
    model, batch, task = _batch(has_relation)
    config = LoopConfig(steps=1, learning_rate=1e-3, optimizer=optimizer)
    steps = make_optimizer(config, parameter_groups(model, 0.01), torch.device("cpu"))
    sum(_parts(task.loss(model, batch)[0]).values()).backward()  # what is found out once about a CPU
    model.zero_grad(set_to_none=True)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    torch.manual_seed(0)
    with no_reads():
        loss, _ = task.loss(model, moved(batch, torch.device("cpu")))
        sum(_parts(loss).values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if optimizer != "adamw":  # torch's own reads its number of steps on the CPU
            steps.step()
    if optimizer != "adamw":
        changed = [not one.equal(two.detach()) for one, two in zip(before, model.parameters())]
        assert sum(changed) > len(changed) // 2


@pytest.mark.parametrize("has_relation", [False, True])
def test_named_rows_have_the_loss_of_labels(has_relation) -> None:
    """To the last bit, gradients too."""
    model, batch, task = _batch(has_relation)
    found = []
    for labelled in (batch.labelled, None):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        relation = {"next_sentence_label": batch.relation} if has_relation else {}
        loss = model(
            batch.input_ids, None, batch.token_type_ids, labels=batch.labels, lengths=batch.lengths,
            labelled=labelled, **relation,
        ).loss  # fmt: skip
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    assert all(map(torch.equal, *found))


def test_rows_that_are_none() -> None:
    model, batch, _ = _batch(False)
    with pytest.raises(TypeError, match="labelled has dtype torch.float32; expected int64 or int32"):
        model(batch.input_ids, labels=batch.labels, labelled=batch.labelled.float())
    with pytest.raises(ValueError, match="With ignore_index=None every row has a label"):
        model(batch.input_ids, labels=batch.labels, lengths=batch.lengths, labelled=torch.tensor([0]))
