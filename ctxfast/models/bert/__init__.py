# SPDX-License-Identifier: Apache-2.0
"""BERT, RoBERTa and ERNIE encoders: configuration, files, tokenisation and modules."""
