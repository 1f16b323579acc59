# SPDX-License-Identifier: Apache-2.0
"""Arguments that every training command has, and how it trains."""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .progress import Reading, Training, duration, say

# Arguments of the loop that hold without training, too.
_UNTRAINED = ("output", "device", "impl", "quiet", "overwrite")
# What tokenizers are made of, in a model's folder.
_OF_TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "config.json", "tokenizer_config.json")
_OF_TOKENIZERS += ("special_tokens_map.json", "added_tokens.json")
# Files that a model may be named by.
_OF_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index")


def add(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add the loop's arguments; ``defaults`` replaces some of their defaults, by the names of ``LoopConfig``."""
    parser.set_defaults(keeps_memory=True)
    own = {
        "learning_rate": 1e-4,
        "batch_size": 32,
        "warmup": 0.1,
        "schedule": "linear",
        "optimizer": "adamw",
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "log_every": 50,
        "eval_every": None,
        "save_every": 1000,
    } | defaults
    parser.set_defaults(resumes=True)
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("-o", "--output", required=True, metavar="DIR", help="directory of the run: checkpoints, log, best/, final/")
    add("--epochs", type=float, help="passes over the data")
    add("--steps", type=int, help="optimiser steps in all, in place of --epochs")
    add(
        "--batch-size", type=int, metavar="N", default=own["batch_size"], help="examples of a micro-batch (%(default)s)"
    )
    add("--accumulate", type=int, metavar="N", default=1, help="batches of a step (%(default)s)")
    rate = own["learning_rate"]
    usual = "as said above" if rate is None else rate
    add("--lr", type=float, dest="learning_rate", default=rate, help=f"learning rate ({usual})")
    add("--warmup", type=float, default=own["warmup"], help="steps of warm-up; below 1 a share of all (%(default)s)")
    add("--schedule", default=own["schedule"], help="linear, cosine or constant (%(default)s)")
    add("--optimizer", default=own["optimizer"], help="adamw, bert_adam, lamb or adagrad (%(default)s)")
    add("--weight-decay", type=float, default=own["weight_decay"], help="(%(default)s)")
    add(
        "--max-grad-norm", type=float, default=own["max_grad_norm"], help="clip gradients to it; 0: never (%(default)s)"
    )
    add(
        "--amp", default="auto",
        help="no, bf16 or fp16: compute in half precision (%(default)s: bf16 on a GPU that has it, else no)",
    )  # fmt: skip
    add("--seed", type=int, default=0, help="of data order, dropout and new weights (%(default)s)")
    add("--log-every", type=int, metavar="N", default=own["log_every"], help="steps between reports (%(default)s)")
    add("--eval-every", type=int, metavar="N", default=own["eval_every"], help="steps between evaluations")
    add(
        "--save-every", type=int, metavar="N", default=own["save_every"], help="steps between checkpoints (%(default)s)"
    )
    add("--keep", type=int, metavar="N", default=2, help="checkpoints kept (%(default)s)")
    add("--parallel", default="auto", help="auto (DDP under torchrun), no, ddp or fsdp2")
    add("--device", default="auto", help="auto (default), cpu or cuda")
    add("--impl", help="implementation of every op that has it, e.g. reference")
    add("--tensorboard", action="store_true", help="write DIR/tensorboard too")
    add("--overwrite", action="store_true", help="start anew where DIR holds a run; else the run goes on")
    add("--quiet", action="store_true", help="print nothing but errors")
    parser.set_defaults(of_training={action.dest: action for action in group._group_actions})


def check_untrained(args: argparse.Namespace, who: str) -> None:
    """Refuse arguments of the loop where nothing is trained.

    Raises:
        ValueError: naming the first.
    """
    for name, action in args.of_training.items():
        if name not in _UNTRAINED and getattr(args, name) != action.default:
            raise ValueError(
                f"ctxfast.{who}: {action.option_strings[-1]} is given and nothing is trained; leave it out."
            )


def check_files(args: argparse.Namespace, who: str, *names: str) -> None:
    """Refuse files that are not there.

    Raises:
        FileNotFoundError: naming the argument.
    """
    for name in names:
        value = getattr(args, name)
        for file in value if isinstance(value, list) else [value]:
            if file is None or Path(file).is_file():
                continue
            found = "is a directory" if Path(file).is_dir() else "does not exist"
            raise FileNotFoundError(f"ctxfast.{who}: {_shown(name)} {file} {found}; expected a file.")


def check_new_files(args: argparse.Namespace, who: str, *names: str) -> None:
    """Refuse what cannot be a file to write.

    Raises:
        ValueError: naming the argument.
    """
    for name in names:
        file = getattr(args, name)
        if file is not None and (file == "-" or Path(file).is_dir()):
            found = "is '-'" if file == "-" else f"{file} is a directory"
            raise ValueError(f"ctxfast.{who}: {_shown(name)} {found}; expected the name of a file.")


def check_output(args: argparse.Namespace, who: str, *names: str) -> None:
    """Refuse a directory that is, or holds, what these arguments name: a run replaces what an earlier one left there.

    Raises:
        ValueError: naming both.
    """
    from .._core.files import check_apart

    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    inputs = {_shown(name): value if isinstance(value, list) else [value] for name, value in given.items()}
    check_apart(f"ctxfast.{who}", {"-o": [args.output]}, inputs)


def check_directory(args: argparse.Namespace, who: str) -> None:
    """Refuse a directory that this command may not work in, one with a run of another included.

    Raises:
        ValueError: naming what it holds.
    """
    from ..training.loop import checkpoints

    if args.overwrite:
        checkpoints.check_directory(args.output)
    else:
        checkpoints.check_kind(args.output, who)


def _shown(name: str) -> str:
    return name if name == "text" else "--" + name.replace("_", "-")


DOWNLOAD = "fetch a model of Hugging Face's hub that is not on this machine"


def check_model(value: str | None, who: str, option: str = "--model", *, download: bool = False) -> None:
    """Refuse a file that does not belong to a model: the model would be looked for beside it.

    With ``download`` fetch a model of the hub.

    Raises:
        FileNotFoundError: naming the option; or the hub has no such model.
        ConnectionError: the hub cannot be reached.
    """
    if value is None:
        return
    path = Path(value).expanduser()
    if path.is_file() and path.suffix not in _OF_WEIGHTS and not path.with_name(path.name + ".index").is_file():
        raise FileNotFoundError(
            f"ctxfast.{who}: {option} {value} is a file and no model's; expected a model's folder, its weights "
            "(.safetensors, .bin), the prefix of a TensorFlow checkpoint, or the name of a package with a model."
        )
    if download:
        from ..models.bert.weights import resolve_model

        resolve_model(value, download=True)


def tokenizer_files(value: str, who: str, option: str) -> list[Path]:
    """Files that a tokenizer is read from.

    Args:
        value: vocab.txt, tokenizer.json, or a model as ``Bert.from_pretrained`` takes it.
        who, option: for errors.

    Raises:
        FileNotFoundError: none of these.
    """
    from ..models.bert.weights import resolve_model

    expected = "expected vocab.txt, tokenizer.json, a model's folder, or the name of a package with a model"
    try:
        path = resolve_model(value)
    except FileNotFoundError:
        raise FileNotFoundError(f"ctxfast.{who}: {option} {value} does not exist; {expected}.") from None
    own = [path] if path.is_file() and path.suffix in (".txt", ".json") else []
    folder = path if path.is_dir() else path.parent
    found = [folder / name for name in _OF_TOKENIZERS if (folder / name).is_file() and folder / name not in own]
    if not own and (path.is_file() or not any(file.name in _OF_TOKENIZERS[:3] for file in found)):
        raise FileNotFoundError(f"ctxfast.{who}: {option} {value} holds no vocabulary; {expected}.")
    return own + found


def digests(args: argparse.Namespace, *names: str) -> dict[str, dict[str, str]]:
    """SHA-256 of the files that arguments name. A run's settings hold them, so that it never goes on with others."""
    from .._core.digests import digest

    found = {}
    for name in names:
        value = getattr(args, name)
        files = value if isinstance(value, list) else [value]
        found[name] = {str(file): digest(file) for file in files if file is not None}
    return found


def check(args: argparse.Namespace, who: str) -> None:
    """Refuse what can be seen before any data is read.

    Raises:
        RuntimeError: see ``check_impl``.
        ValueError: both or neither of --epochs and --steps where there is no default; a value that the loop refuses.
    """
    if args.epochs is not None and args.steps is not None:
        raise ValueError(f"ctxfast.{who}: --epochs and --steps are both given; expected one of them.")
    if args.epochs is None and args.steps is None:
        raise ValueError(f"ctxfast.{who}: neither --epochs nor --steps is given; expected one of them.")
    if args.epochs is not None and not 0 < args.epochs < math.inf:
        raise ValueError(f"ctxfast.{who}: --epochs is {args.epochs}; expected a number above 0.")
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"ctxfast.{who}: --steps is {args.steps}; expected 1 or more.")
    if args.batch_size < 1:
        raise ValueError(f"ctxfast.{who}: --batch-size is {args.batch_size}; expected 1 or more.")
    if not 0 <= args.warmup < math.inf:
        raise ValueError(f"ctxfast.{who}: --warmup is {args.warmup}; expected steps, 0 or more, or a share below 1.")
    from .._core.choice import use_impl
    from ..training.loop.parallel import device_of
    from ..training.loop.train import board_writer, check_amp, usual_amp

    with use_impl(args.impl):  # refuses a name that no op knows
        pass
    args.is_amp_chosen = args.amp == "auto"
    if args.is_amp_chosen:
        args.amp = usual_amp(device_of(args.device))
    check_amp(args.amp, device_of(args.device))
    check_impl(args, who)
    # How many steps epochs have is not known yet; it bounds the warm-up only. A learning rate may be the model's.
    rate = args.learning_rate
    args.learning_rate = 1.0 if rate is None else rate
    board_writer(config(args, args.steps or max(1, math.ceil(args.warmup))))  # refuses what is not installed
    args.learning_rate = rate
    if args.output == "-":
        raise ValueError(f"ctxfast.{who}: -o is '-'; expected a directory to work in.")
    if Path(args.output).exists() and not Path(args.output).is_dir():
        raise ValueError(f"ctxfast.{who}: -o {args.output} is a file; expected a directory to work in.")


