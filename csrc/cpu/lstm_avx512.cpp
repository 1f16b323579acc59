// SPDX-License-Identifier: Apache-2.0
// AVX-512F: 32 registers hold 6 x 4 sums, 4 weights and the broadcast h.
#define CTXFAST_LSTM_RUN lstm_run_avx512
#define CTXFAST_LANES 16
#define CTXFAST_ROWS 6
#define CTXFAST_VECTORS 4
#define CTXFAST_VECTORS_1 4
#include "lstm_body.h"
