// SPDX-License-Identifier: Apache-2.0
#define CTXFAST_LANES 4
#include "lstm_narrow.h"

CTXFAST_LSTM_KERNELS(lstm_bfloat16_generic, Bfloat16)
CTXFAST_LSTM_KERNELS(lstm_int8_generic, Int8)
