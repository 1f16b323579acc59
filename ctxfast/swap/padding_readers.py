# SPDX-License-Identifier: Apache-2.0
"""Who reads hidden states at padding, where a swapped encoder puts zeros.

That cannot be told by the name of a class. What is known: which of Transformers' heads and of sentence-transformers'
modules read a text's own tokens alone, as long as they, and the parts that they hand hidden states to, are those
packages' own or work row by row. Under such a model padding is dropped, in calls that come through it: hooks watch it.
A call that reads padding (labels that are not -100 there, ColBERT's query expansion), asks for hidden states, comes by
another way (``model.bert(...)``, ``model.forward(...)``) or finds a part replaced or hooked runs as before. Whatever
else stands around an encoder may read padding: then batches with padding run as before, and the report says so.
"""

from __future__ import annotations

import inspect
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..nn.layer_norm import LayerNorm
from ..nn.watched import Snapshot, is_watched
from . import identity
from .transformers_kinds import ENCODERS
from .transformers_layers import is_capture

PADDINGS = ("zero", "keep")
# What else an encoder's ``padding`` may be: padding is dropped in calls that nobody objects to, or that a known head
# allows.
UNREAD, ALLOWED = "unread", "allowed"
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
TOKENS = "token_embeddings at padding are zeros now; where something reads them, pass padding='keep'."

# Ends of the names of Transformers' heads over the encoders of ``transformers_layers``, and what they read.
_HEADS = {
    "ForSequenceClassification": "own",
    "ForMultipleChoice": "own",
    "ForNextSentencePrediction": "own",
    "ForMaskedLM": "labels",
    "ForPreTraining": "labels",
    "ForTokenClassification": "labels",
    "ForQuestionAnswering": "all",
    "ForVisualReasoning": "own",
}
# Heads that are not as their names end.
_OTHER_HEADS = {"RoCBertForPreTraining": "unknown", "SplinterForPreTraining": "all"}
_MODELS = (
    "bert", "roberta", "xlm_roberta", "camembert", "electra", "ernie", "distilbert", "albert", "align", "altclip",
    "bert_generation", "chinese_clip", "clap", "layoutlm", "luke", "markuplm", "mpnet", "rembert", "roc_bert",
    "splinter", "tapas", "visual_bert", "modernbert", "nomic_bert", "gte", "jina_embeddings_v3", "eurobert",
    "roberta_prelayernorm", "xlm_roberta_xl", "megatron_bert",
)  # fmt: skip
_MODELINGS = (
    *(f"transformers.models.{model}.modeling_{model}" for model in _MODELS),
    "transformers.models.data2vec.modeling_data2vec_text",
)
# Parts of Transformers' models that make hidden states of other things, and see none of an encoder of texts.
_OTHER_INPUTS = ("embeddings", "entity_embeddings", "visual_embeddings", "vision_model", "audio_model")
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

# Ends of the names of the parts that Transformers' heads are made of: each reads the first row or works row by row.
_PARTS = ("Pooler", "Head", "Heads", "HeadTransform", "Predictions", "SequenceSummary", "ProjectionLayer")
# torch's modules that work row by row, and losses, which see what labels let them.
_ROWS = {
    kind.forward
    for kind in (
        nn.Linear, nn.LayerNorm, LayerNorm, nn.Dropout, nn.Identity, nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.Sigmoid,
        nn.ELU, nn.LeakyReLU, nn.Mish, nn.Softplus, nn.CrossEntropyLoss,
    )
}  # fmt: skip
_PART_CONTAINERS = (*_CONTAINERS, nn.Sequential)
_TABLES = (nn.ParameterDict, nn.ParameterList)  # are never called


def _is_own(module: nn.Module, package: str, kind: type | None = None) -> bool:
    kind, forward = kind or type(module), module.__dict__.get("forward")
    if forward is not None:  # accelerate's, for mixed precision, are around a model's own
        packages = (package, "torch", *({"accelerate"} & sys.modules.keys()))
        if not identity.is_written_in(forward, *packages) or inspect.unwrap(forward) is not inspect.unwrap(
            kind.forward
        ):
            return False
    return identity.why_not_stock(kind, package, _RUN) is None


def _kind(module: nn.Module) -> type:
    """A module's class; that under torch's wrapper if it was given one (FSDP2 makes subclasses)."""
    return next(kind for kind in type(module).__mro__ if not kind.__module__.startswith(_WRAPPERS))


