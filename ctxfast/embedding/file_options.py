# SPDX-License-Identifier: Apache-2.0
"""The options of embedding a file, once for Python and for the command line."""

from __future__ import annotations

from dataclasses import dataclass

from .batch_encoder import BatchEncoder
from .selection import Layers, Selection


@dataclass(frozen=True)
class FileOptions:
    """How a file is embedded.

    Attributes:
        layers, level, pooling, normalize, prompt, prompt_name, word_pieces: as for ``Embedder``; layers None is "top",
            and the top four for "extract-features".
        words: lines are words with white space between them (always so for ELMo).
        format: in place of the suffix; "extract-features" for the JSON lines of Google's extract_features.py, where
            "a ||| b" is a pair of texts.
        empty: what a blank line is: "keep" a text without tokens (zeros at sentence level with ELMo; with BERT the
            vector of the empty text), "skip" it (lines keep their numbers), or "error".
        truncate: cut texts that are too long for the model instead of raising.
        window: lines that are read and sorted by length together, and lost by a kill.
        forget_sentences: HDF5: leave ``sentence_to_index`` out.
        use_sentence_keys: HDF5: name datasets by their sentences.
        overwrite: replace an output, and drop unfinished work that does not fit these arguments.
    """

    layers: Layers | None = None
    level: str = "token"
    pooling: str | None = None
    normalize: bool | None = None
    prompt: str | None = None
    prompt_name: str | None = None
    words: bool = False
    word_pieces: str | None = None
    format: str | None = None
    empty: str = "keep"
    truncate: bool = False
    window: int = 4096
    forget_sentences: bool = False
    use_sentence_keys: bool = False
    overwrite: bool = False

    def check(self, format: str) -> None:
        """Raise ValueError for options that an output of this format cannot follow."""
        if (self.forget_sentences or self.use_sentence_keys) and (format != "hdf5" or self.level != "token"):
            option = "use_sentence_keys" if self.use_sentence_keys else "forget_sentences"
            raise ValueError(
                f"ctxfast.embed: {option} is set; expected HDF5 at token level for it, not {format}, {self.level}."
            )
        if format != "extract-features":
            return
        wrong = {"level": self.level != "token", "words": self.words, "layers": self.layers == "average"}
        for name, is_wrong in wrong.items():
            if is_wrong:
                raise ValueError(
                    f"ctxfast.embed: format is 'extract-features' with {name} set; it holds single layers of the "
                    f"tokens of plain text."
                )

    def selection(self, embedder: BatchEncoder, format: str) -> Selection:
        """What to take from a model for an output of this format."""
        layers, unit = self.layers, "words" if self.words else "text"
        if format == "extract-features":
            unit = "pairs"
            if layers is None:
                layers = list(range(-1, -1 - min(4, embedder.num_layers - 1), -1))
        return embedder.select(
            layers="top" if layers is None else layers,
            level=self.level,
            pooling=self.pooling,
            normalize=self.normalize,
            prompt=self.prompt,
            prompt_name=self.prompt_name,
            unit=unit,
            word_pieces=self.word_pieces,
        )

    def layout(self, format: str) -> dict[str, bool]:
        """Options of the writer of this format."""
        if format != "hdf5":
            return {}
        has_index = self.level == "token" and not self.forget_sentences and not self.use_sentence_keys
        return {"index": has_index, "keys": self.use_sentence_keys}

    def needs_tokens(self, format: str) -> bool:
        """Whether an output of this format holds the tokens' texts."""
        return format == "extract-features" or (self.level == "token" and format in ("jsonl", "parquet"))
