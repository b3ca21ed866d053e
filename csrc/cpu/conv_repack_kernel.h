// Bits of a convolution's weight, which are in the order channel, tap, to the order tap, channel.

// The bits of x where the mask has ones, side by side.
#if BLAQ_ISA_AVX2 || BLAQ_ISA_AVX512
#define BLAQ_BITS [[gnu::target("bmi2")]]
BLAQ_BITS inline uint64_t extract_bits(uint64_t x, uint64_t mask) { return _pext_u64(x, mask); }
#else
#define BLAQ_BITS
inline uint64_t extract_bits(uint64_t x, uint64_t mask) {
  uint64_t bits = 0;
  for (int i = 0; mask; ++i, mask &= mask - 1) bits |= (x >> std::countr_zero(mask) & 1) << i;
  return bits;
}
#endif

// Which of 64 channels have a 1 at a tap, of taps · 64 inputs.
BLAQ_BITS inline uint64_t gather_tap(const uint64_t* inputs, int64_t tap, const Gathering& gathering) {
  const int64_t taps = gathering.taps;
  uint64_t bits = 0;
  for (int64_t i = 0; i < taps; ++i) {
    const auto& part = gathering.parts[tap * taps + i];
    bits |= extract_bits(inputs[i], part.mask) << part.channel;
  }
  return bits;
}

// The dwords of one output: see ConvRepacked. `row` holds a plane's bits after another's, each filled up
// with zeros to whole blocks of 64 channels.
BLAQ_BITS inline void repack_taps(const uint64_t* row, int bits, int64_t channels, const Gathering& gathering,
                                  int64_t words_of_tap, uint32_t* out) {
  const int64_t taps = gathering.taps, words = (channels + 31) / 32, step = (channels + 63) / 64 * taps;
  for (int64_t tap = 0; tap < taps; ++tap, out += words_of_tap * 16) {
    for (int64_t block = 0; block < words; block += 2) {
      uint64_t plane[4] = {};
      for (int b = 0; b < bits; ++b) plane[b] = gather_tap(row + b * step + block / 2 * taps, tap, gathering);
      for (int64_t w = block; w < std::min(block + 2, words); ++w) {
        uint32_t digits[4];
        for (int b = 0; b < 4; ++b) digits[b] = static_cast<uint32_t>(plane[b] >> (w % 2 * 32));
        if (bits <= 2) {
          const uint32_t sign = digits[bits - 1];
          out[w * 16] = sign;
          // The second sign of a 2-bit weight is the other one where the magnitude is the lower.
          const int64_t left = channels - w * 32;
          const uint32_t some = left >= 32 ? ~0u : (1u << left) - 1;
          if (bits == 2) out[(words + w) * 16] = (sign ^ ~digits[0]) & some;
        } else {
          interleave_planes(digits);
          for (int p = 0; p < 4; ++p) out[(w * 4 + p) * 16] = digits[p];
        }
      }
    }
  }
}

#undef BLAQ_BITS
