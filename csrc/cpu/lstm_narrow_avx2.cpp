// SPDX-License-Identifier: Apache-2.0
#define CTXFAST_LANES 8
#include "lstm_narrow.h"

CTXFAST_LSTM_KERNELS(lstm_bfloat16_avx2, Bfloat16)
CTXFAST_LSTM_KERNELS(lstm_int8_avx2, Int8)
