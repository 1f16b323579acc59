# SPDX-License-Identifier: Apache-2.0
"""Who reads hidden states at padding, where a swapped encoder puts zeros.

That cannot be told by the name of a class. What is known: which of Transformers' heads and of sentence-transformers'
modules read a text's own tokens alone, as long as they are those packages' own. Under such models padding is dropped.
Some of them read padding in some calls (labels that are not -100 there, ColBERT's query expansion): these are watched
by a hook, and such a call runs as before. Whatever else stands around an encoder may read padding: then batches with
padding run as before, and the report says so.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from . import identity

PADDINGS = ("zero", "keep")
BARE = (
    "hidden states at padding are zeros now; where something reads them (a layer over padded rows, a maximum without "
    "a mask), pass padding='keep'."
)
_MAY_READ = (
    "batches with padding run as before, as {name} may read hidden states at padding; if it does not, pass "
    "padding='zero'."
)
_ANSWERS = "batches with padding run as before: a question-answering head scores padding, too."
_SOMETIMES = {
    "labels": "calls with labels at padding that are not -100 run as before; in others, outputs at padding come from "
    "hidden states that are zeros.",
    "expansion": "queries whose expansion tokens are masked run as before.",
}

# Ends of the names of Transformers' heads over the encoders of ``transformers_layers``, and what they read.
_HEADS = {
    "ForSequenceClassification": "own",
    "ForMultipleChoice": "own",
    "ForNextSentencePrediction": "own",
    "ForMaskedLM": "labels",
    "ForPreTraining": "labels",
    "ForTokenClassification": "labels",
    "ForQuestionAnswering": "all",
}
_MODELS = ("bert", "roberta", "xlm_roberta", "camembert", "electra", "ernie", "distilbert")
_MODELINGS = tuple(f"transformers.models.{model}.modeling_{model}" for model in _MODELS)
# Transformers' models that read the first token of an encoder alone.
_FIRST_TOKEN = ("DPREncoder", "DPRContextEncoder", "DPRQuestionEncoder")
# sentence-transformers' modules that read rows by the mask, row by row or not at all.
_BY_MASK = (
    "SentenceTransformer", "CrossEncoder", "SparseEncoder", "MultiVectorEncoder", "Transformer", "MLMTransformer",
    "Pooling", "Normalize", "Dense", "Dropout", "LayerNorm", "LSTM", "WeightedLayerPooling", "WordWeights", "Router",
    "SpladePooling", "SparseAutoEncoder", "LogitScore", "MultiVectorMask", "HierarchicalTokenPooling",
)  # fmt: skip
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
_WRAPPERS = ("torch.nn.parallel.", "torch.distributed.")
_RUN = ("forward", "__call__")


def _is_own(module: nn.Module, package: str) -> bool:
    return "forward" not in module.__dict__ and identity.why_not_stock(type(module), package, _RUN) is None


def _reads(module: nn.Module) -> str:
    """What a module above an encoder reads: its "own" rows, "labels" or "expansion" sometimes more, "all", "unknown",
    or "nothing" for what hands hidden states on as they are."""
    kind = type(module)
    place, name = kind.__module__, kind.__name__
    if kind in _CONTAINERS or place.startswith(_WRAPPERS):
        return "nothing"
    if place.startswith("peft.") and _is_own(module, "peft"):
        return "labels" if hasattr(module, "peft_config") and "For" in name else "nothing"
    if place in _MODELINGS and _is_own(module, "transformers"):
        if name.endswith("Model") and not name.endswith("LMHeadModel"):
            return "nothing"
        return next((reads for end, reads in _HEADS.items() if name.endswith(end)), "unknown")
    if place == "transformers.models.dpr.modeling_dpr" and name in _FIRST_TOKEN and _is_own(module, "transformers"):
        return "own"
    if place.startswith("sentence_transformers.") and _is_own(module, "sentence_transformers"):
        if name in ("Transformer", "MLMTransformer"):
            return "expansion"
        return "own" if name in _BY_MASK else "unknown"
    return "unknown"


def _pipeline(module: nn.Module) -> Iterable[nn.Module]:
    """The modules that get hidden states from a model of sentence-transformers: all that stand in it."""
    if type(module).__module__.startswith("sentence_transformers."):
        for child in module.children():
            yield child
            if isinstance(child, (nn.ModuleDict, nn.ModuleList)) or type(child).__name__ == "Router":
                yield from (part for part in child.modules() if part is not child and _is_step(part))


def _is_step(module: nn.Module) -> bool:
    return type(module).__module__.startswith("sentence_transformers.")


class Reader:
    """What stands around one encoder.

    Attributes:
        padding: "zero" or "keep", what the encoder has to do with padded batches.
        watched: modules some of whose calls read padding.
        note: a sentence for the report, None if there is nothing to say.
        is_near_miss: whether it says that calls run as before.
        sometimes: sentences on the calls of watched modules that run as before.
    """

    def __init__(self, above: Sequence[nn.Module], padding: str | None) -> None:
        around = {id(module): module for module in above}
        for module in above:
            around.update((id(step), step) for step in _pipeline(module))
        reads = {key: _reads(module) for key, module in around.items()}
        kinds = set(reads.values())
        self.padding, self.note, self.is_near_miss = padding or "zero", None, False
        self.watched, self.sometimes = (), ()
        if padding is not None:
            return
        self.watched = tuple(around[key] for key, what in reads.items() if what in _SOMETIMES)
        expands = any(getattr(module, "query_expansion", None) is not None for module in self.watched)
        told = kinds & ({"labels", "expansion"} if expands else {"labels"})
        self.sometimes = tuple(_SOMETIMES[what] for what in sorted(told))
        unknown = [around[key] for key, what in reads.items() if what == "unknown"]
        if "all" in kinds or unknown:
            self.padding, self.is_near_miss = "keep", True
            self.note = _ANSWERS if "all" in kinds else _MAY_READ.format(name=type(unknown[0]).__name__)
        elif kinds <= {"nothing"}:
            self.note = BARE


# What the modules that are being called read, one entry a watched module that has not returned.
_now = threading.local()


def is_read_now() -> bool:
    """Whether the call that a swapped encoder is part of reads hidden states at padding."""
    return any(getattr(_now, "reads", ()))


@lru_cache(maxsize=256)
def _signature(kind: type) -> inspect.Signature:
    return inspect.signature(kind.forward)


def _looks_at_padding(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
    if type(module).__module__.startswith("sentence_transformers."):
        given = args[0] if args else kwargs.get("features", {})
        mask, wanted = given.get("attention_mask"), given.get("query_expansion_positions")
        if wanted is not None:
            wanted = wanted != 0
    else:
        try:
            given = _signature(type(module)).bind_partial(module, *args, **kwargs).arguments
        except TypeError:  # the call itself will say what is wrong
            return False
        mask, labels = given.get("attention_mask"), given.get("labels")
        wanted = labels != -100 if isinstance(labels, Tensor) else None
    if not isinstance(mask, Tensor) or wanted is None or wanted.shape != mask.shape:
        return False
    return bool((wanted.to(mask.device) & (mask == 0)).any())


def before_call(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of watched modules."""
    if not torch.compiler.is_compiling():
        _now.reads = (*getattr(_now, "reads", ()), _looks_at_padding(module, args, kwargs))


def after_call(module: nn.Module, args: tuple, output: Any) -> None:
    """A forward hook of watched modules; it runs after errors, too."""
    if not torch.compiler.is_compiling():
        _now.reads = getattr(_now, "reads", ())[:-1]


def watch(module: nn.Module) -> None:
    """Hook a module; a second time changes nothing."""
    if before_call not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(before_call, prepend=True, with_kwargs=True)
        module.register_forward_hook(after_call, always_call=True)


def unwatch(module: nn.Module) -> None:
    """Take the hooks away."""
    for hooks, own, flags in (
        (module._forward_pre_hooks, before_call, (module._forward_pre_hooks_with_kwargs,)),
        (module._forward_hooks, after_call, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
    ):
        for key in [key for key, hook in hooks.items() if hook is own]:
            del hooks[key]
            for table in flags:
                table.pop(key, None)
