# SPDX-License-Identifier: Apache-2.0
"""Other people's models made faster in place: ``ctxfast.swap_in``, ``restore`` and ``register_attention``."""
