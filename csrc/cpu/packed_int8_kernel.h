// The inner loops of 8-bit arithmetic with VBMI and VNNI of AVX-512: inputs become tables or 8-bit integers,
// and registers of the weight are looked up or multiplied.

// Ends the compiler's freedom to move what makes x: g++ would keep too much alive, and spill sums.
inline void settle(__m512i& x) { asm volatile("" : "+v"(x)); }

// See packed_int8_driver.h for what follows.
using Levels = LevelTable;
constexpr bool kTwoForms = false;
inline Levels levels_of(const PackedMatrix& weight, Accuracy) { return Levels(weight.levels, weight.bits); }
template <int DIGITS>
inline float unit_of(const Levels& levels) {
  return DIGITS == 1 ? levels.unit : levels.wide_unit;
}

template <int DIGITS>
constexpr float kMostInput = DIGITS == 1 ? 127.0f : 32700.0f;
template <int WORDS, int DIGITS>
constexpr int kRowsOfTile = DIGITS == 1 ? 8 : 4;
template <int WORDS, int DIGITS, int MR>
constexpr int kVectors = MR == 1 && (DIGITS == 1 || WORDS < 4) ? 8 : MR == 8 ? 2 : 4;
// Sums of two inputs in 8 bits are within 1e-2 with fewer. Of 16 bits few are needed.
template <int WORDS, int DIGITS, bool FORM>
constexpr int kSegment = WORDS == 2 && DIGITS == 1 ? 128 : WORDS < 4 && DIGITS == 2 ? 512 : 256;

// The largest magnitude; NaN where there is one, for its bits are above all others.
inline __m512i larger(__m512i most, __m512 x) {
  return _mm512_max_epi32(most, _mm512_castps_si512(_mm512_abs_ps(x)));
}

inline float largest(const float* x, int count) {
  __m512i most = _mm512_setzero_si512();
  for (int i = 0; i < count; i += 16) most = larger(most, _mm512_loadu_ps(x + i));
  return std::bit_cast<float>(_mm512_reduce_max_epi32(most));
}

// The largest sum that a digit can make of its inputs' magnitudes, 4i + p + WORDS · j.
template <int WORDS>
inline float largest_sum(const float* x, int count) {
  __m512i most = _mm512_setzero_si512();
  for (int i = 0; i < count; i += 16) {
    __m512 a = _mm512_abs_ps(_mm512_loadu_ps(x + i));
    if (WORDS == 1) a = _mm512_add_ps(a, _mm512_permute_ps(a, 0xB1));
    most = larger(most, _mm512_add_ps(a, _mm512_permute_ps(a, 0x4E)));
  }
  return std::bit_cast<float>(_mm512_reduce_max_epi32(most));
}

// Levels as multiples of 2^-14, for pairs of inputs, so that 16 bits hold them and what they lose is 3e-5.
// Of 16 entries, four to a 128-bit lane, the same in all: the entries that bits 0 and 1 or 2 and 3 choose.
struct Coefficients {
  __m512i pair[5];

  Coefficients(const float* levels, int words) {
    const auto level = [&](int code) { return static_cast<int>(std::nearbyint(levels[code] * 16384)); };
    const auto both = [](int even, int odd) { return (odd << 16) | (even & 0xFFFF); };
    const auto lane = [](auto entry) {
      return _mm512_broadcast_i32x4(_mm_setr_epi32(entry(0), entry(1), entry(2), entry(3)));
    };
    for (int j = 0; j < 4; ++j) {
      pair[j] = words == 1 ? _mm512_set1_epi32(both(level(j & 1), level(j >> 1)))
                           : lane([&](int e) { return both(level(e), level(j)); });
    }
    pair[4] = lane([&](int e) { return both(level(e & 1), level(e >> 1)); });  // one bit alone
  }
};

