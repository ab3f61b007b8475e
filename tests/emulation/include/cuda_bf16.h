// Stands in for CUDA's header: storage and conversions, all that the kernels use.
#pragma once

#include "../emulation.h"

struct __nv_bfloat16 {  // NOLINT(bugprone-reserved-identifier): the name is CUDA's
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return emulation::from_bfloat16(x.bits); }
inline __nv_bfloat16 __float2bfloat16(float x) { return {emulation::to_bfloat16(x)}; }
