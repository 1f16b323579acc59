# SPDX-License-Identifier: Apache-2.0
"""``ctxfast embed``: text file to contextual vectors."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import fields
from functools import partial
from typing import Any

from .loop_options import DOWNLOAD, check_model
from .progress import LONGEST_SILENCE, duration, say

_say = partial(say, "embed")
_HELP = """\
Embed a text file, a sentence a line, into a file. Input of any length in constant memory.

The output appears under its name when it is whole. Until then work lies in OUT.partial; killed, the same command goes
on with it. Vectors need their disk space twice for a while.
"""

_FORMATS = """\
formats, by the suffix of OUT (N lines, T tokens in all, L layers; the axis of layers is absent for one layer):
  .hdf5 .h5      token level: AllenNLP's layout, a dataset (L, n, dim) a line, named by the line's number from 0, and
                 sentence_to_index; sentence level: embeddings (N, L, dim), lines (N,)
  .safetensors   embeddings (T, L, dim), offsets (N + 1,), lines (N,); sentence level: embeddings (N, L, dim), lines
  .npz           the same arrays
  .jsonl         {"index", "text", "tokens", "embedding" or "layers"} a line
  .parquet       index, text, tokens, shape, embedding (flat); needs pyarrow
lines holds line numbers from 0. Messages count lines from 1.
"""
# Arguments of ``Embedder``; those of ``embed_file`` are the fields of ``FileOptions``.
_MODEL_OPTIONS = (
    "device", "impl", "state", "dtype", "vector_dtype", "batch_tokens", "batch_size", "options_file", "weight_file",
    "split",
)  # fmt: skip


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "embed",
        help="text file to contextual vectors",
        description=_HELP,
        epilog=_FORMATS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("input", metavar="INPUT", help="text file (plain, .gz, .xz), or - for standard input")
    add("-m", "--model", help="BERT or ELMo folder, Google checkpoint, package with a model, or name on the hub")
    add("--download", action="store_true", help=DOWNLOAD)
    add("-o", "--output", required=True, metavar="OUT", help="file to make; its suffix names the format")
    add("--format", help="format by name: hdf5, safetensors, npz, jsonl, parquet, extract-features")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--layers", help="all, top (default), average, or numbers: 0 is the token layer, -1 the top")
    for name in ("all", "top", "average"):
        which.add_argument(f"--{name}", dest="layers", action="store_const", const=name, help=f"--layers {name}")
    add("--level", default="token", help="token (default) or sentence")
    add("--pooling", help="sentence level: mean, cls (the first token), max, ...; default: as the model's folder says")
    scale = "scale every vector to length 1; default: at sentence level as the model's folder says"
    add("--normalize", action=argparse.BooleanOptionalAction, default=None, help=scale)
    add("--prompt", help="sentence level: write this before every line; '' for none")
    add("--prompt-name", metavar="NAME", help="sentence level: a prompt of the model's folder, as query or document")
    add("--tokens", dest="words", action="store_true", help="lines are words with spaces between (always so for ELMo)")
    add("--word-pieces", help="BERT, with --tokens: first piece of a word (default), mean, or all")
    blank = parser.add_mutually_exclusive_group()
    blank.add_argument(
        "--empty", default="keep", help="blank lines: keep as texts without tokens (default), skip, or error"
    )
    blank.add_argument("--skip-empty", dest="empty", action="store_const", const="skip", help="--empty skip")
    long = parser.add_mutually_exclusive_group()
    long.add_argument("--truncate", action="store_true", help="cut lines that are too long for the model")
    split = "BERT: embed lines that are too long in windows that overlap by N tokens"
    long.add_argument("--split", type=int, metavar="N", help=split)
    add("--options-file", help="ELMo: options.json, where it lies apart")
    add("--weight-file", help="ELMo: HDF5 weights, where they lie apart")
    add("--state", help="ELMo: steady (default), zero, or carry (AllenNLP's, order matters)")
    add("--batch-size", type=int, metavar="N", help="ELMo, --state carry: lines of a batch (default: 64)")
    add("--batch-tokens", type=int, metavar="N", help="else tokens of a batch (default: 2048 on a CPU, 16384 on a GPU)")
    add("--window", type=int, default=4096, metavar="N", help="lines sorted by length together (default: 4096)")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    computes = "what the model computes in: float32, bfloat16, float16 (GPU) or int8 (CPU); default: float16 on a GPU"
    add("--dtype", help=f"{computes}, else float32")
    add("--vector-dtype", metavar="DTYPE", default="float32", help="of the vectors: float32 (default) or float16")
    add("--impl", help="implementation of every op that has it, e.g. reference")
    add("--forget-sentences", action="store_true", help="HDF5: no sentence_to_index")
    add("--use-sentence-keys", action="store_true", help="HDF5: name datasets by their sentences")
    add("--overwrite", action="store_true", help="replace OUT, and unfinished work of other arguments")
    add("--quiet", action="store_true", help="print nothing but errors")
    parser.set_defaults(run=_run, resumes=True)


def _run(args: argparse.Namespace) -> int:
    # Files are looked at before a model is opened: that takes seconds.
    from .._core.text_files import existing
    from ..embedding.file_options import FileOptions
    from ..embedding.job import check_target
    from ..embedding.selection import parse_layers

    check_target(args.input, args.output, args.format, overwrite=args.overwrite)
    if args.input != "-":
        existing(args.input, "ctxfast.embed", f"input {args.input}")
    if args.model is None and args.options_file is None and args.weight_file is None:
        raise ValueError("ctxfast.embed: -m (--model) is missing; expected a model's folder, or the name of a package.")
    check_model(args.model, "embed", download=args.download)
    args.layers = None if args.layers is None else parse_layers(args.layers)
    from ..embedding.embedder import Embedder

    embedder = Embedder(args.model, **{name: getattr(args, name) for name in _MODEL_OPTIONS})
    options = {option.name: getattr(args, option.name) for option in fields(FileOptions)}
    if not args.quiet and args.dtype is None and embedder.dtype not in (None, "float32"):
        _say(f"computes in {embedder.dtype} on {embedder.device} (--dtype float32 is slower, exact)")
    show = _silent if args.quiet else _Bar() if sys.stderr.isatty() else _Lines()
    try:
        report = embedder.embed_file(args.input, args.output, progress=show, **options)
    finally:
        if isinstance(show, _Bar):
            show.close()
    if not args.quiet:
        _print_report(report, time.monotonic() - show.start)
    return 0


def _silent(tokens: int, texts: int, share: float | None) -> None:
    return


class _Lines:
    """Progress where stderr is not a terminal: a line every half minute."""

    def __init__(self) -> None:
        self.start = self._said = time.monotonic()
        self._first: tuple[int, float] | None = None

    def rate(self, tokens: int, now: float) -> float:
        """Tokens a second of this run: what an earlier run did is not its merit."""
        if self._first is None:
            self._first = (tokens, now)
        before, since = self._first
        return (tokens - before) / max(now - since, 1e-9)

    def __call__(self, tokens: int, texts: int, share: float | None) -> None:
        now = time.monotonic()
        rate = self.rate(tokens, now)
        if now - self._said < LONGEST_SILENCE:
            return
        self._said = now
        ahead = ""
        if share and rate:
            left = tokens * (1 - share) / share / rate
            ahead = f", {100 * share:.1f} %, about {duration(left)} left"
        _say(f"{texts:,} lines, {tokens:,} tokens, {rate:,.0f} tokens/s{ahead}")


class _Bar(_Lines):
    """Progress on a terminal."""

    def __init__(self) -> None:
        super().__init__()
        from tqdm import tqdm

        self._bar = tqdm(total=100.0, unit="%", bar_format="{percentage:5.1f}%|{bar}| {elapsed}<{remaining}{postfix}")

    def __call__(self, tokens: int, texts: int, share: float | None) -> None:
        rate = self.rate(tokens, time.monotonic())
        if share is not None:
            if self._bar.n == 0:
                self._bar.initial = 100 * share  # the time left is judged by this run alone
            self._bar.n = 100 * share
        self._bar.set_postfix_str(f"{texts:,} lines, {rate:,.0f} tokens/s", refresh=False)
        self._bar.update(0)

    def close(self) -> None:
        self._bar.refresh()
        self._bar.close()


def _print_report(report: Any, seconds: float) -> None:
    done = report.done
    before = f" ({report.resumed:,} of them by an earlier run)" if report.resumed else ""
    _say(f"{report.output}: {done.texts:,} lines{before}, {done.tokens:,} tokens, {duration(seconds)}")
    for note in report.notes:
        _say(note)
