# SPDX-License-Identifier: Apache-2.0
"""Tiny models, and examples of every task for them."""

from __future__ import annotations

import json

import pytest
from support.tiny_models import classified, paired, questions, tagged, tiny_bert, tiny_elmo

from ctxfast.training.readers.conll import read_conll
from ctxfast.training.readers.squad import read_squad
from ctxfast.training.readers.tables import read_table


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def elmo(tmp_path_factory):
    return tiny_elmo(tmp_path_factory.mktemp("models") / "elmo")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Examples of every task."""
    folder = tmp_path_factory.mktemp("data")
    for name, text in (
        ("tag.tsv", tagged(12)),
        ("classify.tsv", classified(12)),
        ("pair.tsv", paired(12)),
        ("span.json", json.dumps(questions(12))),
    ):
        (folder / name).write_text(text)
    return {
        "tag": read_conll(folder / "tag.tsv"),
        "classify": read_table(folder / "classify.tsv"),
        "pair": read_table(folder / "pair.tsv", is_pair=True),
        "span": read_squad(folder / "span.json")[0],
    }
