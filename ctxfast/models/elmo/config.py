# SPDX-License-Identifier: Apache-2.0
"""Sizes and switches of an ELMo language model: the options.json of AllenNLP and bilm-tf."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from ..._core.files import replacing
from ..._core.reading import read_json, reading

_WHO = "ctxfast.ElmoConfig"
_ACTIVATIONS = ("relu", "tanh")
_MOST_CHARACTERS = 1000  # no tensor of a model tells it, and the public models have 50
_PUBLIC_FILTERS = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))
_PRESETS = {  # cells, projection, highways
    "small": (1024, 128, 1),
    "medium": (2048, 256, 1),
    "original": (4096, 512, 2),
}


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class ElmoConfig:
    """Sizes and switches of an ELMo language model; the option's own name stands behind each.

    Attributes:
        projection_dim: P, size of a token vector and of a direction's output (lstm.projection_dim).
        cell_size: H, cells of a direction (lstm.dim).
        num_layers: LSTM layers (lstm.n_layers).
        filters: (width, count) of every convolution (char_cnn.filters).
        char_embedding_dim: D (char_cnn.embedding.dim).
        num_highways: highway layers after the convolutions (char_cnn.n_highway).
        activation: "relu" or "tanh", after the maximum (char_cnn.activation).
        max_characters: characters of a word, marks included (char_cnn.max_characters_per_token).
        num_characters: 262, or 261 in the options of a training run; the file has 261 rows either way
            (char_cnn.n_characters).
        cell_clip, proj_clip: bounds on cells and projected outputs; None, 0 or missing: none.
        use_skip_connections: whether a layer's input is added to its output, from the second layer on.
        has_lstm_projection: whether cells are projected; None: when ``cell_size != projection_dim``, as bilm-tf does.
        has_cnn_projection: whether the filters are projected; None: when their number is not ``projection_dim``.
        options: the whole dictionary this was read from; keys unknown here are kept when it is written again.

    Raises:
        ValueError: a size or switch that no model can have; the message names the option.
    """

    projection_dim: int
    cell_size: int
    num_layers: int
    filters: tuple[tuple[int, int], ...]
    char_embedding_dim: int
    num_highways: int = 0
    activation: str = "relu"
    max_characters: int = 50
    num_characters: int = 262
    cell_clip: float | None = None
    proj_clip: float | None = None
    use_skip_connections: bool = True
    has_lstm_projection: bool = cast("bool", None)
    has_cnn_projection: bool = cast("bool", None)
    options: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    source: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        def keep(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name, option, least in (
            ("projection_dim", "lstm.projection_dim", 1),
            ("cell_size", "lstm.dim", 1),
            ("num_layers", "lstm.n_layers", 1),
            ("char_embedding_dim", "char_cnn.embedding.dim", 1),
            ("num_highways", "char_cnn.n_highway", 0),
            ("max_characters", "char_cnn.max_characters_per_token", 3),
        ):
            value = getattr(self, name)
            if not _whole(value) or value < least:
                raise self._error(option, value, f"a whole number, {least} or more")
        if self.max_characters > _MOST_CHARACTERS:
            option, expected = "char_cnn.max_characters_per_token", f"at most {_MOST_CHARACTERS}"
            raise self._error(option, self.max_characters, f"{expected}: every word is filled up to this length")
        if self.num_characters not in (261, 262):
            raise self._error(
                "char_cnn.n_characters", self.num_characters, "262, or 261 in the options of a training run"
            )
        if self.activation not in _ACTIVATIONS:
            raise self._error("char_cnn.activation", self.activation, "'relu' or 'tanh'")
        if not isinstance(self.use_skip_connections, bool):
            raise self._error("lstm.use_skip_connections", self.use_skip_connections, "true or false")
        keep("filters", self._checked_filters())
        for name in ("cell_clip", "proj_clip"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0):
                raise self._error(f"lstm.{name}", value, "a number, or null or 0 for no clipping")
            keep(name, float(value) if value else None)
        self._check_projection("has_lstm_projection", self.cell_size, f"lstm.dim {self.cell_size}")
        self._check_projection("has_cnn_projection", self.num_filters, f"{self.num_filters} filters")

    def _error(self, option: str, got: Any, expected: str) -> ValueError:
        place = f" in {self.source}" if self.source else ""
        shown = repr(got)
        shown = shown if len(shown) <= 300 else shown[:300] + "..."
        return ValueError(f"{_WHO}: {option}{place} is {shown}; expected {expected}.")

    def _checked_filters(self) -> tuple[tuple[int, int], ...]:
        expected = "a list of [width, count] pairs of whole numbers above 0"
        try:
            pairs = tuple((width, count) for width, count in self.filters)
        except (TypeError, ValueError):
            raise self._error("char_cnn.filters", self.filters, expected) from None
        if not pairs or not all(_whole(size) and size > 0 for pair in pairs for size in pair):
            raise self._error("char_cnn.filters", self.filters, expected)
        widest = max(width for width, _ in pairs)
        if widest > self.max_characters:
            raise self._error(
                "char_cnn.filters", self.filters, f"widths up to {self.max_characters}, the characters of a word"
            )
        return pairs

    def _check_projection(self, name: str, size: int, what: str) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, size != self.projection_dim)
        elif not getattr(self, name) and size != self.projection_dim:
            raise self._error(name, False, f"True: {what} differ from lstm.projection_dim {self.projection_dim}")

    @property
    def num_filters(self) -> int:
        """Size of the convolutions' output, all widths together."""
        return sum(count for _, count in self.filters)

    @property
    def output_dim(self) -> int:
        """2P, size of every layer of the model's output."""
        return 2 * self.projection_dim

    @classmethod
    def preset(cls, name: str) -> ElmoConfig:
        """Sizes of a published model.

        Args:
            name: "small" (1024 cells, P 128), "medium" (2048, 256) or "original" (4096, 512; also those of the 5.5B
                model).
        """
        if name not in _PRESETS:
            raise ValueError(f"{_WHO}: preset is {name!r}; expected one of {', '.join(_PRESETS)}.")
        cells, projection, highways = _PRESETS[name]
        return cls(
            projection_dim=projection,
            cell_size=cells,
            num_layers=2,
            filters=_PUBLIC_FILTERS,
            char_embedding_dim=16,
            num_highways=highways,
            cell_clip=3.0,
            proj_clip=3.0,
        )

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> ElmoConfig:
        """Read options.json.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not JSON, an option missing, or one no model can have.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{_WHO}: there is no options file {path}.")
        options = read_json(path, _WHO)
        with reading(path, _WHO, "options of an ELMo model"):
            return cls.from_dict(options, source=str(path))

    @classmethod
    def from_dict(cls, options: Mapping[str, Any], *, source: str = "") -> ElmoConfig:
        """From the dictionary of an options.json; ``source`` is named in errors."""
        place = f" in {source}" if source else ""

        def section(parent: Any, name: str, path: str) -> Mapping[str, Any]:
            value = parent.get(name) if isinstance(parent, Mapping) else None
            if not isinstance(value, Mapping):
                hint = " Models without a character encoder are not supported." if path == "char_cnn" else ""
                raise ValueError(
                    f"{_WHO}: {path}{place} is {'missing' if value is None else repr(value)}; expected a dictionary of "
                    f"options.{hint}"
                )
            return value

        def needed(parent: Mapping[str, Any], name: str, path: str) -> Any:
            if name not in parent:
                raise ValueError(f"{_WHO}: {path}{place} is missing; every model needs it.")
            return parent[name]

        if isinstance(options, Mapping) and options.get("bidirectional", True) is not True:
            raise ValueError(
                f"{_WHO}: bidirectional{place} is {options['bidirectional']!r}; expected true: one direction alone is "
                "not supported."
            )
        lstm, cnn = section(options, "lstm", "lstm"), section(options, "char_cnn", "char_cnn")
        embedding = section(cnn, "embedding", "char_cnn.embedding")
        # What may be missing, and what it means then, is bilm-tf's rule.
        return cls(
            projection_dim=needed(lstm, "projection_dim", "lstm.projection_dim"),
            cell_size=needed(lstm, "dim", "lstm.dim"),
            num_layers=lstm.get("n_layers", 1),
            filters=needed(cnn, "filters", "char_cnn.filters"),
            char_embedding_dim=needed(embedding, "dim", "char_cnn.embedding.dim"),
            num_highways=cnn.get("n_highway") or 0,
            activation=needed(cnn, "activation", "char_cnn.activation"),
            max_characters=cnn.get("max_characters_per_token", 50),
            num_characters=cnn.get("n_characters", 262),
            cell_clip=lstm.get("cell_clip"),
            proj_clip=lstm.get("proj_clip"),
            use_skip_connections=lstm.get("use_skip_connections", False),
            options=copy.deepcopy(dict(options)),
            source=source,
        )

    def to_dict(self) -> dict[str, Any]:
        """The dictionary of an options.json: every option, and the unknown keys this was read with."""
        options = copy.deepcopy(dict(self.options))
        lstm, cnn = options.setdefault("lstm", {}), options.setdefault("char_cnn", {})
        lstm.update(
            cell_clip=self.cell_clip,
            proj_clip=self.proj_clip,
            projection_dim=self.projection_dim,
            dim=self.cell_size,
            n_layers=self.num_layers,
            use_skip_connections=self.use_skip_connections,
        )
        cnn.update(
            filters=[list(pair) for pair in self.filters],
            n_highway=self.num_highways,
            n_characters=self.num_characters,
            max_characters_per_token=self.max_characters,
            activation=self.activation,
        )
        cnn.setdefault("embedding", {})["dim"] = self.char_embedding_dim
        return options

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write options.json, under a temporary name first."""
        with replacing(Path(path)) as temporary, open(temporary, "w", encoding="utf-8") as file:
            json.dump(self.to_dict(), file, indent=2)
            file.write("\n")
