// 64 channels of 16 outputs, one plane's words[tap] after another's, to registers of packed_conv_int8.h; see
// foreach_isa.h.

// Those from `channel` on of `channels`; a tap has `registers`.
template <int BITS>
void store_taps(const TapWords* words, int64_t taps, int64_t channel, int64_t channels, int64_t registers,
                uint32_t* out) {
  const int64_t all = (channels + 31) / 32;
  for (int64_t tap = 0; tap < taps; ++tap, ++words, out += registers * 16) {
    for (int64_t first = channel; first < std::min(channel + 64, channels); first += 32) {
      const int shift = static_cast<int>(first % 64);
      uint32_t* to = out + first / 32 * (BITS > 2 ? 64 : 16);
      // The second sign of a 2-bit weight is the other one where the magnitude is the lower.
      const uint32_t some = channels - first >= 32 ? ~0u : (1u << (channels - first)) - 1;
      for (int lane = 0; lane < 16; ++lane) {
        uint32_t plane[4] = {};
        for (int b = 0; b < BITS; ++b) plane[b] = static_cast<uint32_t>(words[b * taps].of_row[lane] >> shift);
        if constexpr (BITS > 2) {
          interleave_planes(plane);
          for (int p = 0; p < 4; ++p) to[p * 16 + lane] = plane[p];
        } else {
          to[lane] = plane[BITS - 1];
          if (BITS == 2) to[all * 16 + lane] = (plane[1] ^ ~plane[0]) & some;
        }
      }
    }
  }
}