def check_impl(args: argparse.Namespace, who: str, ops: Collection[str] | None = None) -> None:
    """Refuse an --impl that would change nothing.

    Args:
        ops: what the model runs; None where that is not known.

    Raises:
        RuntimeError: none of these ops has it on the device.
    """
    from .._core.choice import why_no_impl
    from ..training.loop.parallel import device_of

    reason = why_no_impl(args.impl, device_of(args.device), ops)
    if reason is not None:
        raise RuntimeError(f"ctxfast.{who}: --impl is {args.impl!r}, but {reason}")


def config(args: argparse.Namespace, steps: int, **more: Any) -> Any:
    """The ``LoopConfig`` that the arguments ask for; ``steps`` as --epochs and the data give it, or --steps."""
    from ..training.loop.train import LoopConfig

    warmup = round(args.warmup * steps) if 0 < args.warmup < 1 else round(args.warmup)
    return LoopConfig(
        steps=steps,
        learning_rate=args.learning_rate,
        accumulate=args.accumulate,
        warmup_steps=warmup,
        schedule=args.schedule,
        optimizer=args.optimizer,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm or None,
        amp=args.amp,
        seed=args.seed,
        log_every=args.log_every,
        eval_every=args.eval_every,
        save_every=args.save_every,
        keep=args.keep,
        parallel=args.parallel,
        device=args.device,
        tensorboard=args.tensorboard,
        **more,
    )


