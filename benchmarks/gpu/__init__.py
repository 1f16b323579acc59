# SPDX-License-Identifier: Apache-2.0
"""What a GPU is asked when there is one: programs, and the parts in which ``make gpu`` runs them."""
