// Bits of a convolution's weight, which are in the order channel, tap, to the order tap, channel.
#pragma once

#include <cstdint>
#include <vector>

namespace blaq {

// The bits of 64 channels in 16 rows: those of the first 32, then the others.
struct alignas(64) TapWords {
  uint32_t half[2][16];
};

// 64 channels of 16 rows at a time, which are `taps` words of 64 bits in each. With AVX-512 VBMI and GFNI the bits
// of 8 rows at a position become a byte, and bytes are moved: 64 positions are a register, and registers are turned
// so that every lane meets each tap once. A tap is then a blend of all registers, and one permutation.
class TapSplitter {
 public:
  TapSplitter(int64_t taps, int64_t in_features);

  // words[tap]: the channels from 64 · block on of a plane's `rows` rows. Past the last row it is read again, past
  // the last channel zeros.
  void split(const uint8_t* row, int64_t rows, int64_t block, TapWords* words);

 private:
  void split_whole(const uint8_t* row, int64_t stride, TapWords* words);

  int64_t taps_, in_features_;
  int64_t turn_;                     // registers after which lanes meet the same taps again
  std::vector<uint64_t> lanes_;      // [tap][register], a bit for each lane
  std::vector<uint8_t> order_;       // [tap][64], lanes of the last channel to the first
  std::vector<TapWords> positions_;  // [taps], 64 positions of 8 rows and of 8 more
  std::vector<uint64_t> edge_;       // [16][taps]
};

}  // namespace blaq
