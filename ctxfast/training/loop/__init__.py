# SPDX-License-Identifier: Apache-2.0
"""The training loop: steps, processes, checkpoints; what is trained is a task."""
