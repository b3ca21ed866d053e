// packed_linear of many rows in 8-bit arithmetic: what surrounds a product of int8 matrices, which a vendor's
// library makes at the tensor cores' rate. Rows of inputs become integers of a unit each, codes become
// levels as integers (powers of two exactly, but that a level of 128 is 127: level_table.h), and sums floats.
#pragma once

#include "number_types.h"

namespace blaq {

constexpr int kRowThreads = 256;

// A row's inputs as integers from −127 to 127, and what they are multiples of; past k: 0. A row with NaN or
// Inf has a unit of NaN, so its outputs are NaN. One block a row; padded_k is a multiple of 4.
template <typename Type>
__global__ void __launch_bounds__(kRowThreads)
quantize_rows_kernel(const typename Type::Word* x, int64_t k, int64_t padded_k, uint32_t* out, float* units) {
  struct Shared {
    uint32_t largest[kRowThreads / 32];
  };
  Shared& memory = shared<Shared>();
  const int64_t row = blockIdx.x;
  x += row * k;
  uint32_t largest = 0;  // bits of a magnitude order as the magnitudes do, and NaN is above all
  for (int64_t i = threadIdx.x; i < k; i += kRowThreads) {
    const uint32_t magnitude = float_bits(Type::read(x[i])) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  largest = __reduce_max_sync(~0u, largest);
  if (threadIdx.x % 32 == 0) memory.largest[threadIdx.x / 32] = largest;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kRowThreads / 32; ++w) {
    largest = memory.largest[w] > largest ? memory.largest[w] : largest;
  }
  const bool finite = largest < 0x7f800000;
  const float unit = finite ? bits_float(largest) / 127.0f : bits_float(0x7fc00000);
  if (threadIdx.x == 0) units[row] = unit;
  const float inverse = unit >= 1e-30f ? 1.0f / unit : 0.0f;  // tiny inputs are 0, and so is NaN's row
  for (int64_t i = threadIdx.x; i < padded_k / 4; i += kRowThreads) {
    uint32_t four = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float value = finite && 4 * i + j < k ? Type::read(x[4 * i + j]) * inverse : 0.0f;
      four |= (static_cast<uint32_t>(__float2int_rn(value)) & 255) << 8 * j;
    }
    out[row * (padded_k / 4) + i] = four;
  }
}

struct Int8Levels {
  int8_t of_code[16];
};

// planes [bits, n, row_bytes] to levels [padded_n, padded_k]; past n and k: 0. A thread makes 16 of a row.
template <int bits>
__global__ void __launch_bounds__(256)
decode_int8_kernel(const uint8_t* planes, int64_t n, int64_t row_bytes, int64_t k, const Int8Levels levels,
                   uint4* out, int64_t padded_n, int64_t pieces) {
  struct Shared {
    int8_t of_code[16];
  };
  Shared& memory = shared<Shared>();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < 16; ++i) memory.of_code[i] = levels.of_code[i];
  }
  __syncthreads();
  const int64_t piece = int64_t{blockIdx.x} * 256 + threadIdx.x, begin = piece * 16;
  if (piece >= pieces) return;
  for (int64_t row = blockIdx.y; row < padded_n; row += gridDim.y) {
    uint32_t plane[bits];
#pragma unroll
    for (int b = 0; b < bits; ++b) {
      plane[b] = 0;
      for (int byte = 0; byte < 2; ++byte) {
        if (row < n && begin / 8 + byte < row_bytes) {
          plane[b] |= static_cast<uint32_t>(planes[(b * n + row) * row_bytes + begin / 8 + byte]) << 8 * byte;
        }
      }
    }
    uint32_t four[4] = {};
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      uint32_t code = 0;
#pragma unroll
      for (int b = 0; b < bits; ++b) code |= (plane[b] >> j & 1) << b;
      if (row < n && begin + j < k) {
        four[j / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(memory.of_code[code])) << j % 4 * 8;
      }
    }
    out[row * pieces + piece] = make_uint4(four[0], four[1], four[2], four[3]);
  }
}

// out [m, n] = sums [m, padded_n] · unit of the row · scale of the output + bias. A thread a number.
template <typename Type>
__global__ void __launch_bounds__(256)
scale_sums_kernel(const int32_t* sums, int64_t padded_n, const float* units, float level_unit,
                  const float* scale, bool scale_of_row, const typename Type::Word* bias,
                  typename Type::Word* out, int64_t m, int64_t n) {
  const int64_t column = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (column >= n) return;
  // As training rounded the weight.
  const float factor = Type::read(Type::write(scale[scale_of_row ? column : 0])) * level_unit;
  const float to_add = bias ? Type::read(bias[column]) : 0.0f;
  for (int64_t row = blockIdx.y; row < m; row += gridDim.y) {
    const float sum = static_cast<float>(sums[row * padded_n + column]);
    out[row * n + column] = Type::write(sum * units[row] * factor + to_add);
  }
}

template <typename Type>
void quantize_rows(const typename Type::Word* x, int64_t m, int64_t k, int64_t padded_k, void* out,
                   float* units, Stream stream) {
  if (m == 0) return;
  launch(quantize_rows_kernel<Type>, {static_cast<unsigned>(m), kRowThreads}, stream, x, k, padded_k,
         static_cast<uint32_t*>(out), units);
}

inline void decode_int8(const uint8_t* planes, int bits, int64_t n, int64_t row_bytes, int64_t k,
                        const Int8Levels& levels, void* out, int64_t padded_n, int64_t padded_k,
                        Stream stream) {
  const int64_t pieces = padded_k / 16;
  if (padded_n == 0 || pieces == 0) return;
  const auto kernel = bits == 1   ? decode_int8_kernel<1>
                      : bits == 2 ? decode_int8_kernel<2>
                      : bits == 3 ? decode_int8_kernel<3>
                                  : decode_int8_kernel<4>;
  launch(kernel,
         {{static_cast<unsigned>((pieces + 255) / 256), static_cast<unsigned>(padded_n < 65535 ? padded_n : 65535)},
          256},
         stream, planes, n, row_bytes, k, levels, static_cast<uint4*>(out), padded_n, pieces);
}

template <typename Type>
void scale_sums(const int32_t* sums, int64_t padded_n, const float* units, float level_unit,
                const float* scale, bool scale_of_row, const typename Type::Word* bias,
                typename Type::Word* out, int64_t m, int64_t n, Stream stream) {
  if (m == 0 || n == 0) return;
  launch(scale_sums_kernel<Type>,
         {{static_cast<unsigned>((n + 255) / 256), static_cast<unsigned>(m < 65535 ? m : 65535)}, 256}, stream,
         sums, padded_n, units, level_unit, scale, scale_of_row, bias, out, m, n);
}

}  // namespace blaq
