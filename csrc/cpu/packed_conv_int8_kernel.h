// The inner loops of packed_conv_int8.cpp, which includes this file where AVX-512 with VBMI and VNNI may
// be used. A way says what a pixel is prepared to, and how registers of the weight meet it:
// - kChannelBytes: of a prepared channel; kVectors: of 16 outputs, so that sums stay in registers;
// - prepare(): a segment of channels, false where it has no unit; correction is what each sum of the
//   segment is too large by;
// - add(): the sums of MR pixels and NV vectors over `words` words of 32 channels.

#include "cpu/packed_int8_kernel.h"

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

// 1 and 2 bits: the 16 signed sums of each four channels. A register has four tables, 16 bytes of the
// weight's dwords each: entry e of table t is byte 16 (e / 4) + 4 t + e % 4, where packing leaves it.
template <int DIGITS>
struct TableWay {
  static constexpr int kChannelBytes = 4 * DIGITS, kVectors = 4 / DIGITS;
  // The sums in 16 bits; for one digit their high byte is rounded to, which must stay below 128.
  static constexpr float kLimit = DIGITS == 1 ? 32600.0f : 32760.0f;
  int planes;
  float coefficient[2];

  explicit TableWay(const PackedMatrix& weight) : planes(weight.bits) {
    const float low = weight.levels[0], high = weight.levels[planes - 1];
    coefficient[0] = planes == 1 ? low : (high + low) / 2;
    coefficient[1] = (high - low) / 2;
  }

  bool prepare(const float* x, int words, uint8_t* out, float* unit, int32_t* correction) const {
    float inverse;
    if (!unit_of(largest_sum<1>(x, words * 32), kLimit, unit, &inverse)) return false;
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
    alignas(32) uint8_t q[32];
    for (int i = 0; i < 2 * words; ++i, x += 16, out += 64 * DIGITS) {
      _mm256_store_si256((__m256i*)q, _mm512_cvtepi32_epi16(round16(x, scale)));
      __m512i sum[4];
      each<4>([&](auto t) __attribute__((always_inline)) {
        sum[t] = _mm512_dpwssd_epi32(half, four_bytes(q + 8 * t), first);
        sum[t] = _mm512_dpwssd_epi32(sum[t], four_bytes(q + 8 * t + 4), last);
      });
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
  [[gnu::always_inline]] void add(const uint8_t* weights, int64_t step, const uint8_t* const* pixels,
                                  int words, const int32_t*, __m512i (&sums)[MR][NV]) const {
    const __m512i digit = _mm512_set1_epi8(0x33), table = _mm512_set1_epi32(0x0C080400);
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i low[DIGITS == 2 ? MR : 1][NV];
    each<MR * NV>([&](auto i) __attribute__((always_inline)) {
      sums[i / NV][i % NV] = _mm512_setzero_si512();
      if (DIGITS == 2) low[i / NV][i % NV] = _mm512_setzero_si512();
    });
    for (int64_t w = 0, at = 0; w < words; ++w, weights += 64) {
      each<2>([&](auto half) __attribute__((always_inline)) {
        __m512i index[NV];
        each<NV>([&](auto v) __attribute__((always_inline)) {
          __m512i digits = _mm512_load_si512(weights + v * step);
          if (half) digits = _mm512_srli_epi32(digits, 2);
          index[v] = _mm512_ternarylogic_epi32(digits, digit, table, 0xEA);  // (digits & digit) | table
          settle(index[v]);
        });
        each<MR>([&](auto r) __attribute__((always_inline)) {
          const __m512i entries = _mm512_load_si512(pixels[r] + at);
          each<NV>([&](auto v) __attribute__((always_inline)) {
            __m512i& sum = sums[r][v];
            sum = _mm512_dpbusd_epi32(sum, ones, _mm512_permutexvar_epi8(index[v], entries));
            settle(sum);
          });
          if constexpr (DIGITS == 2) {
            const __m512i rest = _mm512_load_si512(pixels[r] + at + 64);
            each<NV>([&](auto v) __attribute__((always_inline)) {
              __m512i& sum = low[r][v];
              sum = _mm512_dpbusd_epi32(sum, _mm512_permutexvar_epi8(index[v], rest), ones);
              settle(sum);
            });
          }
        });
        at += 64 * DIGITS;
      });
    }
    if constexpr (DIGITS == 2) {
      each<MR * NV>([&](auto i) __attribute__((always_inline)) {
        __m512i& sum = sums[i / NV][i % NV];
        sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8), low[i / NV][i % NV]);
      });
    }
  }
};

