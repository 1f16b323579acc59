// SPDX-License-Identifier: Apache-2.0
#define CTXFAST_LANES 8
#include "char_cnn/body.h"

namespace ctxfast {
extern const CharCnnKernels char_cnn_avx2 = {&forward, &backward_words, &backward_filters};
}
