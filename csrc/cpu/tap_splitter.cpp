#include "cpu/tap_splitter.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "cpu/capability.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define BLAQ_BYTE_MOVES [[gnu::target("avx512f,avx512bw,avx512vbmi,gfni")]]
#endif

namespace blaq {
namespace {

void split_bits(const uint8_t* row, int64_t stride, int64_t taps, TapWords* words) {
  std::fill_n(words, taps, TapWords{});
  for (int lane = 0; lane < 16; ++lane, row += stride) {
    for (int64_t at = 0; at < 64 * taps; ++at) {
      words[at % taps].of_row[lane] |= uint64_t{row[at / 8] >> at % 8 & 1u} << at / taps;
    }
  }
}

#if defined(__x86_64__)
bool has_byte_moves() {
  static const bool here = __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("gfni");
  return here && capability() == Capability::avx512;
}

// Byte 8i + 7 - j of the result is byte 8j + i.
BLAQ_BYTE_MOVES inline __m512i transpose_bytes(__m512i x) {
  const auto from = [](uint64_t i) { return static_cast<int64_t>(0x0008101820283038 + 0x0101010101010101 * i); };
  return _mm512_permutexvar_epi8(
      _mm512_setr_epi64(from(0), from(1), from(2), from(3), from(4), from(5), from(6), from(7)), x);
}

// Bit j of byte 8i + m of the result is bit m of byte 8i + 7 - j.
BLAQ_BYTE_MOVES inline __m512i transpose_bits(__m512i x) {
  return _mm512_gf2p8affine_epi64_epi8(_mm512_set1_epi64(0x8040201008040201), x, 0);
}

// A word of each of 8 rows.
BLAQ_BYTE_MOVES inline __m512i load_rows(const uint8_t* row, int64_t stride) {
  __m512i x = _mm512_setzero_si512();
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i, row += stride) {
    x = _mm512_mask_broadcastq_epi64(x, 1 << i, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row)));
  }
  return x;
}

// TAPS: how many, or 0 where it is no constant.
template <int TAPS>
BLAQ_BYTE_MOVES void split_bytes(const uint8_t* row, int64_t stride, int64_t some, int64_t turn,
                                 const uint64_t* lanes, const uint8_t* order, __m512i* positions, __m512i* words) {
  const int64_t taps = TAPS > 0 ? TAPS : some;
  alignas(64) uint8_t ascending[64];
  std::iota(ascending, ascending + 64, uint8_t{0});
  __m512i turned = _mm512_load_si512(ascending);
  for (int64_t i = 0, next = turn; i < taps; ++i) {
    if (i == next) {
      turned = _mm512_add_epi8(turned, _mm512_set1_epi8(1));
      next += turn;
    }
    for (int half = 0; half < 2; ++half) {
      const __m512i rows = load_rows(row + half * 8 * stride + i * 8, stride);
      positions[2 * i + half] = _mm512_permutexvar_epi8(turned, transpose_bits(transpose_bytes(rows)));
    }
  }
  for (int64_t tap = 0; tap < taps; ++tap, lanes += taps, order += 64) {
    __m512i low = positions[0], high = positions[1];
    for (int64_t i = 1; i < taps; ++i) {
      low = _mm512_mask_mov_epi8(low, lanes[i], positions[2 * i]);
      high = _mm512_mask_mov_epi8(high, lanes[i], positions[2 * i + 1]);
    }
    const __m512i channels = _mm512_loadu_si512(order);
    words[2 * tap] = transpose_bytes(transpose_bits(_mm512_permutexvar_epi8(channels, low)));
    words[2 * tap + 1] = transpose_bytes(transpose_bits(_mm512_permutexvar_epi8(channels, high)));
  }
}
#endif

}  // namespace

TapSplitter::TapSplitter(int64_t taps, int64_t in_features)
    : taps_(taps),
      in_features_(in_features),
      turn_(taps / std::gcd(taps, int64_t{64})),
      lanes_(taps * taps),
      order_(taps * 64),
      positions_(taps),
      edge_(taps * 16) {
  for (int64_t at = 0; at < 64 * taps; ++at) {
    const int64_t tap = at % taps, channel = at / taps, i = at / 64, lane = (at - i / turn_) % 64;
    lanes_[tap * taps + i] |= uint64_t{1} << lane;
    order_[tap * 64 + 63 - channel] = static_cast<uint8_t>(lane);
  }
}

void TapSplitter::split(const uint8_t* row, int64_t rows, int64_t block, TapWords* words) {
  const int64_t stride = (in_features_ + 7) / 8, left = in_features_ - block * 64 * taps_;
  row += block * 8 * taps_;
  if (rows >= 16 && left >= 64 * taps_) return split_whole(row, stride, words);
  const int64_t bits = std::min(left, 64 * taps_);
  std::fill(edge_.begin(), edge_.end(), uint64_t{0});
  for (int64_t lane = 0; lane < 16; ++lane) {
    uint64_t* to = &edge_[lane * taps_];
    std::memcpy(to, row + std::min(lane, rows - 1) * stride, (bits + 7) / 8);
    if (bits % 64) to[bits / 64] &= (uint64_t{1} << bits % 64) - 1;
  }
  split_whole(reinterpret_cast<const uint8_t*>(edge_.data()), taps_ * 8, words);
}

void TapSplitter::split_whole(const uint8_t* row, int64_t stride, TapWords* words) {
  if (taps_ == 1) {
    for (int64_t lane = 0; lane < 16; ++lane) std::memcpy(&words->of_row[lane], row + lane * stride, 8);
    return;
  }
#if defined(__x86_64__)
  if (has_byte_moves()) {
    const auto run = taps_ == 9 ? split_bytes<9> : split_bytes<0>;
    return run(row, stride, taps_, turn_, lanes_.data(), order_.data(),
               reinterpret_cast<__m512i*>(positions_.data()), reinterpret_cast<__m512i*>(words));
  }
#endif
  split_bits(row, stride, taps_, words);
}

}  // namespace blaq