def run(
    args: argparse.Namespace, who: str, task: Any, loop: Any, settings: dict[str, Any], notes: Sequence[str] = ()
) -> Any:
    """Train as the arguments say, tell how far it is, return the loop's report; ``notes`` go to its log."""
    from ..training.loop.train import train

    is_told = not args.quiet and task_is_first()
    if is_told and args.is_amp_chosen and loop.amp != "no":
        say(who, f"computes in {loop.amp} with float32 weights; --amp no computes in float32")
    show = Training(who)
    told = {"show": show.report, "tick": show.tick} if is_told else {}
    try:
        report = train(task, loop, args.output, overwrite=args.overwrite, settings=settings, notes=notes, **told)
    finally:
        show.close()
    if is_told:
        before = f" (from step {report.resumed:,})" if report.resumed else ""
        figures = ", ".join(f"{key} {value:.4g}" for key, value in report.figures.items())
        end = f"{report.directory}/final, {report.step:,} steps{before}, {duration(report.seconds)}"
        say(who, f"{end}; {figures}" if figures else end)
    return report


@contextmanager
def preparing(args: argparse.Namespace, who: str) -> Iterator[None]:
    """Shows in the block how far data is read."""
    from .._core.progress import watching

    show = Reading(who)
    try:
        with watching(None if args.quiet or not task_is_first() else show):
            yield
    finally:
        show.close()


def task_is_first() -> bool:
    """Whether this process is the one that prints; before it has joined the others, the first of its machine."""
    import torch.distributed as dist

    if dist.is_initialized():
        return dist.get_rank() == 0
    return not dist.is_torchelastic_launched() or dist.get_node_local_rank(0) == 0
