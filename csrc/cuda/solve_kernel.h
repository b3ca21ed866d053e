// solve where a scale spans a long group: Eqs. 5 and 7 of BLAQ (AAAI 2024). No last scale says
// where to look, so the weighted mean does, and a second histogram lies around what the first has
// found, with exact sums there: alternations are run anew from the start, and exact where they end.
#pragma once

#include "cuda/step_kernel.h"

namespace blaq {

struct Given {  // both arguments of the op, of a list of one weight
  const float* curvature;
};

template <bool kBinary>
__global__ void __launch_bounds__(kThreads, 2) sum_parts(const Call call, const Given given) {
  auto& memory = shared<Shared<kBinary>>();
  const Part part = Part::of(call.table, call.row_of_part, call.part, blockIdx.x);
  const Start start(call, *part.row, part.group, part.scale);
  Collector<kBinary> collector(call, start, memory);
  __syncthreads();
  for (int64_t i = part.first; i < part.end; i += kTile) {
    const Eight at(part, i + 8 * threadIdx.x);
    float w[8], d[8];
    load<F32>(part.row->latent, at, w);
    load<F32>(reinterpret_cast<int64_t>(given.curvature), at, d);
#pragma unroll
    for (int k = 0; k < 8; ++k) d[k] = at.present >> k & 1 ? floored(d[k]) : 0.0f;
    collector.add(w, d);
  }
  leave(call, part, collector, memory);
}

__global__ void __launch_bounds__(kThreads) write_codes(const Call call) {
  const Part part = Part::of(call.table, call.row_of_part, call.part, gridDim.x - 1 - blockIdx.x);
  const ScaledBook levels{call.book, call.scales[part.group]};
  auto* codes = reinterpret_cast<uint8_t*>(call.codes);
  if (part.leads && threadIdx.x == 0) scales_of(*part.row)[part.scale] = call.scales[part.group];
  for (int64_t i = part.first; i < part.end; i += kTile) {
    const Eight at(part, i + 8 * threadIdx.x);
    float w[8];
    load<F32>(part.row->latent, at, w);
    uint32_t eight[8], four[2] = {0, 0};
    levels.codes(w, eight);
#pragma unroll
    for (int k = 0; k < 8; ++k) four[k / 4] |= eight[k] << 8 * (k % 4);
    if (at.whole) {
      *reinterpret_cast<uint2*>(codes + at.i) = make_uint2(four[0], four[1]);
      continue;
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      if (at.present >> k & 1) codes[at.i + k] = static_cast<uint8_t>(eight[k]);
    }
  }
}

// `start` is where the alternation begins, or null for the weighted mean; `mean` takes one for each
// group.
inline void run_solve(Call call, const Given& given, float* mean, Stream stream) {
  const Grid parts = blocks(call.parts);
  float* const result = call.scales;
  const float* const asked = call.exact ? nullptr : call.start;
  call.scales = call.binary() ? result : mean;
  launch(sum_parts<true>, parts, stream, call, given);
  settle<true, false>(call, stream);
  if (!call.binary()) {
    call.first = call.start = call.centre = asked ? asked : mean;
    call.scales = result;
    for (int round = 0; round < 2; ++round) {
      launch(sum_parts<false>, parts, stream, call, given);
      settle<false, false>(call, stream);
      call.start = call.centre = result;
    }
  }
  launch(write_codes, parts, stream, call);
}

}  // namespace blaq