// Tables of a segment: for each word and each of its registers 128 bytes, the even digits' and the odd
// digits'; of two 8-bit digits first the high (signed), then the low (unsigned).
//
// Inputs become 16-bit integers of 7 more bits than an entry of one 8-bit digit, and a lane of 128 bits
// holds the digits whose tables are a lane's: so sums need no rearrangement, and packing puts them in order.
// Ties go up for one half of the entries and down for their negatives, which leaves no bias.
template <int WORDS, int DIGITS>
void build_tables(const float* x, int words, float inverse, const Coefficients& coefficients,
                  uint8_t* tables) {
  constexpr int kShift = DIGITS == 1 ? 14 + 7 : 14;
  const __m512 scale = _mm512_set1_ps(DIGITS == 1 ? inverse * 128 : inverse);
  const __m512i half = _mm512_set1_epi32(1 << (kShift - 1)), one = _mm512_set1_epi32(1);
  const __m512i byte = _mm512_set1_epi32(255);
  const __m512i in_order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  const __m512i even_odd = _mm512_broadcast_i32x4(  // inputs 0 and 2, 1 and 3 of four
      _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
  for (int w = 0; w < words; ++w, x += 32) {
    __m512i inputs = _mm512_permutexvar_epi64(
        in_order, _mm512_packs_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), scale)),
                                     _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16), scale))));
    if (WORDS == 2) inputs = _mm512_shuffle_epi8(inputs, even_odd);
    const __m512i pairs[4] = {_mm512_shuffle_epi32(inputs, _MM_PERM_AAAA), _mm512_shuffle_epi32(inputs, _MM_PERM_BBBB),
                              _mm512_shuffle_epi32(inputs, _MM_PERM_CCCC), _mm512_shuffle_epi32(inputs, _MM_PERM_DDDD)};
    for (int p = 0; p < WORDS; ++p) {
      for (int odd = 0; odd < 2; ++odd, tables += 64 * DIGITS) {
        const __m512i up = WORDS == 1 ? _mm512_dpwssd_epi32(half, pairs[2 * odd], coefficients.pair[4]) : half;
        const __m512i down = _mm512_sub_epi32(up, one);
        const __m512i from = pairs[WORDS == 1 ? 2 * odd + 1 : 2 * odd + p];
        __m512i entries[4];
        for (int j = 0; j < 4; ++j) {
          entries[j] = _mm512_srai_epi32(_mm512_dpwssd_epi32(j < 2 ? up : down, from, coefficients.pair[j]), kShift);
        }
        const auto high = [&](int j) { return DIGITS == 1 ? entries[j] : _mm512_srai_epi32(entries[j], 8); };
        _mm512_store_si512(tables, _mm512_packs_epi16(_mm512_packs_epi32(high(0), high(1)),
                                                      _mm512_packs_epi32(high(2), high(3))));
        if (DIGITS == 2) {
          const auto low = [&](int j) { return _mm512_and_si512(entries[j], byte); };
          _mm512_store_si512(tables + 64, _mm512_packus_epi16(_mm512_packus_epi32(low(0), low(1)),
                                                              _mm512_packus_epi32(low(2), low(3))));
        }
      }
    }
  }
}

// f(0), …, f(N − 1) with constants: g++ 12 keeps arrays in registers that nothing but constants index.
template <int N, class F>
[[gnu::always_inline]] inline void each(F f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

// totals += unit · scale · (sum − offset) of segment s.
template <bool OFFSET, int NV, int MR, int SUMS>
[[gnu::always_inline]] inline void add_segment(const Block& block, int64_t s, __m512i (&sums)[MR][SUMS]) {
  each<MR>([&](auto r) __attribute__((always_inline)) {
    const __m512 unit = _mm512_set1_ps(block.unit[r * block.segments + s]);
    each<NV>([&](auto v) __attribute__((always_inline)) {
      __m512i sum = sums[r][v];
      if (OFFSET) sum = _mm512_sub_epi32(sum, _mm512_set1_epi32(block.offset[r * block.segments + s]));
      const __m512 by = block.scale ? _mm512_mul_ps(unit, _mm512_loadu_ps(block.scale + (s * NV + v) * 16)) : unit;
      float* total = block.totals + r * block.totals_stride + 16 * v;
      _mm512_storeu_ps(total, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), by, _mm512_loadu_ps(total)));
    });
  });
}

template <int WORDS, int DIGITS>
class Tables;

// Tables of 8-bit entries: a look-up for 64 bytes fetches from four tables at once.
template <int WORDS>
class Tables<WORDS, 1> {
 public:
  static constexpr int kInputBytes = 4 * WORDS;
  static constexpr int64_t kPrepared = 128 << 10;
  static constexpr float kMost = 127;

  explicit Tables(const float* levels) : coefficients_(levels, WORDS) {}
  static float largest(const float* x, int count) { return largest_sum<WORDS>(x, count); }
  void build(const float* x, int words, float inverse, uint8_t* tables) const {
    build_tables<WORDS, 1>(x, words, inverse, coefficients_, tables);
  }

  template <int MR, int NV>
  [[gnu::noinline]] static void add(const Block& block) {
    const __m512i low = _mm512_set1_epi8(15), quarter = _mm512_set1_epi32(0x30201000);
    const __m512i ones = _mm512_set1_epi8(1);
    const uint8_t *weights = block.weights, *tables = block.data;
    const int64_t step = block.step, stride = block.stride;
    for (int word = 0, s = 0; word < block.words; word += block.segment_words, ++s) {
      __m512i sums[MR][NV];
      each<MR * NV>([&](auto i) __attribute__((always_inline)) { sums[i / NV][i % NV] = _mm512_setzero_si512(); });
      const int count = std::min(block.segment_words, block.words - word) * WORDS;
      for (int w = 0; w < count; ++w, weights += 64, tables += 128) {
        each<2>([&](auto half) __attribute__((always_inline)) {
          __m512i index[NV];
          each<NV>([&](auto v) __attribute__((always_inline)) {
            __m512i digits = _mm512_load_si512(weights + v * step);
            if (half) digits = _mm512_srli_epi32(digits, 4);
            index[v] = _mm512_ternarylogic_epi32(digits, low, quarter, 0xEA);  // (digits & low) | quarter
            settle(index[v]);
          });
          each<MR>([&](auto r) __attribute__((always_inline)) {
            __m512i entries[NV], table = _mm512_load_si512(tables + r * stride + half * 64);
            settle(table);
            each<NV>([&](auto v) __attribute__((always_inline)) {
              entries[v] = _mm512_permutexvar_epi8(index[v], table);
              settle(entries[v]);
            });
            each<NV>([&](auto v) __attribute__((always_inline)) {
              __m512i& sum = sums[r][v];
              sum = _mm512_dpbusd_epi32(sum, ones, entries[v]);
              settle(sum);
            });
          });
        });
      }
      add_segment<false, NV>(block, s, sums);
    }
  }

