// torch.ops.blaq.repack on a CUDA device: bit planes into fragment order (fragments.h).
#pragma once

#include "fragments.h"

namespace blaq {

// A thread makes the group of words `group` of a unit, of one lane. planes: [bits, n, row_bytes].
template <int bits>
__global__ void __launch_bounds__(256)
    repack_kernel(const uint8_t* planes, int64_t n, int64_t row_bytes, uint32_t* out, int64_t units,
                  int64_t count) {
  using F = Fragments<bits>;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (thread >= count) return;
  const int group = thread % 4, lane = thread / 4 % 32;
  const int64_t unit = thread / 128 % units, tile = thread / 128 / units;
  uint32_t words[F::kWords] = {};
  for (int pair = 0; pair < F::kPairs; ++pair) {
    const Place place = F::place(pair);
    const auto first = F::first(group, pair, lane % 4);
    const int64_t row = tile * 16 + lane / 4 + first.row, k = unit * F::kInputs + first.k;
    if (row >= n || k / 8 >= row_bytes) continue;
    for (int bit = 0; bit < bits; ++bit) {  // two neighbours lie in one byte
      const uint32_t two = planes[(bit * n + row) * row_bytes + k / 8] >> k % 8 & 3;
      const uint32_t apart = (two & 1) | (two & 2) << (F::kApart - 1);
      const bool sign = bit == bits - 1;
      words[sign ? place.sign_word : place.index_word] |=
          apart << (sign ? place.sign_bit : place.index_bit + bit);
    }
  }
  // Words of a unit are numbered group by group: word w is in load w / 4, at w % 4.
  uint32_t* to = out + ((tile * units + unit) * F::kLoads * 32 + lane) * 4;
  for (int i = 0; i < F::kWords; ++i) {
    const int word = group * F::kWords + i;
    to[word / 4 * 128 + word % 4] = words[i];
  }
}

// Makes kernels behind it in the stream begin after it has ended: packed_linear begins before the
// kernel that it follows has, and reads the repacked weight at once.
__global__ void settle_kernel() {}

template <int bits>
void launch_repack(const uint8_t* planes, int64_t n, int64_t row_bytes, uint32_t* out, Stream stream) {
  const int64_t units = Fragments<bits>::units(row_bytes * 8);
  const int64_t count = (n + 15) / 16 * units * 128;
  launch(repack_kernel<bits>, {static_cast<unsigned>((count + 255) / 256), 256}, stream, planes, n,
         row_bytes, out, units, count);
  launch(settle_kernel, {1, 32}, stream);
}

// planes: [bits, n, row_bytes], bits 1 to 4; out: Fragments<bits>::bytes(n, 8 * row_bytes).
inline void repack(const uint8_t* planes, int bits, int64_t n, int64_t row_bytes, uint32_t* out,
                   Stream stream) {
  if (bits == 1) launch_repack<1>(planes, n, row_bytes, out, stream);
  if (bits == 2) launch_repack<2>(planes, n, row_bytes, out, stream);
  if (bits == 3) launch_repack<3>(planes, n, row_bytes, out, stream);
  if (bits == 4) launch_repack<4>(planes, n, row_bytes, out, stream);
}

}  // namespace blaq
