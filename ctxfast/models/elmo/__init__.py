# SPDX-License-Identifier: Apache-2.0
"""ELMo: options, weight files, characters, the bidirectional language model and its mixes."""
