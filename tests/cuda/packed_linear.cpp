// repack and packed_linear, whole, as csrc/cuda/packed_linear.cu calls them; and the decoding of
// every word.
#include "cuda/packed_linear_kernel.h"
#include "cuda/repack_kernel.h"

using namespace blaq;

BLAQ_TEST_EXPORT const char* repack_planes(const uint8_t* planes, int64_t bits, int64_t n,
                                           int64_t row_bytes, uint32_t* out) {
  return emulate::message_of([&] {
    emulate::machine.order = 0;
    repack(planes, bits, n, row_bytes, out, nullptr);
  });
}

BLAQ_TEST_EXPORT const char* linear(const uint16_t* x, int64_t x_stride, const uint4* weight,
                                    const float* scale, const uint16_t* bias, uint16_t* out, int64_t m,
                                    int64_t n, int64_t k, int64_t bits, int64_t scale_stride,
                                    int64_t group_size, int64_t powers, const float* levels,
                                    int64_t bf16, int64_t multiprocessors, int64_t order) {
  return emulate::message_of([&] {
    emulate::machine.order = order;
    PackedLinear p = {};
    p.x = x, p.weight = weight, p.scale = scale, p.bias = bias, p.out = out;
    p.x_stride = x_stride, p.m = m, p.n = n, p.k = k, p.width = (k + 7) / 8 * 8;
    p.scale_stride = scale_stride, p.group_size = group_size;
    std::copy_n(levels, 1 << (bits - 1), p.level);
    const auto run = bf16 ? packed_linear<Bf16> : packed_linear<Fp16>;
    run(p, bits, powers, multiprocessors, nullptr);
  });
}

// Of 1 bit: what the metadata of sparse products choose of (1, -1), for both weights of a pair.
template <typename Type>
uint32_t chosen_pair(uint32_t word, int pair) {
  const uint32_t choices = pair % 2 ? choices_of<true>(word) : choices_of<false>(word);
  const uint32_t ones = Type::kOne << 16 | Type::kOne;
  uint32_t two = 0;
  for (int j = 0; j < 2; ++j) {
    const int t = pair % 8 / 2, choice = choices >> (pair / 8 * 16 + 8 * j + 2 * t) & 3;
    if (choice / 2 != t % 2) throw std::runtime_error("a choice must be of the lane's own input");
    const uint32_t either = j ? either_sign<Type, true>(ones) : either_sign<Type, false>(ones);
    two |= (either >> 16 * (choice % 2) & 0xffff) << 16 * j;
  }
  return two;
}

template <int bits, typename Type, int pair = 0>
void decode_pairs(const uint32_t* words, uint32_t* out) {
  if constexpr (bits == 1) {
    out[pair] = chosen_pair<Type>(words[0], pair);
  } else {
    out[pair] = powers_of<bits, Type, pair>(words);
  }
  if constexpr (pair + 1 < Fragments<bits>::kPairs) decode_pairs<bits, Type, pair + 1>(words, out);
}

// A word's pairs by bit tricks, and the codes of their weights by code_of: [pairs], [pairs, 2].
template <int bits, typename Type>
void decode_words(const uint32_t* words, int64_t count, uint32_t* out, uint32_t* codes) {
  using F = Fragments<bits>;
  for (int64_t i = 0; i < count; ++i) {
    decode_pairs<bits, Type>(words + i * F::kWords, out + i * F::kPairs);
    for (int j = 0; j < 2 * F::kPairs; ++j) {
      codes[i * 2 * F::kPairs + j] = code_of<bits>(words + i * F::kWords, j / 2, j % 2);
    }
  }
}

BLAQ_TEST_EXPORT const char* decode(int64_t bits, int64_t bf16, const uint32_t* words, int64_t count,
                                    uint32_t* out, uint32_t* codes) {
  return emulate::message_of([&] {
    if (bits == 1) (bf16 ? decode_words<1, Bf16> : decode_words<1, Fp16>)(words, count, out, codes);
    if (bits == 2) (bf16 ? decode_words<2, Bf16> : decode_words<2, Fp16>)(words, count, out, codes);
    if (bits == 3) (bf16 ? decode_words<3, Bf16> : decode_words<3, Fp16>)(words, count, out, codes);
    if (bits == 4) (bf16 ? decode_words<4, Bf16> : decode_words<4, Fp16>)(words, count, out, codes);
  });
}
