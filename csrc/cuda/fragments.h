// Packed weights in the order in which tensor cores take them: the layout that
// torch.ops.blaq.repack makes on CUDA devices, and its decoding.
//
// The weight is the left operand of mma m16n8k16. A lane (g = lane / 4, t = lane % 4) brings four
// registers of two neighbouring weights for each fragment: register i is row g + i % 2 * 8. What
// the inner index means is free as long as inputs agree, so a lane takes 8 neighbouring inputs, one
// 16-byte load, for each two fragments: fragment f has k = 32 (f / 2) + 8t + 4 (f % 2) + 2 (i / 2),
// and k + 1.
//
// A unit is what a lane reads by 16-byte loads of a tile of 16 rows: `loads` of them, `fragments`
// fragments. Memory is [tile][unit][load][lane][16 bytes]; rows and inputs past the last are code
// 0.
//
// Within a unit's words every pair (two weights, one in each half of a register) has its sign and
// its index at places of its own, such that few shifts bring both where a float of 16 bits has
// them.
//
// One bit is no number to decode but a choice, of x or of -x, and choosing is what the metadata of
// the sparse product m16n8k32 do (mma.h): of every four values of a column two count, each with a
// factor out of A, here 1, and two bits say which. With (x, -x, x', -x') as the four, these bits are
// 0s and 1s', s the sign: the even bits of a word, and'ed and or'ed with constants, are metadata for
// 16 weights, the odd ones for 16 more. A lane's metadata are about values that all lanes of its
// quad have loaded; so of 8 neighbours lane t has the weights 2t and 2t + 1. Word w has, at bit 16h +
// 8j + 2s + e, row g + 8h and k = 64w + 32e + 8s + 2t + j.
#pragma once

#include "device.h"

namespace blaq {

struct Place {  // of a pair, within its group of words; the second weight's bits are kApart higher
  int sign_word, sign_bit, index_word, index_bit;
};

template <int bits>
struct Fragments {
  static constexpr int kWords = bits == 3 ? 3 : 1;              // of a group
  static constexpr int kPairs = 16 * kWords / bits;             // of a group
  static constexpr int kLoads = kWords;                         // of a unit, which is 4 groups
  static constexpr int kFragments = kPairs;                     // of a unit: 4 · kPairs / 4
  static constexpr int kInputs = 16 * kFragments;               // of a unit
  static constexpr int kLevels = 1 << (bits - 1);
  static constexpr int kApart = bits == 1 ? 8 : 16;

  static constexpr __host__ __device__ Place place(int pair) {
    if (bits == 1) return {0, pair % 8 + pair / 8 * 16, 0, 0};
    if (bits == 2) return {0, 15 - pair, 0, 7 - pair};           // one shift for both in bfloat16
    if (bits == 3) return {0, 15 - pair, 1 + pair / 8, 14 - pair % 8 * 2};
    return {0, pair < 3 ? 15 - pair : 0, 0, pair == 0 ? 7 : pair == 1 ? 10 : pair == 2 ? 4 : 1};
  }

  // The first weight of a lane's pair: its row in the tile, g aside, and its input in the unit.
  struct First {
    int row, k;
  };
  static constexpr __host__ __device__ First first(int group, int pair, int t) {
    if (bits == 1) return {pair / 8 * 8, 64 * group + pair % 2 * 32 + pair % 8 / 2 * 8 + 2 * t};
    const int of_unit = group * kPairs + pair, f = of_unit / 4, i = of_unit % 4;
    return {i % 2 * 8, f / 2 * 32 + t * 8 + f % 2 * 4 + i / 2 * 2};
  }
  // The pair of register i of fragment f of lane t: the quad's lane that has it, and its number.
  static constexpr __host__ __device__ int owner(int f, int i, int t) {
    return bits == 1 ? f % 2 * 2 + i / 2 : t;
  }
  static constexpr __host__ __device__ int pair(int f, int i, int t) {
    return bits == 1 ? i % 2 * 8 + t * 2 + f / 2 % 2 : f * 4 % kPairs + i;
  }

