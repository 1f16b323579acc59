# SPDX-License-Identifier: Apache-2.0
"""The ops: each package holds one op's declaration, reference, implementations and test cases under its name."""
