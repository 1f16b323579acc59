# SPDX-License-Identifier: Apache-2.0
"""WordPiece vocabularies from text, by the ``tokenizers`` library."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..._core.digests import fingerprint
from ..._core.files import replacing_folder
from ...models.bert.tokenization import BertTokenizer
from .prepared import read_note
from .text import text_lines

if TYPE_CHECKING:
    from tokenizers import BertWordPieceTokenizer

_LOG = logging.getLogger(__name__)
_LONGEST_WORD = 100  # of the library's WordPiece; a longer one is [UNK]
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def train_wordpiece(
    directory: str | os.PathLike[str],
    files: Sequence[str | os.PathLike[str]],
    size: int,
    *,
    is_cased: bool = False,
    min_frequency: int = 2,
    say: Callable[[str], None] | None = None,
) -> BertTokenizer:
    """Make a vocabulary, unless ``directory`` holds the one that the same arguments made before.

    Args:
        directory: vocab.txt, tokenizer.json, tokenizer_config.json; appears when it is whole.
        files: text (plain, .gz, .xz).
        size: tokens at most, special ones included.
        is_cased: keep case and accents.
        min_frequency: pairs seen less often are not joined.
        say: called with a line about what is done; None: the logger of this module, as information.

    Raises:
        ValueError: a size that leaves no room for letters.
    """
    if size < 2 * len(SPECIAL_TOKENS):
        raise ValueError(f"ctxfast.training: vocabulary size is {size}; expected {2 * len(SPECIAL_TOKENS)} or more.")
    path = Path(directory)
    made_by = {
        "files": [[os.fspath(file), fingerprint(file)] for file in files if Path(file).is_file()],
        "size": size,
        "is_cased": is_cased,
        "min_frequency": min_frequency,
    }
    made_by = json.loads(json.dumps(made_by))
    if read_note(path, "made_by.json") != made_by:
        from tokenizers import BertWordPieceTokenizer

        (say or _LOG.info)(f"making a vocabulary of {size:,} word pieces")
        trainer = BertWordPieceTokenizer(lowercase=not is_cased, strip_accents=not is_cased)
        # One that trains is locked: what it is to read is looked at by another.
        reader = BertWordPieceTokenizer(lowercase=not is_cased, strip_accents=not is_cased)
        # The library numbers letters in the order of a hash table, and breaks ties by number; given as special tokens
        # they have theirs from the start, and the same text always makes the same vocabulary.
        letters = _letters(reader, files, size // 2)
        trainer.train_from_iterator(
            _trained_lines(reader, files),
            size,
            min_frequency,
            special_tokens=[*SPECIAL_TOKENS, *letters],
            show_progress=False,
        )
        made = BertWordPieceTokenizer(trainer.get_vocab(), lowercase=not is_cased, strip_accents=not is_cased)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_folder(path) as folder:
            BertTokenizer(made._tokenizer).save(folder)
            tokens = sorted(made.get_vocab().items(), key=lambda item: item[1])
            (folder / "vocab.txt").write_text("".join(f"{token}\n" for token, _ in tokens), encoding="utf-8")
            settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            settings |= {"do_lower_case": not is_cased, "tokenizer_class": "BertTokenizer"}
            (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            (folder / "made_by.json").write_text(json.dumps(made_by) + "\n", encoding="utf-8")
    return BertTokenizer.from_pretrained(path)


def _trained_lines(reader: BertWordPieceTokenizer, files: Sequence[str | os.PathLike[str]]) -> Iterator[str]:
    """Lines without the words that WordPiece gives up on; joining the letters of one takes the square of its length."""
    normalize, split = reader.normalizer.normalize_str, reader.pre_tokenizer.pre_tokenize_str
    for file in files:
        for line in text_lines(file):
            # Chinese has no spaces, and words of a letter all the same: lines that may have a long word are looked at.
            if len(line) > _LONGEST_WORD and max(map(len, line.split()), default=0) > _LONGEST_WORD:
                line = " ".join(word for word, _ in split(normalize(line)) if len(word) <= _LONGEST_WORD)
            yield line


def _letters(reader: BertWordPieceTokenizer, files: Sequence[str | os.PathLike[str]], most: int) -> list[str]:
    """Letters that begin a word and, marked by ##, that go on with one: the most frequent ones, in order."""
    normalize, split = reader.normalizer.normalize_str, reader.pre_tokenizer.pre_tokenize_str
    words: Counter[str] = Counter()
    for file in files:
        for line in text_lines(file):
            words.update(word for word, _ in split(normalize(line)))
    counts: Counter[str] = Counter()
    for word, count in words.items():
        counts[word[0]] += count
        for letter in word[1:]:
            counts["##" + letter] += count
    kept = sorted(counts, key=lambda letter: (-counts[letter], letter))[:most]
    return sorted(kept, key=lambda letter: (letter.startswith("##"), letter))
