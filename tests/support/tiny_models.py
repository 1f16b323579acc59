# SPDX-License-Identifier: Apache-2.0
"""Tiny models with random weights and data that they can learn, for tests of fine-tuning."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel

from ctxfast.models.bert.config import BertConfig
from ctxfast.models.bert.modeling import Bert
from ctxfast.models.elmo.config import ElmoConfig
from ctxfast.models.elmo.tokenization import PADDING_ID
from ctxfast.models.elmo.weights import random_weights, save_weights
from ctxfast.training.tasks.classify import class_names
from ctxfast.training.tasks.tag import tag_names

NAMES, PLACES = ("anna", "bob", "carla", "deniz"), ("paris", "rome", "new york", "oslo")
FILLERS = ("went", "to", "and", "saw", "the", "sea", "with", "from", "a", "boat")
_PIECES = (
    "##na",
    "##s",
    "##o",
    "an",
    "new",
    "york",
    "ca",
    "##rla",
    "good",
    "bad",
    "film",
    "?",
    ".",
    "is",
    "where",
    "who",
)


def tiny_bert(folder: Path, *, layers: int = 4, max_positions: int = 64) -> Path:
    """A BERT of hidden size 32 whose vocabulary has the words above; some of them in two pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [word for word in (*NAMES, *(p for p in PLACES if " " not in p), *FILLERS) if word not in ("anna", "carla")]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys((*words, *_PIECES))]
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n")
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=max_positions,
        initializer_range=0.1,
    )
    torch.manual_seed(7)
    Bert(config).save_pretrained(folder, overwrite=True)
    return folder


def tiny_elmo(folder: Path) -> Path:
    """An ELMo of two layers and 2 x 8 values a word."""
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "char_cnn": {
            "activation": "tanh",
            "embedding": {"dim": 8},
            "filters": [[1, 8], [2, 24]],
            "max_characters_per_token": 20,
            "n_characters": 262,
            "n_highway": 1,
        },
        "lstm": {
            "cell_clip": 3,
            "dim": 16,
            "n_layers": 2,
            "proj_clip": 3,
            "projection_dim": 8,
            "use_skip_connections": True,
        },
    }
    config = ElmoConfig.from_dict(options)
    # Larger weights than training begins with, and padding that is no character, so that words differ.
    weights = {name: 2 * value if value.dim() > 1 else value for name, value in random_weights(config).items()}
    weights["_token_embedder._char_embedding_weights"][PADDING_ID] = 0
    save_weights(weights, config, folder / "options.json", folder / "weights.hdf5")
    return folder


def tagged(count: int, seed: int = 0) -> str:
    """Sentences of names and places between fillers, in CoNLL's columns."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        for _ in range(draw.randint(2, 9)):
            kind = draw.randrange(4)
            if kind == 0:
                lines.append(f"{draw.choice(NAMES)}\tB-PER")
            elif kind == 1:
                first, *rest = draw.choice(PLACES).split()
                lines += [f"{first}\tB-LOC", *(f"{word}\tI-LOC" for word in rest)]
            else:
                lines.append(f"{draw.choice(FILLERS)}\tO")
        lines.append("")
    return "\n".join(lines) + "\n"


def classified(count: int, seed: int = 0) -> str:
    """A table whose label is whether the text holds "good" or "bad"."""
    draw = random.Random(seed)
    rows = ["text\tlabel"]
    for _ in range(count):
        label = draw.choice(("good", "bad"))
        words = [draw.choice(FILLERS) for _ in range(draw.randint(1, 6))]
        words.insert(draw.randint(0, len(words)), label)
        rows.append(f"{' '.join(words)}\t{'positive' if label == 'good' else 'negative'}")
    return "\n".join(rows) + "\n"


def paired(count: int, seed: int = 0) -> str:
    """A table whose label is whether both texts have the same first word."""
    draw = random.Random(seed)
    rows = ["sentence1\tsentence2\tlabel"]
    for _ in range(count):
        first, second = draw.choice(("good", "bad")), draw.choice(("good", "bad"))
        texts = [f"{word} {draw.choice(FILLERS)}" for word in (first, second)]
        rows.append("\t".join([*texts, "same" if first == second else "other"]))
    return "\n".join(rows) + "\n"


def questions(count: int, seed: int = 0) -> dict:
    """SQuAD's JSON: who or where, in a text with one name or place, or none."""
    draw = random.Random(seed)
    paragraphs = []
    for number in range(count):
        words = [draw.choice(FILLERS) for _ in range(draw.randint(3, 30))]
        is_who = draw.random() < 0.5
        answer = draw.choice(NAMES if is_who else PLACES)
        has_answer = draw.random() < 0.7
        place = draw.randint(0, len(words))
        if has_answer:
            words.insert(place, answer)
        start = len(" ".join(words[:place])) + (place > 0)
        entry = {
            "id": f"q{number}",
            "question": "who ?" if is_who else "where ?",
            "is_impossible": not has_answer,
            "answers": [{"text": answer, "answer_start": start}] if has_answer else [],
        }
        paragraphs.append({"context": " ".join(words), "qas": [entry]})
    return {"version": "v2.0", "data": [{"title": "tiny", "paragraphs": paragraphs}]}


def tiny_roberta(folder: Path) -> Path:
    """A RoBERTa with byte-level BPE and two separators between texts."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet()), "Ġa", "at"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\nĠ a\na t\n")
    config = BertConfig(
        model_type="roberta",
        vocab_size=len(vocab),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=66,
        type_vocab_size=1,
        pad_token_id=1,
    )
    torch.manual_seed(7)
    Bert(config).save_pretrained(folder, overwrite=True)
    return folder


def labels_of(task, examples):
    """The labels of examples of a task."""
    if task == "tag":
        return tag_names(examples)
    return () if task == "span" else class_names(examples)
