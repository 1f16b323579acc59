# SPDX-License-Identifier: Apache-2.0
"""Predictors: made from a pretrained model, or opened as they were stored."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ..._core.reading import read_json, reading
from ...embedding.embedder import Embedder
from ...embedding.encoders import ElmoEncoder
from ...models.bert.config import BertConfig
from ...models.bert.tokenization import BertTokenizer
from ...models.lstm_heads import OverElmo
from ...models.token_vectors import Sources
from .builder import Choice, TaskBuilder
from .classify import ClassifierBuilder
from .coref import CoreferenceBuilder
from .features import FEATURES, FrozenLayers, WordInputs
from .predictor import FORMAT, SETTINGS_FILE, Predictor
from .span import SpanFinderBuilder
from .tag import TaggerBuilder
from .word_table import WordTable

_WHO = "ctxfast.finetune"
BUILDERS: dict[str, TaskBuilder] = {
    "classify": ClassifierBuilder(is_pair=False),
    "pair": ClassifierBuilder(is_pair=True),
    "tag": TaggerBuilder(),
    "span": SpanFinderBuilder(),
    "coref": CoreferenceBuilder(),
}
TASKS = tuple(BUILDERS)
_FORMS = ("bert", "features", "elmo", "words")
# What settings are, in a stored model: the types, and what to call them.
_WHOLE, _NUMBER, _TRUTH = (int, "a whole number"), ((int, float), "a number"), (bool, "true or false")
_TEXT, _WHOLE_OR_NONE = (str, "a name"), ((int, type(None)), "a whole number, or null")
_OPTIONS = {
    "features": ((str, type(None)), "a name, or null"),
    "max_length": _WHOLE_OR_NONE,
    "predicate": _TEXT,
    "is_spans": _TRUTH,
    "doc_stride": _WHOLE,
    "max_query": _WHOLE,
    "max_answer": _WHOLE,
    "n_best": _WHOLE,
    "null_threshold": ((int, float, type(None)), "a number, or null"),
}
_HEAD_OPTIONS = {
    "words": _TEXT,
    "word_dim": _WHOLE,
    "trains_vectors": _TRUTH,
    "mix_norm": _TRUTH,
    "mix_l2": _NUMBER,
    "output_mix": _TRUTH,
    "head": _TEXT,
    "max_span": _WHOLE,
    "spans_per_word": _NUMBER,
    "antecedents": _WHOLE,
    "hidden_size": _WHOLE,
    "lstm_layers": _WHOLE,
    "dropout": _NUMBER,
    "crf": _TRUTH,
    "marks_predicate": _TRUTH,
}
_RECURRENT = re.compile(r"^reader\.lstm\.weight_hh_l\d+$")


def build(
    task: str,
    model: str | os.PathLike[str] | None,
    labels: Sequence[str] = (),
    choice: Choice | None = None,
    *,
    table: WordTable | None = None,
    device: str | torch.device = "cpu",
) -> Predictor:
    """A predictor around a pretrained model, or around words by themselves, with a new head from torch's generator.

    Args:
        task: "classify", "pair", "tag", "span" or "coref".
        model: BERT or ELMo, as ``Embedder`` takes it; None for a head over ``choice.words`` alone.
        labels: names of classes or tags; () for "span" and "coref", and for numbers in "classify" and "pair".
        choice: how.
        table: the words of the head's table, where ``choice.words`` has "learned": ``word_table`` makes it of examples.
        device: of the model.

    Raises:
        FileNotFoundError, ValueError: as ``Embedder``; a choice that the model or the task does not have; one label.
    """
    choice = choice or Choice()
    if task not in TASKS:
        raise ValueError(f"ctxfast.finetune: task is {task!r}; expected one of {', '.join(TASKS)}.")
    if ("learned" in choice.kinds_of_words) != (table is not None):
        found = "missing, but words has 'learned'" if table is None else "given, but words lacks 'learned'"
        raise ValueError(f"ctxfast.finetune: table is {found} (words is {choice.words!r}); expected both or neither.")
    if model is not None and (Path(model) / "head.safetensors").is_file():
        raise ValueError(
            f"ctxfast.finetune: model {model} is a finished one with an LSTM over its encoder; expected a pretrained "
            f"one. Its encoder is {Path(model) / 'encoder'}."
        )
    if len(labels) == 1:
        raise ValueError(f"ctxfast.finetune: labels is {labels[0]!r} alone; expected two or more to tell apart.")
    if model is None:
        if choice.features is not None or not choice.words:
            given = f"features is {choice.features!r}" if choice.features is not None else "words is ''"
            raise ValueError(
                f"ctxfast.finetune: model is None and {given}; expected a model, or words alone ('chars', 'learned', "
                f"'chars,learned')."
            )
        return _over_words(task, None, labels, choice, table, torch.device(device))
    if choice.features is not None:
        return _over_words(task, Embedder(model, device=device), labels, choice, table)
    if _is_elmo(model):
        embedder = Embedder(model, device=device, state="zero", dtype="float32")
        return _over_words(task, embedder, labels, choice, table)
    if choice.head != "lstm":
        raise ValueError(
            f"ctxfast.finetune: head is {choice.head!r} with all of BERT trained; expected features, or ELMo."
        )
    if choice.words:
        raise ValueError("ctxfast.finetune: words are chosen with all of BERT trained; expected features, or ELMo.")
    if choice.crf:
        raise ValueError("ctxfast.finetune: crf is asked for with all of BERT trained; expected features, or ELMo.")
    with warnings.catch_warnings():  # that the head is new is the point of it
        warnings.filterwarnings("ignore", message=r".*They start at random.*")
        return _bert(task, model, labels, choice, device)


def _is_elmo(model: str | os.PathLike[str]) -> bool:
    folder = Path(model).expanduser()
    return folder.is_dir() and not (folder / "config.json").is_file() and any(folder.glob("*options*.json"))


def _bert(task: str, model: Any, labels: Sequence[str], choice: Choice, device: Any) -> Predictor:
    with warnings.catch_warnings():  # refused below, before a text meets a row that is not there
        warnings.filterwarnings("ignore", message=".*tokens beyond it cannot be embedded")
        tokenizer = BertTokenizer.from_pretrained(model)
    builder = BUILDERS[task]
    network = builder.network(model, labels, dtype=torch.float32, device=device)
    _check_vocabulary(model, tokenizer, network)
    options = {} if choice.max_length is None else choice.fields("max_length")
    return builder.over_bert(network, tokenizer, labels, choice, **options)


def _check_vocabulary(model: Any, tokenizer: BertTokenizer, network: Any) -> None:
    """Refuse a vocabulary of another model, before the first text with a token of its own ends a long run."""
    rows = network.config.vocab_size
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"ctxfast.finetune: the vocabulary of {model} has {tokenizer.vocab_size} tokens and the model's word table "
            f"{rows} rows; expected no more tokens than rows. Use the vocabulary that the model was trained with."
        )


def _over_words(
    task: str,
    embedder: Embedder | None,
    labels: Sequence[str],
    choice: Choice,
    table: WordTable | None,
    device: torch.device | None = None,
) -> Predictor:
    """A head over a frozen encoder, an ELMo trained with it, or words alone."""
    builder = BUILDERS[task]
    if choice.max_length is not None:
        raise ValueError(
            "ctxfast.finetune: max_length is given with features, ELMo or words alone, which read every word. Leave it "
            "out."
        )
    if choice.crf and not builder.has_crf:
        known = " or ".join(repr(name) for name, other in BUILDERS.items() if other.has_crf)
        raise ValueError(f"ctxfast.finetune: crf is asked for with task {task!r}; expected {known} for it.")
    if choice.head not in builder.heads:
        known = ", ".join(builder.heads)
        raise ValueError(f"ctxfast.finetune: head is {choice.head!r}; expected one of {known} for task {task!r}.")
    if choice.crf and choice.head != "lstm":
        raise ValueError(f"ctxfast.finetune: crf is asked for with head {choice.head!r}; expected 'lstm' for it.")
    if choice.output_mix and embedder is None:
        raise ValueError("ctxfast.finetune: output_mix is asked for without a model; expected layers to mix.")
    own: dict[str, Any] = {"has_characters": "chars" in choice.kinds_of_words, "table": table}
    bilm = None
    layers: dict[str, Any] = {}
    if embedder is not None and choice.features is not None:
        frozen = FrozenLayers(embedder, choice.features)
        own["frozen"] = frozen
        layers = {"num_layers": frozen.num_layers, "dim": frozen.dim}
    elif embedder is not None:
        assert isinstance(embedder.encoder, ElmoEncoder)
        bilm = embedder.encoder.model.requires_grad_(True)
        own["max_characters"] = bilm.config.max_characters
        layers = {"num_layers": bilm.num_layers, "dim": bilm.get_output_dim()}
    sources = Sources(
        **layers,
        has_characters=own["has_characters"],
        table_rows=0 if table is None else table.rows,
        table_dim=0 if table is None else table.dim,
        trains_table=choice.trains_vectors,
        mix_norm=choice.mix_norm,
        mix_l2=choice.mix_l2,
        output_mix=choice.output_mix,
    )
    sizes = choice.fields("hidden_size", "lstm_layers", "dropout") | builder.head_options(choice)
    head = builder.head(builder.heads[choice.head], sources, labels, **sizes)
    if table is not None:
        table.fill(head.get_parameter("reader.table.weight"))
    head = head.to(device if embedder is None else embedder.device)
    made = choice.fields("head", "words", "word_dim", "trains_vectors", "mix_norm", "mix_l2", "output_mix")
    made |= {"word_dim": table.dim} if table is not None else {}
    return builder.over_features(
        head if bilm is None else OverElmo(bilm, head), WordInputs(**own), labels, choice, sizes | made
    )


def word_table(
    task: str, examples: Sequence[Any], choice: Choice, vectors: str | os.PathLike[str] | None = None
) -> WordTable | None:
    """The table that ``choice.words`` asks for, of training data's words; None if it does not ask for one.

    Args:
        task: as ``build``.
        examples: the training data.
        choice: ``words`` and ``word_dim`` count.
        vectors: a file of vectors to begin with, see ``WordTable.of``.

    Raises:
        FileNotFoundError, ValueError: as ``WordTable.of``; vectors without a table.
    """
    if "learned" in choice.kinds_of_words:
        return WordTable.of(BUILDERS[task].words(examples), vectors=vectors, dim=choice.word_dim)
    if vectors is not None:
        raise ValueError(
            f"ctxfast.finetune: vectors are given, but words is {choice.words!r}; expected 'learned' or "
            f"'chars,learned' with them."
        )
    return None


def load(
    directory: str | os.PathLike[str],
    *,
    task: str | None = None,
    device: str | torch.device = "cpu",
    changes: Mapping[str, Any] | None = None,
) -> Predictor:
    """Open what ``Predictor.save`` wrote, or a BERT that Hugging Face's library fine-tuned; the model is in eval mode.

    Args:
        directory: the model's.
        task: what it is to be for; None for what it is. (Hugging Face has one class for texts and for pairs.)
        device: of the model.
        changes: fields of ``Choice`` that reading and deciding depend on, to replace those stored.

    Raises:
        FileNotFoundError: no such model.
        ValueError: of another task, written by another version, or damaged.
    """
    directory = Path(directory)
    file = directory / SETTINGS_FILE
    torch.empty(0, device=device)  # a device that is not there is no damage to the files
    if not file.is_file():
        with reading(directory, _WHO, "fine-tuned model"):
            return _load_foreign(directory, task, device, dict(changes or {}))
    with reading(file, _WHO, "settings of a fine-tuned model"):
        settings = _read_settings(file)
        _check_task(directory, settings["task"], task)
        form, labels = settings["form"], settings["labels"]
        options = {**settings["options"], **(changes or {})}
        head = dict(options.pop("head", {}))
        marks = head.pop("marks_predicate", False)
        if form == "bert":
            predictor = _whole_bert(settings["task"], directory, labels, Choice(**options), device)
        else:
            weights = directory / "head.safetensors"
            if not weights.is_file():
                raise FileNotFoundError(f"{_WHO}: {weights} does not exist; expected the head that {file} describes.")
            choice = Choice(**options, predicate="type" if marks else "none", **head)
            _check_head_size(weights, choice)
            encoder = None if form == "words" else directory / "encoder"
            has_table = "learned" in choice.kinds_of_words
            table = WordTable.load(directory, choice.word_dim, _WHO) if has_table else None
            predictor = build(settings["task"], encoder, labels, choice, table=table, device=device)
            model = predictor.model
            _load_head(model.head if isinstance(model, OverElmo) else model, weights)
    predictor.model.eval()
    return predictor


def _read_settings(file: Path) -> dict[str, Any]:
    """The settings in ``file``, once every one of them is of its kind."""
    settings = read_json(file, _WHO, "settings of a fine-tuned model")
    found = settings.get("format")
    if found != FORMAT:
        raise ValueError(f"{_WHO}: {file} has format {found}; expected {FORMAT}.")
    missing = {"task", "form", "labels", "options"} - set(settings)
    if missing:
        raise ValueError(f"{_WHO}: {file} has no {', '.join(sorted(missing))}; expected what training wrote.")
    form, labels, options = settings["form"], settings["labels"], settings["options"]
    _check_setting(file, "task", settings["task"] in TASKS, settings["task"], f"one of {', '.join(TASKS)}")
    _check_setting(file, "form", form in _FORMS, form, f"one of {', '.join(_FORMS)}")
    are_names = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    _check_setting(file, "labels", are_names and len(set(labels)) == len(labels), labels, "a list of different names")
    _check_setting(file, "options", isinstance(options, dict), options, "an object")
    has_features = form != "features" or options.get("features") in FEATURES
    _check_setting(file, "features", has_features, options.get("features"), f"one of {', '.join(FEATURES)}")
    head = options.get("head")
    _check_setting(file, "head", isinstance(head, dict) if form != "bert" else head is None, head, "the head's sizes")
    for group, kinds in ((options, _OPTIONS), (head or {}, _HEAD_OPTIONS)):
        for name, value in group.items():
            if name == "head" and group is options:
                continue
            kind, expected = kinds.get(name, ((), "no such option"))
            is_right = isinstance(value, kind) and (isinstance(value, bool) == (kind is bool))
            _check_setting(file, name, is_right, value, expected)
    return settings


def _check_setting(file: Path, name: str, is_right: bool, value: Any, expected: str) -> None:
    if not is_right:
        shown = repr(value)
        shown = shown if len(shown) <= 100 else shown[:100] + "..."
        raise ValueError(f"{_WHO}: {name} in {file} is {shown}; expected {expected}.")


def _check_head_size(file: Path, choice: Choice) -> None:
    """Hold the sizes that the settings give against the head's file, before a head of these sizes is made."""
    with reading(file, _WHO, "file of a head"), safe_open(file, framework="pt") as stored:
        all_names = list(stored.keys())
        names = [name for name in all_names if _RECURRENT.match(name)]
        shapes = {tuple(stored.get_slice(name).get_shape()) for name in names}
        largest = max(max(stored.get_slice(name).get_shape(), default=0) for name in all_names)
    size, layers = choice.hidden_size, choice.lstm_layers
    if not names:  # of a head with LSTMs of other names; its tensors are held against the file one by one
        if size > largest or layers > len(all_names):
            raise ValueError(
                f"{_WHO}: {file} has {len(all_names)} tensors of at most {largest} rows; expected {layers} layers of "
                f"size {size}, as lstm_layers and hidden_size in {SETTINGS_FILE} say."
            )
        return
    if len(names) != layers or shapes != {(4 * size, size)}:
        raise ValueError(
            f"{_WHO}: {file} has {len(names)} LSTM layers with recurrent weights of {sorted(shapes)}; expected "
            f"{layers} of {(4 * size, size)}, as lstm_layers {layers} and hidden_size {size} in {SETTINGS_FILE} say."
        )


