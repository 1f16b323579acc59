# SPDX-License-Identifier: Apache-2.0
"""Language models from text: corpora, what is masked, and the tasks of BERT and of ELMo's biLM."""
