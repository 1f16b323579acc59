// SPDX-License-Identifier: Apache-2.0
// AVX2 with FMA: 16 registers hold 3 x 4 sums, one weight and three broadcast h.
#define CTXFAST_LSTM_RUN lstm_run_avx2
#define CTXFAST_LANES 8
#define CTXFAST_ROWS 3
#define CTXFAST_VECTORS 4
#define CTXFAST_VECTORS_1 8
#include "lstm_body.h"
