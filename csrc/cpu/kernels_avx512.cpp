// Compiled for: -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c.
#define SMARTBIRD_ISA avx512
#define SMARTBIRD_VEC_BYTES 64

#include "kernels-inl.h"