def _reads(module: nn.Module) -> str:
    """What a module above an encoder reads: its "own" rows, "labels" or "expansion" sometimes more, "all", "unknown",
    or "nothing" for what hands hidden states on as they are."""
    kind = _kind(module)
    place, name = kind.__module__, kind.__name__
    if kind in (*_CONTAINERS, nn.Module) or (place.startswith("peft.") and _is_own(module, "peft")):
        return "nothing"
    if place in _MODELINGS and _is_own(module, "transformers", kind):
        if _is_base(kind):
            return "nothing"
        if name in _OTHER_HEADS:
            return _OTHER_HEADS[name]
        return next((reads for end, reads in _HEADS.items() if name.endswith(end)), "unknown")
    if place == "transformers.models.dpr.modeling_dpr" and name in _FIRST_TOKEN and _is_own(module, "transformers"):
        return "own"
    if place.startswith("sentence_transformers.") and _is_own(module, "sentence_transformers"):
        if name in ("Transformer", "MLMTransformer"):
            return "expansion"
        return "own" if name in _BY_MASK else "unknown"
    return "unknown"


def _is_base(kind: type) -> bool:
    """Whether it is the class of a model of Transformers without a head."""
    name = kind.__name__
    is_base = name.endswith(("Model", "ModelWithProjection")) and not name.endswith("LMHeadModel")
    return kind.__module__ in _MODELINGS and (is_base or name == "BertGenerationEncoder")


def _is_head(kind: type) -> bool:
    return kind.__module__.startswith("transformers.") and not _is_base(kind)


def _has_a_say(module: nn.Module) -> bool:
    """Whether calls of a module above an encoder are watched."""
    return _reads(module) not in ("unknown", "all", "nothing") or _is_base(_kind(module))


def _is_part(module: nn.Module) -> bool:
    """Whether a module that may be handed hidden states is known to read no padding; what is in it is another
    question."""
    kind = type(module)
    place, name = kind.__module__, kind.__name__
    if kind in _TABLES:
        return True
    if is_watched(module):
        return False
    if place.startswith("peft."):
        return _is_own(module, "peft")
    if kind.__call__ is not nn.Module.__call__:
        return False
    if kind.forward in _ROWS:
        return len(getattr(module, "normalized_shape", (1,))) == 1 and getattr(module, "ignore_index", -100) == -100
    if kind in _PART_CONTAINERS:
        return True
    if place in _MODELINGS and name.endswith(_PARTS):
        return identity.why_not_stock(kind, "transformers") is None and _summary(module) in (None, "first")
    if place == "transformers.activations":
        return identity.why_not_stock(kind, "transformers") is None
    if place.startswith("sentence_transformers."):
        return name in _BY_MASK and _is_own(module, "sentence_transformers")
    return False


def _summary(module: nn.Module) -> str | None:
    """Electra's ``summary_type``."""
    return getattr(module, "summary_type", None)


def _is_encoder(module: nn.Module) -> bool:
    return any(f"{kind.__module__}.{kind.__qualname__}" in ENCODERS for kind in type(module).__mro__)


def _inside(module: nn.Module) -> Iterator[nn.Module]:
    """What stands in a watched module and may be handed hidden states, as far as the next watched ones."""
    for name, child in module._modules.items():
        # What makes the hidden states does not read them.
        if child is None or _is_encoder(child) or (name in _OTHER_INPUTS and _kind(module).__module__ in _MODELINGS):
            continue
        yield child
        if not _has_a_say(child) and type(child).forward not in _ROWS and not isinstance(child, nn.LSTM):
            yield from _inside(child)


def _is_looked_at(module: nn.Module) -> bool:
    """Whether somebody else watches a watched module."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(not is_capture(hook) for hook in hooks if hook not in (before_call, after_call))


class Surroundings:
    """What stands in a watched module besides the encoder, as it is now.

    Attributes:
        reads: what the module itself reads.
        odd: what may read padding; None if nothing does.
    """

    def __init__(self, module: nn.Module) -> None:
        self.reads = _reads(module)
        found = list(_inside(module))
        self._watched = [each for each in found if _has_a_say(each)]
        parts = [each for each in found if each not in self._watched]
        is_lstm = _kind(module).__module__.startswith("sentence_transformers.")  # of a step that packs its input
        parts = [each for each in parts if not (is_lstm and isinstance(each, nn.LSTM))]
        self.odd = next((each for each in parts if not _is_part(each)), None)
        self._first, self._kind = dict(module._modules), type(module)
        self._forward = module.__dict__.get("forward")
        settings = [(each.__dict__, "summary_type") for each in parts]
        self._parts = Snapshot(parts, settings)
        self._classes = identity.Watched()
        for kind in {type(module), *map(type, parts)}:
            self._classes.add(kind, _RUN)

    def allow(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether a call of the module with these arguments reads no padding."""
        if self.reads in ("unknown", "all") or self.odd is not None or any(map(_is_looked_at, self._watched)):
            return False
        return self.reads not in _SOMETIMES or not _looks_at_padding(self._kind, self.reads, args, kwargs)

    def is_still(self, module: nn.Module) -> bool:
        return (
            type(module) is self._kind
            and module.__dict__.get("forward") is self._forward
            and module._modules == self._first
            and self._parts.is_still()
            and self._classes.are_still()
        )


