// Registers of bytes for packed_int8_bytes.h: look-ups in 16 entries, sums of them, and products of levels
// and inputs.

#if BLAQ_ISA_AVX2
using Bytes = __m256i;
constexpr int kBytes = 32;

inline Bytes load_bytes_of(const uint8_t* p) { return _mm256_load_si256((const __m256i*)p); }
inline Bytes load_table(const uint8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)p));
}
inline Bytes look_up(Bytes table, Bytes index) { return _mm256_shuffle_epi8(table, index); }
inline Bytes low_digits(Bytes x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
inline Bytes high_digits(Bytes x) { return low_digits(_mm256_srli_epi16(x, 4)); }

// The neighbours BY lanes away, within four.
template <int BY>
inline Floats swap_pairs(Floats x) {
  return (Floats)_mm256_permute_ps((__m256)x, BY == 1 ? 0xB1 : 0x4E);
}

// Registers of 16 lanes of 4 bytes, two of them, to byte j of every lane: lanes 0-3, 8-11, 16-19, 24-27, then
// 4-7 and so on.
inline void load_planes(const uint8_t* first, const uint8_t* second, Bytes (&plane)[4]) {
  const __m256i by_plane = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m256i a = look_up(load_bytes_of(first), by_plane), b = look_up(load_bytes_of(first + 32), by_plane);
  const __m256i c = look_up(load_bytes_of(second), by_plane), d = look_up(load_bytes_of(second + 32), by_plane);
  const __m256i ab = _mm256_unpacklo_epi32(a, b), cd = _mm256_unpacklo_epi32(c, d);
  const __m256i more_ab = _mm256_unpackhi_epi32(a, b), more_cd = _mm256_unpackhi_epi32(c, d);
  plane[0] = _mm256_unpacklo_epi64(ab, cd);
  plane[1] = _mm256_unpackhi_epi64(ab, cd);
  plane[2] = _mm256_unpacklo_epi64(more_ab, more_cd);
  plane[3] = _mm256_unpackhi_epi64(more_ab, more_cd);
}

// Sums of bytes, up to 257 of them: neighbouring bytes as one number of 16 bits, in which the even one's sum
// is what the odd one's leaves modulo 2^16. Two additions and a shift; unpacking would take more.
struct Sums {
  __m256i all, odd;

  void add(Bytes x) {
    all = _mm256_add_epi16(all, x);
    settle(all);
    odd = _mm256_add_epi16(odd, _mm256_srli_epi16(x, 8));
    settle(odd);
  }
  void outputs(Ints (&out)[4]) const {  // in the order that load_planes has undone
    const __m256i even = _mm256_sub_epi16(all, _mm256_slli_epi16(odd, 8));
    const __m256i halves[2] = {_mm256_permute4x64_epi64(_mm256_unpacklo_epi16(even, odd), 0xD8),
                               _mm256_permute4x64_epi64(_mm256_unpackhi_epi16(even, odd), 0xD8)};
    for (int i = 0; i < 2; ++i) {
      out[2 * i] = (Ints)_mm256_cvtepu16_epi32(_mm256_castsi256_si128(halves[i]));
      out[2 * i + 1] = (Ints)_mm256_cvtepu16_epi32(_mm256_extracti128_si256(halves[i], 1));
    }
  }
};

// Levels as u8 level + zero. vpmaddubsw adds two products of u8 and s8 in 16 bits and must not saturate:
// - narrow levels, at most 15 · unit: 4 sums of two are at most 4 · 2 · 30 · 127 = 30480;
// - others reach 255, and inputs are held to |x|, |y|, |x + y| <= 128: at most 255 · 128 = 32640.
struct Levels {
  alignas(16) uint8_t level[16], rest[16];
  float unit;
  int zero;
  bool wide;

  Levels(const float* levels, int bits, Accuracy accuracy) {
    const bool high = accuracy == Accuracy::high;
    float factor = level_factor(levels, bits);
    const bool narrow = !high && factor >= 1 && factor <= 15;
    if (factor == 0) factor = nearest_factor(levels, bits);
    wide = high ? factor == 128 : !narrow;
    zero = narrow ? static_cast<int>(factor) : 128;
    // Without the rest the highest level is 127: a unit between shares the error among all levels.
    unit = factor == 128 && !high ? 1 / 127.5f : 1.0f / factor;
    for (int c = 0; c < 16; ++c) {
      const int x = c < 1 << bits ? static_cast<int>(std::nearbyint(levels[c] * factor)) : 0;
      level[c] = static_cast<uint8_t>(std::min(x, 127) + zero);
      rest[c] = x == 128;
    }
  }
};

constexpr bool kTwoForms = true;
inline Levels levels_of(const PackedMatrix& weight, Accuracy accuracy) {
  return Levels(weight.levels, weight.bits, accuracy);
}
template <int DIGITS>
inline float unit_of(const Levels& levels) {
  return levels.unit;
}

template <int DIGITS>
constexpr float kMostInput = DIGITS == 1 ? 127.0f : 32700.0f;

// Of two 8-bit inputs of one product the sum too. A product's two inputs are 8 apart.
template <int DIGITS>
inline float largest_input(const float* x, int count, const Levels& levels) {
  Ints most = {};
  const bool pairs = DIGITS == 1 && levels.wide;
  for (int i = 0; i < count; i += 16) {
    const Floats a = load(x + i), b = load(x + i + 8);
    most = larger_bits(most, larger_bits(magnitude_bits(a), magnitude_bits(b)));
    if (pairs) most = larger_bits(most, magnitude_bits(a + b));
  }
  return largest_lane(most);
}

// 32 inputs: of the digits (p, half) those of 4 bytes, or first the even two, then the odd two in 16 bits.
template <int DIGITS>
inline void put_inputs(const int32_t* x, uint8_t* out) {
  using Input = std::conditional_t<DIGITS == 1, int8_t, int16_t>;
  Input* to = reinterpret_cast<Input*>(out);
#pragma GCC unroll 4
  for (int p = 0; p < 4; ++p) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const int digit = DIGITS == 1 ? j : j % 2 * 2 + j / 2;
        *to++ = static_cast<Input>(x[4 * (2 * digit + half) + p]);
      }
    }
  }
}

