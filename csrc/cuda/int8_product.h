// What both ways to multiply in 8-bit arithmetic share: the call, how sums of a unit become floats,
// and how those are stored.
#pragma once

#include "int8_rows.h"
#include "int8_weights.h"

namespace blaq {

// What outputs and bias are, and what training rounded weights to.
enum class Number { fp32, fp16, bf16 };

// out[m, n] = rows · weightᵀ · scale + bias.
struct Int8Product {
  const RowChunk* rows;  // [row tile][chunk]
  Planes planes;
  const float* scale;  // [1], [n, 1] or [n, groups]
  const void* bias;    // [n], or null
  void* out;
  int64_t m;
  int chunks, scale_stride, group_chunks;  // group_chunks: of a group; 0: none
  LevelBytes levels;
  float level_unit;
  Number number;

  // Tiles of kChunkRows rows and as many outputs, those of the same rows side by side.
  __host__ __device__ unsigned tiles_across() const {
    return static_cast<unsigned>((planes.n + kChunkRows - 1) / kChunkRows);
  }
  __host__ __device__ unsigned tiles() const {
    return tiles_across() * static_cast<unsigned>((m + kChunkRows - 1) / kChunkRows);
  }
};

BLAQ_DEVICE float rounded_as(Number number, float x) {
  return number == Number::fp16   ? Fp16::to_float(Fp16::from_float(x))
         : number == Number::bf16 ? Bf16::to_float(Bf16::from_float(x))
                                  : x;
}

BLAQ_DEVICE float int8_scale(const Int8Product& call, int64_t output, int64_t group) {
  const int64_t row = output < call.planes.n ? output : call.planes.n - 1;
  return rounded_as(call.number, call.scale[row * call.scale_stride + group]);
}

// Exact: a unit's sum is at most 256 · 127 · 128 < 2^22. Before sm_90 a conversion is I2F, which a
// slower unit makes, not I2FP.
BLAQ_DEVICE float float_of_sum(int sum) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return static_cast<float>(sum);
#else
  return bits_float(0x4b400000 + static_cast<uint32_t>(sum)) - 12582912.0f;
#endif
}

// total += sum · unit (· scale of the group). Sums are of outputs g and g + 8 from `output` on, and
// of rows 8 j + 2 t and one more from `row` of the chunk on.
template <bool grouped, int kJ>
BLAQ_DEVICE void add_sums(const Int8Product& call, const int (&sum)[kJ][4], const RowChunk& rows,
                          int row, int64_t output, int chunk, float (&total)[kJ][4]) {
  const float* units = rows.unit + row + threadIdx.x % 4 * 2;
  float scale[2] = {};
  if constexpr (grouped) {
    // Past the last input sums are 0.
    const int group = min(chunk / call.group_chunks, call.scale_stride - 1);
#pragma unroll
    for (int o = 0; o < 2; ++o) {
      scale[o] = int8_scale(call, output + threadIdx.x % 32 / 4 + 8 * o, group);
    }
  }
#pragma unroll
  for (int j = 0; j < kJ; ++j) {
    const float2 unit = *reinterpret_cast<const float2*>(units + 8 * j);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float by = e % 2 ? unit.y : unit.x;
      total[j][e] = fmaf(float_of_sum(sum[j][e]), grouped ? scale[e / 2] * by : by, total[j][e]);
    }
  }
}

// Whether sums end with every chunk, not with every other: where groups end within units.
BLAQ_DEVICE bool ends_each_chunk(const Int8Product& call) { return call.group_chunks % 2 == 1; }

constexpr int kStoreStride = 20;                 // floats, so that no two lanes meet in a bank
constexpr int kStoreFloats = 32 * kStoreStride;  // of shared memory, for a warp

// 16 outputs of 32 rows, from a warp's shared memory.
template <typename Type>
BLAQ_DEVICE void store_rows(const Int8Product& call, const float* values, int64_t row0,
                            int64_t output0) {
  using Word = typename Type::Word;
  constexpr int kSome = 16 / sizeof(Word), kLanes = 16 / kSome;  // of a store; of a row
  Word* const out = static_cast<Word*>(call.out);
  const int64_t n = call.planes.n, output = output0 + threadIdx.x % kLanes * kSome;
  const bool whole = n % kSome == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    const int r = i * (32 / kLanes) + threadIdx.x % 32 / kLanes;
    const float* from = values + r * kStoreStride + threadIdx.x % kLanes * kSome;
    alignas(16) Word words[kSome];
#pragma unroll
    for (int e = 0; e < kSome; ++e) words[e] = Type::write(from[e]);
    if (row0 + r >= call.m) continue;
    Word* to = out + (row0 + r) * n + output;
    if (whole && output < n) {
      store_16(to, *reinterpret_cast<const uint4*>(words));
    } else {
#pragma unroll
      for (int e = 0; e < kSome; ++e) {
        if (output + e < n) to[e] = words[e];
      }
    }
  }
}

// All of a warp's sums: 16 outputs of 8 kJ rows. They pass shared memory, 32 rows at a time, so
// that rows are stored by 16 bytes.
template <int kJ>
BLAQ_DEVICE void store_sums(const Int8Product& call, const float (&total)[kJ][4], int64_t row0,
                            int64_t output0, float* values) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  float factor[2], bias[2] = {};
#pragma unroll
  for (int o = 0; o < 2; ++o) {
    const int64_t output = output0 + g + 8 * o;
    factor[o] = call.group_chunks ? call.level_unit : int8_scale(call, output, 0) * call.level_unit;
    if (call.bias && output < call.planes.n) {
      bias[o] = call.number == Number::fp32 ? static_cast<const float*>(call.bias)[output]
                : call.number == Number::fp16
                    ? Fp16::to_float(static_cast<const uint16_t*>(call.bias)[output])
                    : Bf16::to_float(static_cast<const uint16_t*>(call.bias)[output]);
    }
  }
#pragma unroll
  for (int part = 0; part < kJ / 4; ++part) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        values[(8 * j + 2 * t + e % 2) * kStoreStride + g + e / 2 * 8] =
            total[4 * part + j][e] * factor[e / 2] + bias[e / 2];
      }
    }
    __syncwarp();
    const int64_t row = row0 + 32 * part;
    if (call.number == Number::fp32) store_rows<Fp32>(call, values, row, output0);
    if (call.number == Number::fp16) store_rows<Narrow<Fp16>>(call, values, row, output0);
    if (call.number == Number::bf16) store_rows<Narrow<Bf16>>(call, values, row, output0);
  }
}

}  // namespace blaq