  static int64_t units(int64_t k) { return (k + kInputs - 1) / kInputs; }
  static int64_t bytes(int64_t n, int64_t k) { return (n + 15) / 16 * units(k) * kLoads * 512; }
};

// Bytes of a repacked weight [n, k], bits 1 to 4.
inline int64_t repacked_bytes(int bits, int64_t n, int64_t k) {
  return bits == 1   ? Fragments<1>::bytes(n, k)
         : bits == 2 ? Fragments<2>::bytes(n, k)
         : bits == 3 ? Fragments<3>::bytes(n, k)
                     : Fragments<4>::bytes(n, k);
}

constexpr int kOrAfterAnd = (0xf0 & 0xcc) | 0xaa;  // (a & b) | c

// Bits of a word moved from one place to another; the caller masks what came along.
template <int from, int to>
BLAQ_DEVICE uint32_t moved(uint32_t word) {
  if constexpr (to >= from) {
    return word << (to - from);
  } else {
    return word >> (from - to);
  }
}

// Metadata of the sparse product from a word of 1-bit weights: the even bits, or the odd ones.
template <bool odd>
BLAQ_DEVICE uint32_t choices_of(uint32_t word) {
  return lop3<kOrAfterAnd>(odd ? word >> 1 : word, 0x55555555, 0x88888888);
}

// (x, -x) of one half of a register, for those choices: one multiplication.
template <typename Type, bool high>
BLAQ_DEVICE uint32_t either_sign(uint32_t two) {
#if defined(__CUDACC__)
  constexpr uint32_t kOne = Type::kOne, kSigns = (kOne | 0x8000) << 16 | kOne;
  uint16_t x;
  uint32_t y;
  if constexpr (high) {
    asm("{.reg .b16 low; mov.b32 {low, %0}, %1;}" : "=h"(x) : "r"(two));
  } else {
    asm("{.reg .b16 high; mov.b32 {%0, high}, %1;}" : "=h"(x) : "r"(two));
  }
  if constexpr (Type::kOne == 0x3c00) {
    asm("{.reg .b32 xx; mov.b32 xx, {%1, %1}; mul.f16x2 %0, xx, %2;}"
        : "=r"(y) : "h"(x), "r"(kSigns));
  } else {  // sm_80 has no product of bfloat16 without a sum
    asm("{.reg .b32 xx; mov.b32 xx, {%1, %1}; fma.rn.bf16x2 %0, xx, %2, %3;}"
        : "=r"(y) : "h"(x), "r"(kSigns), "r"(0x80008000));
  }
  return y;
#else
  const uint32_t x = two >> 16 * high & 0xffff;
  return x | (x ^ 0x8000) << 16;
#endif
}

// Two weights of 16 bits, powers of two 2^(index + 1 − levels) with a sign, by mask and or: the
// index is the exponent's low bits. `pair` is of the group whose words these are; 2 to 4 bits.
template <int bits, typename Type, int pair>
BLAQ_DEVICE uint32_t powers_of(const uint32_t* words) {
  static_assert(bits > 1);
  using F = Fragments<bits>;
  constexpr Place place = F::place(pair);
  constexpr uint32_t kSigns = 0x80008000;
  constexpr uint32_t kIndex = (F::kLevels - 1u) << Type::kMantissa, kIndices = kIndex << 16 | kIndex;
  constexpr uint32_t kLowest = Type::kOne - ((F::kLevels - 1) << Type::kMantissa);
  constexpr uint32_t kBase = kLowest << 16 | kLowest;
  const uint32_t sign = moved<place.sign_bit, 15>(words[place.sign_word]);
  constexpr bool together = place.sign_word == place.index_word &&
                            15 - place.sign_bit == Type::kMantissa - place.index_bit;
  if constexpr (together) return lop3<kOrAfterAnd>(sign, kSigns | kIndices, kBase);
  const uint32_t index = moved<place.index_bit, Type::kMantissa>(words[place.index_word]);
  return lop3<kOrAfterAnd>(sign, kSigns, lop3<kOrAfterAnd>(index, kIndices, kBase));
}

// Code of one weight of a pair, for repacking and for the exact path; `half` is 0 or 1.
template <int bits>
BLAQ_DEVICE uint32_t code_of(const uint32_t* words, int pair, int half) {
  const Place place = Fragments<bits>::place(pair);
  uint32_t code = words[place.sign_word] >> (place.sign_bit + Fragments<bits>::kApart * half) & 1;
  if constexpr (bits > 1) {
    uint32_t index = words[0];
#pragma unroll
    for (int i = 1; i < Fragments<bits>::kWords; ++i) index = i == place.index_word ? words[i] : index;
    index >>= place.index_bit + 16 * half;
    code = code << (bits - 1) | (index & (Fragments<bits>::kLevels - 1));
  }
  return code;
}

}  // namespace blaq