def _load_head(model: torch.nn.Module, file: Path) -> None:
    """Fill ``model`` from ``file``, which must hold its tensors, all of them and no others."""
    with reading(file, _WHO, "file of a head"):
        tensors, own = load_file(file), model.state_dict()
        for name in sorted(own.keys() | tensors.keys()):
            if name not in tensors or name not in own:
                what = "also holds" if name in tensors else "has no"
                raise ValueError(f"{_WHO}: {file} {what} {name}; expected the head that {SETTINGS_FILE} describes.")
            value, wanted = tensors[name], own[name]
            if value.shape != wanted.shape or value.is_floating_point() != wanted.is_floating_point():
                raise ValueError(
                    f"{_WHO}: {name} in {file} is {value.dtype} of shape {tuple(value.shape)}; expected {wanted.dtype} "
                    f"of {tuple(wanted.shape)}, as {SETTINGS_FILE} says."
                )
            if not torch.isfinite(value).all():
                warnings.warn(f"{_WHO}: {name} in {file} holds NaN or infinity.", stacklevel=3)
        model.load_state_dict(tensors)


def _whole_bert(task: str, directory: Path, labels: Sequence[str], choice: Choice, device: Any) -> Predictor:
    """``_bert`` for a model that was trained: its head is in the files, for the very labels."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r".*They start at random.*")
        try:
            return _bert(task, directory, labels, choice, device)
        except UserWarning as warning:
            raise ValueError(
                f"{_WHO}: {directory} has no trained head for {task!r} and labels {', '.join(labels) or '(none)'}: "
                f"{warning}"
            ) from warning


def _check_task(directory: Path, found: str, task: str | None) -> None:
    if task is not None and found != task:
        raise ValueError(f"ctxfast.finetune: model {directory} is one for {found!r}; expected one for {task!r}.")


def _load_foreign(directory: Path, task: str | None, device: Any, changes: dict[str, Any]) -> Predictor:
    """A BERT with a head that was not trained here: its config.json says of what kind."""
    file = directory / "config.json"
    config = BertConfig.from_json_file(file) if file.is_file() else None
    kinds = config.extra.get("architectures") or [""] if config is not None else [""]
    found = next((name for name, own in BUILDERS.items() if str(kinds[0]).endswith(own.architecture)), None)
    if config is None or found is None:
        inner = [name for name in ("best", "final") if (directory / name / SETTINGS_FILE).is_file()]
        hint = f" Did you mean {directory / inner[0]}?" if inner else ""
        raise FileNotFoundError(
            f"ctxfast.finetune: {directory} has no {SETTINGS_FILE}, nor a config.json of a model with a head that is "
            f"known here; expected a fine-tuned model.{hint}"
        )
    if task in BUILDERS and BUILDERS[task].architecture == BUILDERS[found].architecture:
        found = task  # one class serves both
    _check_task(directory, found, task)
    builder, labels = BUILDERS[found], ()
    if builder.has_classes(config.num_labels):
        names = config.id2label or {k: f"LABEL_{k}" for k in range(config.num_labels)}
        labels = tuple(names[k] for k in range(config.num_labels))
    if labels and config.extra.get("problem_type") == "multi_label_classification":
        raise ValueError(
            f"ctxfast.finetune: {directory} gives a text several labels; expected a model of one label each."
        )
    choice = Choice(**{**builder.foreign_changes(labels), **changes})
    predictor = _whole_bert(found, directory, labels, choice, device)
    predictor.model.eval()
    return predictor
