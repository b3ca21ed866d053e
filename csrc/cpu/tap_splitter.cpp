#include "cpu/tap_splitter.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#define BLAQ_KERNEL_FILE "cpu/tap_splitter_kernel.h"
#include "cpu/foreach_isa.h"

namespace blaq {
namespace {

bool has_byte_moves() {
#if defined(__x86_64__)
  static const bool here = __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("gfni");
  return here && capability() == Capability::avx512;
#else
  return false;
#endif
}

}  // namespace

TapSplitter::TapSplitter(int64_t taps, int64_t in_features)
    : taps_(taps), in_features_(in_features), turn_(taps / std::gcd(taps, int64_t{64})), edge_(taps * 16) {
  if (taps == 1 || !has_byte_moves()) return;
  lanes_.resize(taps * taps);
  order_.resize(taps * 64);
  positions_.resize(taps);
  for (int64_t at = 0; at < 64 * taps; ++at) {
    const int64_t tap = at % taps, channel = at / taps, i = at / 64, lane = (at - i / turn_) % 64;
    lanes_[tap * taps + i] |= uint64_t{1} << lane;
    order_[tap * 64 + 63 - channel] = static_cast<uint8_t>(lane);
  }
}

void TapSplitter::split(const uint8_t* row, int64_t rows, int64_t block, TapWords* words) {
  const int64_t stride = (in_features_ + 7) / 8, left = in_features_ - block * 64 * taps_;
  row += block * 8 * taps_;
  if (rows >= 16 && left >= 64 * taps_) {
    for (int64_t at = 0; at < 8 * taps_; at += 64) {  // of the rows that come next
      for (int64_t lane = 16; lane < 32; ++lane) __builtin_prefetch(row + lane * stride + at, 0, 2);
    }
    return split_whole(row, stride, words);
  }
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
    for (int i = 0; i < 32; ++i) std::memcpy(&words->half[i / 16][i % 16], row + i % 16 * stride + i / 16 * 4, 4);
    return;
  }
#if defined(__x86_64__)
  if (has_byte_moves()) {
    if (taps_ == 9) return avx512::split_bytes_of<9>(row, stride, order_.data(), words);
    return avx512::split_bytes(row, stride, taps_, turn_, lanes_.data(), order_.data(), positions_.data(), words);
  }
#endif
  BLAQ_VARIANT(split_bits)(row, stride, taps_, words);
}

}  // namespace blaq
