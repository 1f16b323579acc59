# SPDX-License-Identifier: Apache-2.0
"""Pretraining and fine-tuning: data, loop, tasks, probes."""
