# SPDX-License-Identifier: Apache-2.0
"""Readers of labelled data: tables, released corpora, CoNLL columns, SQuAD's JSON, word vectors; plain, .gz or .xz.

What is wrong in a file is a ``ValueError`` that names the file, the line and the reason.
"""