_known: weakref.WeakKeyDictionary[nn.Module, Surroundings] = weakref.WeakKeyDictionary()


def _surroundings(module: nn.Module) -> Surroundings:
    """They are looked at again where something changed."""
    known = _known.get(module)
    if known is None or not known.is_still(module):
        known = _known[module] = Surroundings(module)
    return known


class Reader:
    """What stands around one encoder.

    Attributes:
        padding: what the encoder has to do with padded batches.
        watched: modules whose calls say whether padding is read.
        note: a sentence for the report, None if there is nothing to say.
        is_near_miss: whether it says that calls run as before.
        sometimes: sentences on the calls of watched modules that run as before.
    """

    def __init__(self, above: Sequence[nn.Module], padding: str | None) -> None:
        self.padding, self.note, self.is_near_miss = padding or ALLOWED, None, False
        self.watched, self.sometimes = (), ()
        if padding is not None:
            return
        reads = {module: _reads(module) for module in above}
        kinds = set(reads.values())
        self.watched = tuple(filter(_has_a_say, above))
        expands = any(getattr(module, "query_expansion", None) is not None for module in self.watched)
        told = kinds & ({"labels", "expansion"} if expands else {"labels"})
        self.sometimes = tuple(_SOMETIMES[what] for what in sorted(told))
        if "expansion" in kinds and not any(_is_head(_kind(module)) for module in above):
            self.sometimes += (TOKENS,)
        unknown = [module for module, what in reads.items() if what == "unknown"]
        unknown += [each.odd for module in self.watched if (each := _surroundings(module)).odd is not None]
        if "all" in kinds or unknown:
            self.padding, self.is_near_miss, self.sometimes = "keep", True, ()
            self.note = _ANSWERS if "all" in kinds else _MAY_READ.format(name=type(unknown[0]).__name__)
        elif kinds <= {"nothing"}:
            self.padding, self.note = UNREAD, BARE


class _Call(NamedTuple):
    """A call of a watched module that has not returned."""

    module: int  # its id
    kind: type
    allows: bool


_now = threading.local()


def is_read(padding: str, has_hidden_states: bool) -> bool:
    """Whether the call that a swapped encoder is part of may read hidden states at padding.

    Args:
        padding: the encoder's.
        has_hidden_states: whether the call returns hidden states.
    """
    if padding in PADDINGS:
        return padding == "keep"
    calls: tuple[_Call, ...] = getattr(_now, "calls", ())
    if not all([call.allows for call in calls]):
        return True
    if padding == UNREAD:
        return False
    heads = [call.kind for call in calls if not _is_base(call.kind)]
    return not heads or (has_hidden_states and any(map(_is_head, heads)))


@lru_cache(maxsize=256)
def _signature(kind: type) -> inspect.Signature:
    return inspect.signature(kind.forward)


def _looks_at_padding(kind: type, reads: str, args: tuple, kwargs: dict[str, Any]) -> bool:
    if reads == "expansion":
        given = args[0] if args else kwargs.get("features", {})
        mask, wanted = given.get("attention_mask"), given.get("query_expansion_positions")
        if wanted is not None:
            wanted = wanted != 0
    else:
        try:
            given = _signature(kind).bind_partial(None, *args, **kwargs).arguments
        except TypeError:  # the call itself will say what is wrong
            return False
        mask, labels = given.get("attention_mask"), given.get("labels")
        wanted = labels != -100 if isinstance(labels, Tensor) else None
    if not isinstance(mask, Tensor) or wanted is None:
        return False
    return wanted.shape != mask.shape or bool((wanted.to(mask.device) & (mask == 0)).any())


def before_call(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of watched modules."""
    if not torch.compiler.is_compiling():
        allows = _surroundings(module).allow(args, kwargs)
        calls = getattr(_now, "calls", ())
        if any([call.module == id(module) for call in calls]):  # these were interrupted: none calls itself
            calls = ()
        _now.calls = (*calls, _Call(id(module), _kind(module), allows))


def after_call(module: nn.Module, args: tuple, output: Any) -> None:
    """A forward hook of watched modules; it runs after errors, too."""
    if not torch.compiler.is_compiling():
        _now.calls = getattr(_now, "calls", ())[:-1]


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
