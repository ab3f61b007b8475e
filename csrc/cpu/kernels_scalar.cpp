// Compiled for: any processor.
#define SMARTBIRD_ISA scalar
#define SMARTBIRD_VEC_BYTES 0

#include "kernels-inl.h"
