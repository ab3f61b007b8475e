// Stands in for CUDA's header: storage and conversions, all that the kernels use.
#pragma once

#include "../emulation.h"

struct __half {  // NOLINT(bugprone-reserved-identifier): the name is CUDA's
  uint16_t bits;
};

inline float __half2float(__half x) { return emulation::from_float16(x.bits); }
inline __half __float2half(float x) { return {emulation::to_float16(x)}; }