 private:
  Coefficients coefficients_;
};

// Inputs of a segment as 8-bit integers, in the order that digits have them: 32 bytes a word. Returns their
// sum.
inline int32_t quantize8(const float* x, int words, float inverse, uint8_t* out) {
  // byte 4 (2p + h) + j of a word is input 4 (2j + h) + p
  alignas(64) static constexpr auto kOrder = [] {
    std::array<uint8_t, 32> order{};
    for (int p = 0; p < 4; ++p)
      for (int h = 0; h < 2; ++h)
        for (int j = 0; j < 4; ++j) order[4 * (2 * p + h) + j] = static_cast<uint8_t>(4 * (2 * j + h) + p);
    return order;
  }();
  const __m256i order = _mm256_load_si256((const __m256i*)kOrder.data());
  const __m512 scale = _mm512_set1_ps(inverse);
  __m512i sum = _mm512_setzero_si512();
  for (int w = 0; w < words; ++w, x += 32, out += 32) {
    const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), scale));
    const __m512i b = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16), scale));
    sum = _mm512_add_epi32(sum, _mm512_add_epi32(a, b));
    const __m256i both = _mm256_set_m128i(_mm512_cvtepi32_epi8(b), _mm512_cvtepi32_epi8(a));
    _mm256_storeu_si256((__m256i*)out, _mm256_permutexvar_epi8(order, both));
  }
  return _mm512_reduce_add_epi32(sum);
}

// As 16-bit integers: inputs i and i + 16 of a word side by side, as shifts of a register have their digits.
inline void quantize16(const float* x, int words, float inverse, uint8_t* out) {
  const __m512 scale = _mm512_set1_ps(inverse);
  for (int w = 0; w < words; ++w, x += 32, out += 64) {
    const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), scale));
    const __m512i b = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16), scale));
    _mm512_store_si512(out, _mm512_mask_blend_epi16(0xAAAAAAAA, a, _mm512_slli_epi32(b, 16)));
  }
}

template <int DIGITS>
inline float largest_input(const float* x, int count, const Levels&) {
  return largest(x, count);
}

template <int DIGITS>
inline int32_t quantize(const float* x, int words, float inverse, const Levels&, uint8_t* out) {
  if (DIGITS == 1) return 128 * quantize8(x, words, inverse, out);
  quantize16(x, words, inverse, out);
  return 0;
}

inline __m512i four_bytes(const uint8_t* at) {
  int32_t four;
  std::memcpy(&four, at, 4);
  return _mm512_set1_epi32(four);
}

// Levels and inputs of 8 bits, 64 products an instruction, or of 16 bits, 32.
template <int DIGITS, bool FORM, int MR, int NV>
[[gnu::noinline]] void add_levels(const Block& block, const Levels& table) {
  constexpr bool WIDE = DIGITS == 2;
  const __m512i low = _mm512_set1_epi8(15);
  const __m512i level = WIDE ? _mm512_load_si512(table.wide)
                             : _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)table.level));
  const uint8_t *weights = block.weights, *inputs = block.data;
  const int64_t step = block.step, stride = block.stride;
  for (int word = 0, s = 0; word < block.words; word += block.segment_words, ++s) {
    __m512i sums[MR][NV];
    each<MR * NV>([&](auto i) __attribute__((always_inline)) { sums[i / NV][i % NV] = _mm512_setzero_si512(); });
    const int count = std::min(block.segment_words, block.words - word);
    for (int w = 0; w < count; ++w, weights += 256, inputs += WIDE ? 64 : 32) {
      each<4>([&](auto p) __attribute__((always_inline)) {
        each<(WIDE ? 4 : 2)>([&](auto shift) __attribute__((always_inline)) {
          __m512i value[NV];
          each<NV>([&](auto v) __attribute__((always_inline)) {
            __m512i digits = _mm512_load_si512(weights + v * step + p * 64);
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
            const __m512i x = four_bytes(inputs + r * stride + 4 * (WIDE ? 4 * shift + p : 2 * p + shift));
            each<NV>([&](auto v) __attribute__((always_inline)) {
              __m512i& sum = sums[r][v];
              sum = WIDE ? _mm512_dpwssd_epi32(sum, value[v], x) : _mm512_dpbusd_epi32(sum, value[v], x);
              settle(sum);
            });
          });
        });
      });
    }
    add_segment<!WIDE, NV>(block, s, sums);
  }
}
