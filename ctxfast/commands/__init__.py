# SPDX-License-Identifier: Apache-2.0
"""Commands of ``ctxfast``: a module each, with ``add(commands)`` for its arguments.

Modules import nothing heavy at the top: every start of ``ctxfast`` imports them.
"""

from types import ModuleType

from . import attention, bench, convert, embed, finetune, info, neighbours, pretrain_bert, pretrain_elmo, probe

# In the order of the help; the first of two words is a group of ``GROUPS``.
COMMANDS: dict[str, ModuleType] = {
    "embed": embed,
    "pretrain bert": pretrain_bert,
    "pretrain elmo": pretrain_elmo,
    "convert": convert,
    "finetune": finetune,
    "probe": probe,
    "neighbours": neighbours,
    "attention": attention,
    "info": info,
    "bench": bench,
}
GROUPS = {"pretrain": "train a language model from text"}
