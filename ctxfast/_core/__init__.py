# SPDX-License-Identifier: Apache-2.0
"""Registry, checks, registration and build facts; knows no op by name."""