inline __m256i broadcast_four(const uint8_t* at) {
  int32_t four;
  std::memcpy(&four, at, 4);
  return _mm256_set1_epi32(four);
}

template <int DIGITS, bool WIDE>
struct Products;

template <bool WIDE>
struct Products<1, WIDE> {
  static constexpr int kRun = WIDE ? 2 : 4;
  using Register = __m256i;
  __m256i table;

  explicit Products(const Levels& levels) : table(load_table(levels.level)) {}
  Register levels(Bytes digits) const { return look_up(table, digits); }
  Ints add(const Register (&level)[kRun], const uint8_t* x, Ints sum) const {
    const __m256i ones = _mm256_set1_epi16(1);
    const auto pairs = [&](int i) { return _mm256_maddubs_epi16(level[i], broadcast_four(x + 4 * i)); };
    if constexpr (WIDE) {
      return sum + (Ints)_mm256_madd_epi16(pairs(0), ones) + (Ints)_mm256_madd_epi16(pairs(1), ones);
    } else {
      const __m256i both = _mm256_add_epi16(pairs(0), pairs(1)), more = _mm256_add_epi16(pairs(2), pairs(3));
      return sum + (Ints)_mm256_madd_epi16(_mm256_add_epi16(both, more), ones);
    }
  }
};

// 16-bit inputs, so 16-bit levels: even bytes, odd bytes. A rest of 1 is what u8 cannot hold of 256. Sums
// may wrap with the zero in them and are right without it.
template <bool WIDE>
struct Products<2, WIDE> {
  static constexpr int kRun = 2;
  struct Register {
    __m256i even, odd;
  };
  __m256i table, rest;

  explicit Products(const Levels& levels) : table(load_table(levels.level)), rest(load_table(levels.rest)) {}
  Register levels(Bytes digits) const {
    const auto split = [](__m256i x) {
      return Register{_mm256_and_si256(x, _mm256_set1_epi16(255)), _mm256_srli_epi16(x, 8)};
    };
    Register level = split(look_up(table, digits));
    if (WIDE) {
      const Register more = split(look_up(rest, digits));
      level.even = _mm256_add_epi16(level.even, more.even);
      level.odd = _mm256_add_epi16(level.odd, more.odd);
    }
    return level;
  }
  Ints add(const Register (&level)[2], const uint8_t* x, Ints sum) const {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      sum += (Ints)_mm256_madd_epi16(level[i].even, broadcast_four(x + 8 * i));
      sum += (Ints)_mm256_madd_epi16(level[i].odd, broadcast_four(x + 8 * i + 4));
    }
    return sum;
  }
};
#else
using Bytes = uint8x16_t;
constexpr int kBytes = 16;

inline Bytes load_bytes_of(const uint8_t* p) { return vld1q_u8(p); }
inline Bytes load_table(const uint8_t* p) { return vld1q_u8(p); }
inline Bytes look_up(Bytes table, Bytes index) { return vqtbl1q_u8(table, index); }
inline Bytes low_digits(Bytes x) { return vandq_u8(x, vdupq_n_u8(15)); }
inline Bytes high_digits(Bytes x) { return vshrq_n_u8(x, 4); }

// The neighbours BY lanes away.
template <int BY>
inline Floats swap_pairs(Floats x) {
  const float32x4_t y = (float32x4_t)x;
  return (Floats)(BY == 1 ? vrev64q_f32(y) : vextq_f32(y, y, 2));
}

