# SPDX-License-Identifier: Apache-2.0
"""Swapped models in other people's training: Trainer, LoRA, DDP, FSDP2, pipelines."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.hf_models import IDS, MASK, tiny_model

import ctxfast
from ctxfast.nn import encoder as nn_encoder

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
HERE = Path(__file__).parent


def _lora(model, **options):
    targets = ["q_lin", "v_lin", "lin1"] if type(model).__name__.startswith("DistilBert") else None
    targets = targets or ["query", "value", "intermediate.dense", "attention.output.dense"]
    torch.manual_seed(7)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return adapted


def _run(model):
    out = model(input_ids=IDS, attention_mask=MASK).last_hidden_state[MASK == 1]
    model.zero_grad()
    out.square().sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DistilBert"])
@pytest.mark.parametrize("first", ["swap_in", "lora"])
def test_lora(kind, first, monkeypatch) -> None:
    plain = _lora(tiny_model(kind))
    expected, grads = _run(plain)
    model = tiny_model(kind)
    if first == "swap_in":
        ctxfast.swap_in(model)
        model = _lora(model)
    else:
        model = _lora(model)
        assert ctxfast.swap_in(model).swapped
    calls, run = [], nn_encoder.by_ops
    monkeypatch.setattr(nn_encoder, "by_ops", lambda *args: calls.append(1) or run(*args))
    found, own = _run(model)
    assert len(calls) == 2, "layers with adapters run packed, too"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert own.keys() == grads.keys() and all("lora" in name for name in own)
    for name, value in grads.items():
        torch.testing.assert_close(own[name], value, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        for action in ("merge_adapter", "unmerge_adapter"):  # weights change in place: nothing stale may be used
            for each in (plain, model):
                getattr(each.base_model, action)()
            one, other = (each(input_ids=IDS, attention_mask=MASK).last_hidden_state for each in (plain, model))
            torch.testing.assert_close(other[MASK == 1], one[MASK == 1], rtol=1e-4, atol=1e-5)
        with plain.disable_adapter(), model.disable_adapter():
            one, other = (each(input_ids=IDS, attention_mask=MASK).last_hidden_state for each in (plain, model))
        torch.testing.assert_close(other[MASK == 1], one[MASK == 1], rtol=1e-4, atol=1e-5)
        one, other = (each.merge_and_unload()(IDS, attention_mask=MASK).last_hidden_state for each in (plain, model))
    torch.testing.assert_close(other[MASK == 1], one[MASK == 1], rtol=1e-4, atol=1e-5)


def _examples(count: int = 24) -> list[dict]:
    draw = torch.Generator().manual_seed(5)
    rows = []
    for _ in range(count):
        size = int(torch.randint(3, 12, (1,), generator=draw))
        ids = torch.randint(3, 40, (size,), generator=draw).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * size, "labels": ids[0] % 2})
    return rows


def _collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in rows])

    batch = {"input_ids": padded("input_ids", 1), "attention_mask": padded("attention_mask", 0)}
    return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}


@pytest.mark.parametrize(
    "options",
    [{}, *(pytest.param({name: True}, marks=pytest.mark.slow) for name in ("gradient_checkpointing", "bf16"))],
    ids=str,
)
def test_trainer(options, tmp_path) -> None:
    curves, evaluations = [], []
    for is_swapped in (False, True):
        model = tiny_model("Bert", "ForSequenceClassification")
        if is_swapped:
            assert ctxfast.swap_in(model).swapped
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / str(is_swapped)),
            max_steps=30,
            per_device_train_batch_size=6,
            learning_rate=3e-3,
            logging_steps=1,
            save_steps=30,
            report_to=[],
            use_cpu=True,
            seed=3,
            disable_tqdm=True,
            **options,
        )
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=_examples(),
            eval_dataset=_examples(9),
            data_collator=_collate,
        )
        trainer.train()
        curves.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        evaluations.append(trainer.evaluate()["eval_loss"])
    bound = 0.05 if options.get("bf16") else 2e-3
    assert len(curves[0]) == 30 and curves[1] == pytest.approx(curves[0], rel=bound, abs=bound)
    assert evaluations[1] == pytest.approx(evaluations[0], rel=bound, abs=bound)
    saved = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "True" / "checkpoint-30")
    ctxfast.restore(model)
    with torch.no_grad():
        one, other = (each.eval()(IDS, attention_mask=MASK).logits for each in (saved, model))
    torch.testing.assert_close(one.float(), other.float(), rtol=bound, atol=bound)


def test_pipelines(minilm_dir) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_dir)
    model = transformers.AutoModel.from_pretrained(minilm_dir).eval()
    texts = ["The bank of the river.", "One."]
    results = []
    for is_swapped in (False, True):
        if is_swapped:
            ctxfast.swap_in(model)
        pipe = transformers.pipeline("feature-extraction", model=model, tokenizer=tokenizer, device="cpu")
        results.append([torch.tensor(one) for one in pipe(texts)])
    for one, other in zip(*results):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_a_second_swap_after_weights_were_loaded() -> None:
    model, other = tiny_model("Bert"), tiny_model("Bert", initializer_range=0.3)
    with torch.no_grad():
        ctxfast.swap_in(model)
        model(IDS, attention_mask=MASK)
        expected = other(IDS, attention_mask=MASK).last_hidden_state
        model.load_state_dict(copy.deepcopy(other.state_dict()))
        found = model(IDS, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(found[MASK == 1], expected[MASK == 1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_ddp_and_fsdp2_in_two_processes() -> None:
    """Gradients of two processes with half the batch each against one with all of it."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + [str(HERE / "two_swapped.py")],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("as one process") == 6, done.stdout
