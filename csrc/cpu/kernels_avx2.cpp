// Compiled for: -mavx2 -mfma -mf16c.
#define SMARTBIRD_ISA avx2
#define SMARTBIRD_VEC_BYTES 32

#include "kernels-inl.h"
