// Signs to bits, 64 to a word, the first lowest: 1 is negative. -0 and NaN count as positive. See
// foreach_isa.h; after lanes.h and convert_kernel.h.

// Signs of a run of numbers; bits past the last are 0.
template <typename T>
void sign_bits(const T* in, int64_t count, uint64_t* words) {
  for (int64_t i = 0; i < count; i += 64) {
    const int64_t some = std::min<int64_t>(64, count - i);
    uint64_t word = 0;
    if constexpr (std::is_same_v<T, double>) {  // a float would lose the smallest
      for (int64_t j = 0; j < some; ++j) word |= static_cast<uint64_t>(in[i + j] < 0) << j;
    } else {
      float wide[64];
      const float* from = wide;
      if (some < 64) std::fill(wide + some, wide + 64, 0.0f);
      if (std::is_same_v<T, float> && some == 64) {
        from = reinterpret_cast<const float*>(in + i);
      } else {
        widen<T, float>(in + i, wide, some);
      }
      for (int j = 0; j < 64; j += kLanes) {
        word |= static_cast<uint64_t>(negative_lanes(load(from + j))) << j;
      }
    }
    words[i / 64] = word;
  }
}

// Signs of `channels` planes of numbers at `count` neighbouring places, at most 64 of each: the words of
// a place are `step` apart. A place is a lane, so nothing is transposed.
template <typename T>
void channel_bits(const T* in, int64_t channels, int64_t plane, int64_t count, uint64_t* words,
                  int64_t step) {
  uint32_t half[2][64] = {};
  for (int64_t c = 0; c < channels; ++c) {
    const T* from = in + c * plane;
    uint32_t* to = half[c / 32];
    if constexpr (sizeof(T) == 2) {  // between the least negative number and -Inf
      constexpr uint16_t kLeast = 0x8001, kInf = std::is_same_v<T, Half> ? 0xfc00 : 0xff80;
      for (int64_t i = 0; i < count; ++i) {
        const uint16_t above = static_cast<uint16_t>(from[i].x - kLeast);
        to[i] |= static_cast<uint32_t>(above <= kInf - kLeast) << (c % 32);
      }
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] |= static_cast<uint32_t>(from[i] < 0) << (c % 32);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    words[i * step] = half[0][i] | static_cast<uint64_t>(half[1][i]) << 32;
  }
}
