# SPDX-License-Identifier: Apache-2.0
"""Text to contextual vectors: calls (``Embedder``), files (``job``) and Ray datasets (``ray_data``)."""
