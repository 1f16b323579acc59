# SPDX-License-Identifier: Apache-2.0
"""One suite for every op and model: the same inputs for all peers, parity before timing, rounds taken in turn."""
