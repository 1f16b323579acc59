# SPDX-License-Identifier: Apache-2.0
"""What several ops share: parts of definitions, glue of kernels, packed weights, test data."""
