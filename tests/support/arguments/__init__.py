# SPDX-License-Identifier: Apache-2.0
"""One file an op: ``GOOD``, keyword arguments that pass (small, float32, on the CPU), and ``BAD``, what is wrong.

A row of ``BAD`` is (what differs from ``GOOD``, the error's type, its text after ``ctxfast.<op>: ``).
"""
