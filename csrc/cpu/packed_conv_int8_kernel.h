// The inner loops of packed_conv_int8.cpp, which includes this file where AVX-512 with VBMI and VNNI may
// be used. A way says what a pixel is prepared to, and how registers of the weight meet it:
// - kChannelBytes: of a prepared channel; kVectors: of 16 outputs, so that sums stay in registers;
// - prepare(): a segment of channels, false where it has no unit; correction is what each sum of the
//   segment is too large by;
// - add(): the sums of MR pixels and NV vectors over `words` words of 32 channels.

// Ends the compiler's freedom to move what makes x: g++ would keep too much alive, and spill sums.
inline void settle(__m512i& x) { asm volatile("" : "+v"(x)); }

// Largest magnitude, or largest sum of magnitudes of four channels. NaN where there is one: its bits are
// above all others.
template <bool FOUR>
inline float largest(const float* x, int count) {
  __m512i most = _mm512_setzero_si512();
  for (int i = 0; i < count; i += 16) {
    __m512 a = _mm512_abs_ps(_mm512_loadu_ps(x + i));
    if constexpr (FOUR) {
      a = _mm512_add_ps(a, _mm512_permute_ps(a, 0xB1));
      a = _mm512_add_ps(a, _mm512_permute_ps(a, 0x4E));
    }
    most = _mm512_max_epi32(most, _mm512_castps_si512(a));
  }
  return std::bit_cast<float>(_mm512_reduce_max_epi32(most));
}

// The unit of numbers of which the largest shall become `limit`; false where there is none.
inline bool unit_of(float most, float limit, float* unit, float* inverse) {
  const bool zero = most == 0;
  *unit = zero ? 0 : most / limit;
  *inverse = zero ? 0 : limit / most;
  return zero || (most >= kLeast && most <= __FLT_MAX__ / 2);
}

inline __m512i round16(const float* x, __m512 inverse) {
  return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), inverse));
}

inline __m512i four_bytes(const void* at) {
  int32_t x;
  std::memcpy(&x, at, 4);
  return _mm512_set1_epi32(x);
}

// 1 and 2 bits: the 16 signed sums of each four channels. A register has four tables, 16 bytes of the
// weight's dwords each: entry e of table t is byte 16 (e / 4) + 4 t + e % 4, where packing leaves it.
template <int DIGITS>
struct TableWay {
  static constexpr int kChannelBytes = 4 * DIGITS, kVectors = 4 / DIGITS;
  // The sums in 16 bits; for one digit their high byte is rounded to, which must stay below 128.
  static constexpr float kLimit = DIGITS == 1 ? 32600.0f : 32760.0f;
  int planes;
  float coefficient[2];

  TableWay(const PackedMatrix& weight, Accuracy) : planes(weight.bits) {
    const float low = weight.levels[0], high = weight.levels[planes - 1];
    coefficient[0] = planes == 1 ? low : (high + low) / 2;
    coefficient[1] = (high - low) / 2;
  }

  bool prepare(const float* x, int words, uint8_t* out, float* unit, int32_t* correction) const {
    float inverse;
    if (!unit_of(largest<true>(x, words * 32), kLimit, unit, &inverse)) return false;
    if (DIGITS == 1) *unit *= 256;
    *correction = 0;
    // An entry's bit j is the sign of channel j.
    alignas(64) static constexpr auto kSigns = [] {
      std::array<int16_t, 64> signs{};
      for (int e = 0; e < 16; ++e)
        for (int j = 0; j < 4; ++j) signs[j / 2 * 32 + 2 * e + j % 2] = e >> j & 1 ? -1 : 1;
      return signs;
    }();
    const __m512i first = _mm512_load_si512(kSigns.data());
    const __m512i last = _mm512_load_si512(kSigns.data() + 32);
    const __m512i half = _mm512_set1_epi32(DIGITS == 1 ? 128 : 0), low = _mm512_set1_epi16(255);
    const __m512 scale = _mm512_set1_ps(inverse);
    alignas(32) int16_t q[16];
    for (int i = 0; i < 2 * words; ++i, x += 16, out += 64 * DIGITS) {
      _mm256_store_si256((__m256i*)q, _mm512_cvtepi32_epi16(round16(x, scale)));
      __m512i sum[4];
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) {
        sum[t] = _mm512_dpwssd_epi32(half, four_bytes(q + 4 * t), first);
        sum[t] = _mm512_dpwssd_epi32(sum[t], four_bytes(q + 4 * t + 2), last);
      }
      const __m512i a = _mm512_packs_epi32(sum[0], sum[1]), b = _mm512_packs_epi32(sum[2], sum[3]);
      _mm512_store_si512(out, _mm512_packs_epi16(_mm512_srai_epi16(a, 8), _mm512_srai_epi16(b, 8)));
      if (DIGITS == 2) {
        _mm512_store_si512(
            out + 64, _mm512_packus_epi16(_mm512_and_si512(a, low), _mm512_and_si512(b, low)));
      }
    }
    return true;
  }

  template <int MR, int NV>
  void add(const uint8_t* weights, int64_t step, const uint8_t* const* pixels, int words,
           const int32_t*, __m512i (&sums)[MR][NV]) const {
    const __m512i digit = _mm512_set1_epi8(0x33), table = _mm512_set1_epi32(0x0C080400);
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i low[MR][NV] = {};
#pragma GCC unroll 4
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sums[r][v] = _mm512_setzero_si512();
    }
    for (int64_t w = 0, at = 0; w < words; ++w) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half, at += 64 * DIGITS) {
        __m512i index[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          __m512i digits = _mm512_load_si512(weights + v * step + w * 64);
          if (half) digits = _mm512_srli_epi32(digits, 2);
          index[v] = _mm512_ternarylogic_epi32(digits, digit, table, 0xEA);  // (digits & digit) | table
          settle(index[v]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < MR; ++r) {
          const __m512i entries = _mm512_load_si512(pixels[r] + at);
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) {
            sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], ones, _mm512_permutexvar_epi8(index[v], entries));
            settle(sums[r][v]);
          }
          if constexpr (DIGITS == 2) {
            const __m512i rest = _mm512_load_si512(pixels[r] + at + 64);
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
              low[r][v] = _mm512_dpbusd_epi32(low[r][v], _mm512_permutexvar_epi8(index[v], rest), ones);
              settle(low[r][v]);
            }
          }
        }
      }
    }
    if constexpr (DIGITS == 2) {
#pragma GCC unroll 4
      for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          sums[r][v] = _mm512_add_epi32(_mm512_slli_epi32(sums[r][v], 8), low[r][v]);
        }
      }
    }
  }
};