// 3 and 4 bits: codes become levels, and are multiplied with channels as integers: both of 8 bits, or
// WIDE, of 16.
template <bool WIDE>
struct LevelWay {
  static constexpr int kChannelBytes = WIDE ? 2 : 1, kVectors = 4;
  static constexpr float kLimit = WIDE ? 32700.0f : 127.0f;
  static constexpr int planes = 1;
  static constexpr float coefficient[1] = {1.0f};
  LevelTable levels;

  explicit LevelWay(const PackedMatrix& weight) : levels(weight.levels, weight.bits) {}

  bool prepare(const float* x, int words, uint8_t* out, float* unit, int32_t* correction) const {
    float inverse;
    if (!unit_of(largest(x, words * 32), kLimit, unit, &inverse)) return false;
    *unit *= WIDE ? levels.wide_unit : levels.unit;
    const __m512 scale = _mm512_set1_ps(inverse);
    // Of eight channels those two apart side by side, as shifts of a register have their digits.
    const __m256i pairs = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    __m512i total = _mm512_setzero_si512();
    for (int i = 0; i < 2 * words; ++i, x += 16, out += 16 * kChannelBytes) {
      const __m512i q = round16(x, scale);
      if (WIDE) {
        _mm256_store_si256((__m256i*)out, _mm256_shuffle_epi8(_mm512_cvtepi32_epi16(q), pairs));
      } else {
        total = _mm512_add_epi32(total, q);
        _mm_store_si128((__m128i*)out, _mm512_cvtepi32_epi8(q));
      }
    }
    *correction = 128 * _mm512_reduce_add_epi32(total);
    return true;
  }

  template <int MR, int NV>
  [[gnu::always_inline]] void add(const uint8_t* weights, int64_t step, const uint8_t* const* pixels,
                                  int words, const int32_t* correction, __m512i (&sums)[MR][NV]) const {
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i level = WIDE ? _mm512_load_si512(levels.wide)
                               : _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)levels.level));
    each<MR * NV>([&](auto i) __attribute__((always_inline)) {
      sums[i / NV][i % NV] = _mm512_set1_epi32(-correction[i / NV]);
    });
    for (int64_t eight = 0; eight < 4 * words; ++eight, weights += 64) {
      each<(WIDE ? 4 : 2)>([&](auto shift) __attribute__((always_inline)) {
        __m512i value[NV];
        each<NV>([&](auto v) __attribute__((always_inline)) {
          __m512i digits = _mm512_load_si512(weights + v * step);
          if (WIDE) {  // the table is there twice: bit 4, of another digit, does not matter
            if (shift) digits = _mm512_srli_epi16(digits, 4 * shift);
            value[v] = _mm512_permutexvar_epi16(digits, level);
          } else {
            if (shift) digits = _mm512_srli_epi32(digits, 4);
            value[v] = _mm512_shuffle_epi8(level, _mm512_and_si512(digits, low));
          }
          settle(value[v]);
        });
        each<MR>([&](auto r) __attribute__((always_inline)) {
          const __m512i x = four_bytes(pixels[r] + eight * 8 * kChannelBytes + shift * 4);
          each<NV>([&](auto v) __attribute__((always_inline)) {
            __m512i& sum = sums[r][v];
            sum = WIDE ? _mm512_dpwssd_epi32(sum, value[v], x) : _mm512_dpbusd_epi32(sum, value[v], x);
            settle(sum);
          });
        });
      });
    }
  }
};
