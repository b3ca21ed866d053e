// How kernels see a list of weights: a table with a row for each, groups that have one scale each,
// and parts of a group, one for each block. Built by blaq_kernels/cuda/plan.py, whose words these
// are.
#pragma once

#include "cuda/bins.h"

namespace blaq {

constexpr int kTile =
    8 * kThreads;  // elements that a block takes at once: eight neighbours a thread

struct Row {  // of a weight; plan.py's COLUMNS
  int64_t param, grad, trial_grad, latent, exp_avg, exp_avg_sq, scale;  // addresses
  int64_t length;       // elements of a group; the last of a row may be shorter
  int64_t per_row;      // groups of a row
  int64_t row;          // elements of a row
  int64_t first_group;  // of the weight's, among those of the list
  int64_t first_part;
  int64_t parts;    // of a group
  int64_t index;    // of the weight in the list
  int64_t aligned;  // whether every address is a multiple of 16
};

struct Part {
  const Row* row;
  int64_t group;       // of the list
  int64_t scale;       // the group in its weight
  int64_t begin, end;  // elements of the weight; of the last part of a short group none
  int64_t first;       // begin, rounded down to a multiple of 8: where the first thread is
  int64_t number;      // of the list
  bool leads;          // the first of its group

  // Parts are `part` elements long, a multiple of 8, but for the first, which ends where rounding
  // puts it.
  BLAQ_DEVICE static Part of(const Row* table, const int32_t* row_of_part, int64_t part,
                             int64_t number) {
    const Row* row = table + row_of_part[number];
    const int parts = static_cast<int>(row->parts), per_row = static_cast<int>(row->per_row);
    const int own = static_cast<int>(number - row->first_part), group = own / parts,
              place = own % parts;
    const int64_t within = group % per_row * row->length;
    const int64_t begin = group / per_row * row->row + within;
    const int64_t left = row->row - within;
    const int64_t end = begin + (row->length < left ? row->length : left);
    const int64_t first = begin / 8 * 8 + place * part;
    const int64_t stop = first + part < end ? first + part : end;
    return {row,    row->first_group + group,
            group,  begin > first ? begin : first,
            stop,   first,
            number, place == 0};
  }
};

// Eight neighbours from element i on, of which those in [begin, end) are there.
struct Eight {
  int64_t i;
  bool whole;        // all there, and 16-byte accesses allowed
  uint32_t present;  // bit k: element i + k

  BLAQ_DEVICE Eight(const Part& part, int64_t at) : i(at), whole(false), present(0) {
    if (at >= part.begin && at + 8 <= part.end) {
      present = 0xff, whole = part.row->aligned != 0;
    } else {
#pragma unroll
      for (int k = 0; k < 8; ++k) present |= (at + k >= part.begin && at + k < part.end) << k;
    }
  }
};

struct F32 {
  using Stored = float;
  static BLAQ_DEVICE float to_float(float x) { return x; }
  static BLAQ_DEVICE float from_float(float x) { return x; }
};
struct F16 : Fp16 {
  using Stored = uint16_t;
};
struct B16 : Bf16 {
  using Stored = uint16_t;
};

// Elements that are not there are 0.
template <typename Type>
BLAQ_DEVICE void load(int64_t address, const Eight& at, float (&x)[8]) {
  using Stored = typename Type::Stored;
  const auto* from = reinterpret_cast<const Stored*>(address) + at.i;
  if (__builtin_expect(at.whole, 1)) {
    constexpr int kWords = sizeof(Stored) * 8 / 16;
    uint4 words[kWords];
#pragma unroll
    for (int q = 0; q < kWords; ++q) words[q] = load_16(from + 16 / sizeof(Stored) * q);
#pragma unroll
    for (int q = 0; q < kWords; ++q) {
      const uint32_t four[4] = {words[q].x, words[q].y, words[q].z, words[q].w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if constexpr (sizeof(Stored) == 4) {
          x[4 * q + k] = bits_float(four[k]);
        } else {
          x[2 * k] = Type::to_float(static_cast<uint16_t>(four[k]));
          x[2 * k + 1] = Type::to_float(static_cast<uint16_t>(four[k] >> 16));
        }
      }
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < 8; ++k) x[k] = at.present >> k & 1 ? Type::to_float(from[k]) : 0.0f;
}

template <typename Type>
BLAQ_DEVICE void store(int64_t address, const Eight& at, const float (&x)[8]) {
  using Stored = typename Type::Stored;
  auto* to = reinterpret_cast<Stored*>(address) + at.i;
  if (__builtin_expect(at.whole, 1)) {
    constexpr int kWords = sizeof(Stored) * 8 / 16;
#pragma unroll
    for (int q = 0; q < kWords; ++q) {
      uint32_t four[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if constexpr (sizeof(Stored) == 4) {
          four[k] = float_bits(x[4 * q + k]);
        } else {
          four[k] = Type::from_float(x[2 * k]) |
                    static_cast<uint32_t>(Type::from_float(x[2 * k + 1])) << 16;
        }
      }
      store_16(to + 16 / sizeof(Stored) * q, make_uint4(four[0], four[1], four[2], four[3]));
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    if (at.present >> k & 1) to[k] = Type::from_float(x[k]);
  }
}

}  // namespace blaq
