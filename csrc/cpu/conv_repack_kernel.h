// 64 channels of 16 outputs, one plane's words[tap] after another's, to registers of packed_conv_int8.h; see
// foreach_isa.h.
#include "cpu/lanes.h"

// Those from `channel` on of `channels`; a tap has `registers`.
template <int BITS>
void store_taps(const TapWords* words, int64_t taps, int64_t channel, int64_t channels, int64_t registers,
                uint32_t* out) {
  constexpr int kStep = BITS > 2 ? 4 : 1;  // registers of 32 channels that are neighbours
  const int halves = channels - channel > 32 ? 2 : 1;
  const int64_t second = (channels + 31) / 32 * 16, last = channels - channel - (halves - 1) * 32;
  const uint32_t some = last >= 32 ? ~0u : (1u << last) - 1;  // channels of the last half
  out += channel / 32 * kStep * 16;
  for (int64_t tap = 0; tap < taps; ++tap, ++words, out += registers * 16) {
    uint32_t* to = out;
    for (int half = 0; half < halves; ++half, to += kStep * 16) {
      for (int lane = 0; lane < 16; lane += kLanes) {
        const auto store = [&](int64_t at, Words x) { std::memcpy(to + at + lane, &x, sizeof x); };
        Words plane[4] = {};
        for (int b = 0; b < BITS; ++b) std::memcpy(&plane[b], &words[b * taps].half[half][lane], sizeof(Words));
        if constexpr (BITS > 2) interleave<4>(plane, 1);
        for (int p = 0; p < kStep; ++p) store(p * 16, plane[BITS == 2 ? 1 : p]);
        // The second sign of a 2-bit weight is the other one where the magnitude is the lower.
        if (BITS == 2) store(second, (plane[1] ^ ~plane[0]) & (half + 1 < halves ? ~0u : some));
      }
    }
  }
}