// 3 and 4 bits: codes become levels + 128, channels integers of one or two digits, and they are
// multiplied. REST: what the highest level of 128 has beyond the 127 that 8 bits hold.
template <int DIGITS, bool REST>
struct LevelWay {
  static constexpr int kChannelBytes = DIGITS, kVectors = 4 / DIGITS;
  static constexpr float kLimit = DIGITS == 1 ? 127.0f : 32512.0f;
  static constexpr int planes = 1;
  static constexpr float coefficient[1] = {1.0f};
  LevelTable levels;

  LevelWay(const PackedMatrix& weight, Accuracy accuracy)
      : levels(weight.levels, weight.bits, accuracy) {}

  bool prepare(const float* x, int words, uint8_t* out, float* unit, int32_t* correction) const {
    float inverse;
    if (!unit_of(largest<false>(x, words * 32), kLimit, unit, &inverse)) return false;
    *unit *= levels.unit;
    const __m512 scale = _mm512_set1_ps(inverse);
    __m512i total = _mm512_setzero_si512();
    for (int i = 0; i < 2 * words; ++i, x += 16) {
      const __m512i q = round16(x, scale);
      total = _mm512_add_epi32(total, q);
      // A word is 32 bytes of the high digit, then as many of the low: q = 256 high + low.
      uint8_t* to = out + i / 2 * 32 * DIGITS + i % 2 * 16;
      if (DIGITS == 1) {
        _mm_store_si128((__m128i*)to, _mm512_cvtepi32_epi8(q));
      } else {
        const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
        _mm_store_si128((__m128i*)to, _mm512_cvtepi32_epi8(high));
        _mm_store_si128((__m128i*)(to + 32), _mm512_cvtepi32_epi8(q));
      }
    }
    *correction = 128 * _mm512_reduce_add_epi32(total);
    return true;
  }

  template <int MR, int NV>
  void add(const uint8_t* weights, int64_t step, const uint8_t* const* pixels, int words,
           const int32_t* correction, __m512i (&sums)[MR][NV]) const {
    const __m512i digit = _mm512_set1_epi8(15);
    const __m512i level = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)levels.level));
    const __m512i rest = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)levels.rest));
    __m512i low[MR][NV];
#pragma GCC unroll 4
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        sums[r][v] = DIGITS == 1 ? _mm512_set1_epi32(-correction[r]) : _mm512_setzero_si512();
        low[r][v] = _mm512_set1_epi32(-correction[r]);
      }
    }
    for (int64_t w = 0; w < words; ++w) {
      for (int eight = 0; eight < 4; ++eight) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          __m512i value[NV], more[NV];
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) {
            __m512i digits = _mm512_load_si512(weights + v * step + (w * 4 + eight) * 64);
            digits = _mm512_and_si512(half ? _mm512_srli_epi32(digits, 4) : digits, digit);
            value[v] = _mm512_shuffle_epi8(level, digits);
            if (REST) more[v] = _mm512_shuffle_epi8(rest, digits);
            settle(value[v]);
          }
          const int64_t at = w * 32 * DIGITS + eight * 8 + half * 4;
#pragma GCC unroll 4
          for (int r = 0; r < MR; ++r) {
            const __m512i x = four_bytes(pixels[r] + at);
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
              sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], value[v], x);
              if (REST) sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], more[v], x);
              settle(sums[r][v]);
            }
            if constexpr (DIGITS == 2) {
              const __m512i y = four_bytes(pixels[r] + at + 32);
#pragma GCC unroll 4
              for (int v = 0; v < NV; ++v) {
                low[r][v] = _mm512_dpbusd_epi32(low[r][v], value[v], y);
                settle(low[r][v]);
              }
            }
          }
        }
      }
    }
    if constexpr (DIGITS == 2) {
#pragma GCC unroll 4
      for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          sums[r][v] = _mm512_add_epi32(_mm512_slli_epi32(sums[r][v], 8), low[r][v]);
        }
      }
    }
  }
};
