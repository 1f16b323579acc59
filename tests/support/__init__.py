# SPDX-License-Identifier: Apache-2.0
"""What several tests stand on: the parity rule, tiny models, stand-ins for other packages, programs to be killed."""
