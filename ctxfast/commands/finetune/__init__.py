# SPDX-License-Identifier: Apache-2.0
"""``ctxfast finetune``: classes of texts and pairs, tags of words, answers, coreference; a module a task."""

from .command import add

__all__ = ["add"]