// Byte j of 16 lanes of 4 bytes.
inline void load_planes(const uint8_t* first, const uint8_t*, Bytes (&plane)[4]) {
  const uint8x16x4_t all = vld4q_u8(first);
  for (int j = 0; j < 4; ++j) plane[j] = all.val[j];
}

struct Sums {
  uint16x8_t low, high;

  void add(Bytes x) {
    low = vaddw_u8(low, vget_low_u8(x));
    settle(low);
    high = vaddw_high_u8(high, x);
    settle(high);
  }
  void outputs(Ints (&out)[4]) const {
    out[0] = (Ints)vmovl_u16(vget_low_u16(low));
    out[1] = (Ints)vmovl_high_u16(low);
    out[2] = (Ints)vmovl_u16(vget_low_u16(high));
    out[3] = (Ints)vmovl_high_u16(high);
  }
};

// Levels as s8. What high accuracy lacks of a level of 128 is the rest; without it the highest is 127, and a
// unit between shares the error among all levels.
struct Levels {
  alignas(16) uint8_t level[16], rest[16];
  float unit;
  static constexpr int zero = 0;
  bool wide;

  Levels(const float* levels, int bits, Accuracy accuracy) {
    float factor = level_factor(levels, bits);
    if (factor == 0) factor = nearest_factor(levels, bits);
    wide = factor == 128 && accuracy == Accuracy::high;
    unit = factor == 128 && !wide ? 1 / 127.5f : 1.0f / factor;
    for (int c = 0; c < 16; ++c) {
      const int x = c < 1 << bits ? static_cast<int>(std::nearbyint(levels[c] * factor)) : 0;
      level[c] = static_cast<uint8_t>(std::min(x, 127));
      rest[c] = x == 128;
    }
  }
};

constexpr bool kTwoForms = true;
inline Levels levels_of(const PackedMatrix& weight, Accuracy accuracy) {
  return Levels(weight.levels, weight.bits, accuracy);
}
template <int DIGITS>
inline float unit_of(const Levels& levels) {
  return levels.unit;
}

template <int DIGITS>
constexpr float kMostInput = DIGITS == 1 ? 127.0f : 32512.0f;  // 256 · 127: two signed digits

template <int DIGITS>
inline float largest_input(const float* x, int count, const Levels&) {
  Ints most = {};
  for (int i = 0; i < count; i += kLanes) most = larger_bits(most, magnitude_bits(load(x + i)));
  return largest_lane(most);
}

// 32 inputs: of the digits (p, half) those of 4 bytes; of 16-bit inputs first their high bytes.
template <int DIGITS>
inline void put_inputs(const int32_t* x, uint8_t* out) {
  for (int p = 0; p < 4; ++p) {
    for (int half = 0; half < 2; ++half, out += 4 * DIGITS) {
      for (int j = 0; j < 4; ++j) {
        const int32_t input = x[4 * (2 * j + half) + p];
        if (DIGITS == 2) out[j] = static_cast<uint8_t>((input + 128) >> 8);
        out[4 * (DIGITS - 1) + j] = static_cast<uint8_t>(input);
      }
    }
  }
}

inline int8x16_t broadcast_four(const uint8_t* at) {
  int32_t four;
  std::memcpy(&four, at, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

// sum + the four products of each 32 bits.
inline int32x4_t dot(int32x4_t sum, int8x16_t a, int8x16_t b) {
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(sum, a, b);
#else
  const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
  return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
}

template <int DIGITS, bool WIDE>
struct Products {
  static constexpr int kRun = 2;
  struct Register {
    int8x16_t level, rest;
  };
  Bytes table, rest;

  explicit Products(const Levels& levels) : table(vld1q_u8(levels.level)), rest(vld1q_u8(levels.rest)) {}
  Register levels(Bytes digits) const {
    Register out{vreinterpretq_s8_u8(look_up(table, digits)), vdupq_n_s8(0)};
    if (WIDE) out.rest = vreinterpretq_s8_u8(look_up(rest, digits));
    return out;
  }
  Ints add(const Register (&level)[2], const uint8_t* x, Ints sum) const {
    const auto digit = [&](int32x4_t total, int at) {
      for (int i = 0; i < 2; ++i) {
        const int8x16_t input = broadcast_four(x + 4 * (DIGITS * i + at));
        total = dot(total, level[i].level, input);
        if (WIDE) total = dot(total, level[i].rest, input);
      }
      return total;
    };
    if (DIGITS == 1) return (Ints)digit((int32x4_t)sum, 0);
    return (Ints)vaddq_s32(digit((int32x4_t)sum, 1), vshlq_n_s32(digit(vdupq_n_s32(0), 0), 8));
  }
};
#endif
