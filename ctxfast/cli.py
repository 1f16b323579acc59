# SPDX-License-Identifier: Apache-2.0
"""The command ``ctxfast``: parse, call, report errors.

Exit codes: 0 done, 2 wrong usage or input (one line on stderr says what), 1 anything else, 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from ._core import allocator
from .commands import COMMANDS, GROUPS

# Errors of a disk that has no room; with room the same command goes on.
_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Arguments that name files or folders, by what the help calls them or by their own names.
_OF_FILES = ("FILE", "DIR", "TEXT", "INPUT", "OUT", "SRC", "DST", "model", "options_file", "weight_file")


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        found, rest = super().parse_known_args(args, namespace)
        if rest and "asked" not in found:  # the innermost parser knows the command
            found.asked = self
        return found, rest

    def unknown(self, word: str) -> None:
        """Refuse an argument that there is not."""
        near = difflib.get_close_matches(word.partition("=")[0], self._option_string_actions, 1)
        self.error(f"unknown argument {word}{f', did you mean {near[0]}?' if near else ''}")

    def error(self, message: str) -> None:  # argparse prints the whole usage; one line is enough
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *of_argparse: Any) -> None:
        from . import __version__  # read when it is asked for: every start would pay for it

        print(f"ctxfast {__version__}")
        parser.exit()


class _Completion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, shell: Any, *of_argparse: Any) -> None:
        try:
            import shtab
        except ImportError:
            parser.error("--print-completion needs shtab, which is not installed; pip install 'ctxfast[completion]'")
        if shell not in shtab.SUPPORTED_SHELLS:
            known = ", ".join(shtab.SUPPORTED_SHELLS)
            parser.error(f"--print-completion is {shell!r}; expected one of {known}")
        _complete_files(parser, shtab.FILE)
        print(shtab.complete(parser, shell))
        parser.exit()


def _complete_files(parser: argparse.ArgumentParser, files: Any) -> None:
    """Mark the arguments of a parser, and of all below it, that name files or folders."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for own in action.choices.values():
                _complete_files(own, files)
        elif action.metavar in _OF_FILES or action.dest in _OF_FILES:
            action.complete = files  # type: ignore[attr-defined]


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ctxfast", description="Contextual word embeddings, fast.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    parser.add_argument(
        "--print-completion",
        action=_Completion,
        metavar="SHELL",
        help="print what completes commands and options in bash, zsh, fish, tcsh or powershell; needs shtab",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    groups: dict[str, Any] = {}
    for name, module in COMMANDS.items():
        group = name.rpartition(" ")[0]
        if group and group not in groups:
            parent = commands.add_parser(group, help=GROUPS[group])
            groups[group] = parent.add_subparsers(metavar="MODEL", required=True, parser_class=_Parser)
        module.add(groups.get(group, commands))
    return parser


def _is_ours(error: Exception) -> bool:
    """Whether an error is a sentence of this package for its user, not a fault of it."""
    return str(error).startswith(("ctxfast.", "CTXFAST_"))


def _joined_numbers(argv: Sequence[str]) -> list[str]:
    """``--layers -1,-2`` as ``--layers=-1,-2``: argparse takes the numbers for an option."""
    result: list[str] = []
    for word in argv:
        if result and result[-1] == "--layers" and re.match(r"-\d", word):
            result[-1] += "=" + word
        else:
            result.append(word)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    args, rest = parser.parse_known_args(_joined_numbers(sys.argv[1:] if argv is None else argv))
    if rest and "hands_on" not in args:
        args.asked.unknown(rest[0])
    args.rest = rest
    if argv is None and getattr(args, "keeps_memory", False):  # this process is the command's own
        allocator.keep_freed_memory()
    hint = " The same command goes on where this stopped." if getattr(args, "resumes", False) else ""
    try:
        if "hands_on" not in args:
            from . import functional as functional  # --impl and CTXFAST_IMPL are held against its ops
        return args.run(args)
    except KeyboardInterrupt:
        print(f"\nctxfast: interrupted.{hint}", file=sys.stderr)
        return 130
    except Exception as error:
        if _is_ours(error):
            print(str(error).replace("\n", " "), file=sys.stderr)
            return 2
        if isinstance(error, OSError) and error.errno:
            place = "" if error.filename is None else f"{error.filename}: "
            print(f"ctxfast: {place}{error.strerror}.{hint if error.errno in _OF_SPACE else ''}", file=sys.stderr)
            return 1
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    sys.exit(main())
