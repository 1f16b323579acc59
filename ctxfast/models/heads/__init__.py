# SPDX-License-Identifier: Apache-2.0
"""The task models of the ELMo paper (Peters et al. 2018), a file each; all have their ``TokenVectors`` as ``reader``.

Equations are those of the cited papers as AllenNLP describes its implementations of them.
"""
