// The micro-kernel under every pass over all pairs: R rows against one packed tile of 32 columns.
#include "vec.h"

#ifndef SMARTBIRD_SCORE_INL_H_
#define SMARTBIRD_SCORE_INL_H_

namespace smartbird::SMARTBIRD_ISA {

// scores[r, c] = rows[r] . tile[:, c] + bias[c] for r < R, c < 32; rows [R, D] with leading
// dimension `row_ld`, tile [D, 32], bias [32]. Calls epilogue(r, c, v) once for each vector v of
// scores c, c + 1, ...
//
// R x 2 accumulators stay in registers: R = 4 covers the latency of FMA (4 cycles x 2 ports) with 8
// of them.
template <int R, typename A, typename Epilogue>
SMARTBIRD_INLINE void score_tile(const A* __restrict rows, int64_t row_ld, const A* __restrict tile,
                                 int64_t D, const A* __restrict bias, Epilogue&& epilogue) {
  constexpr int L = kLanes<A>;
  for (int c = 0; c < kTile; c += 2 * L) {
    Vec<A> acc[R][2];
    for (int r = 0; r < R; ++r) {
      acc[r][0] = load(bias + c);
      acc[r][1] = load(bias + c + L);
    }
    for (int64_t d = 0; d < D; ++d) {
      const Vec<A> x0 = load(tile + d * kTile + c), x1 = load(tile + d * kTile + c + L);
      for (int r = 0; r < R; ++r) {
        const A q = rows[r * row_ld + d];
        acc[r][0] += x0 * q;
        acc[r][1] += x1 * q;
      }
    }
    for (int r = 0; r < R; ++r) {
      epilogue(r, c, acc[r][0]);
      epilogue(r, c + L, acc[r][1]);
    }
  }
}

}  // namespace smartbird::SMARTBIRD_ISA

#endif  // SMARTBIRD_SCORE_INL_H_
