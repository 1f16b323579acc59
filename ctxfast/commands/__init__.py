# SPDX-License-Identifier: Apache-2.0
"""Commands of ``ctxfast`` that train or convert: a module each, with ``add(commands)`` for its arguments.

Modules import nothing heavy at the top: every start of ``ctxfast`` imports them.
"""

from types import ModuleType

from . import convert, finetune, pretrain_bert, pretrain_elmo, probe

COMMANDS: dict[str, ModuleType] = {
    "convert": convert,
    "finetune": finetune,
    "pretrain bert": pretrain_bert,
    "pretrain elmo": pretrain_elmo,
    "probe": probe,
}
