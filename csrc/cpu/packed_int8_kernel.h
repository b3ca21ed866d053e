// The inner loops of packed_int8.cpp, which includes this file where AVX-512 with VBMI and VNNI may be used:
// inputs become tables or 8-bit integers, and registers of the weight are looked up or multiplied.

// Ends the compiler's freedom to move what makes x: g++ would keep too much alive, and spill sums.
inline void settle(__m512i& x) { asm volatile("" : "+v"(x)); }

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

// Tables of a segment: for each word and each of its registers 128 bytes, the even digits' and the odd
// digits'; of two 8-bit digits first the high (signed), then the low (unsigned).
template <int WORDS, int DIGITS>
void build_tables(const float* x, int words, float inverse, const float* coefficients, uint8_t* tables) {
  constexpr int kTerms = 4 / WORDS;
  __m512 c[kTerms];
  for (int j = 0; j < kTerms; ++j) {
    c[j] = _mm512_mul_ps(_mm512_loadu_ps(coefficients + 16 * j), _mm512_set1_ps(inverse));
  }
  for (int w = 0; w < words; ++w, x += 32) {
    for (int p = 0; p < WORDS; ++p, tables += 128 * DIGITS) {
      for (int i = 0; i < 8; ++i) {
        __m512 sum = _mm512_mul_ps(c[0], _mm512_set1_ps(x[4 * i + p]));
        for (int j = 1; j < kTerms; ++j) {
          sum = _mm512_fmadd_ps(c[j], _mm512_set1_ps(x[4 * i + p + WORDS * j]), sum);
        }
        const __m512i entries = _mm512_cvtps_epi32(sum);
        uint8_t* to = tables + (i & 1) * 64 * DIGITS + (i / 2) * 16;
        if (DIGITS == 1) {
          _mm_store_si128((__m128i*)to, _mm512_cvtepi32_epi8(entries));
        } else {
          _mm_store_si128((__m128i*)to, _mm512_cvtepi32_epi8(_mm512_srai_epi32(entries, 8)));
          _mm_store_si128((__m128i*)(to + 64), _mm512_cvtepi32_epi8(entries));
        }
      }
    }
  }
}

// acc[r][v][digit] += look-ups of `words` words; weights of vector v are at v * step.
template <int WORDS, int DIGITS, int MR, int NV>
[[gnu::noinline]] void add_tables(const uint8_t* weights, int64_t step, const uint8_t* tables, int64_t stride,
                       int words, __m512i (&result)[DIGITS][MR][NV]) {
  const __m512i low = _mm512_set1_epi8(15), quarter = _mm512_set1_epi32(0x30201000);
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i first[MR][NV] = {}, second[MR][NV] = {};
  for (int w = 0; w < words * WORDS; ++w) {
#pragma GCC unroll 8
    for (int half = 0; half < 2; ++half) {
      __m512i index[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        __m512i digits = _mm512_load_si512(weights + v * step + w * 64);
        if (half) digits = _mm512_srli_epi32(digits, 4);
        index[v] = _mm512_ternarylogic_epi32(digits, low, quarter, 0xEA);  // (digits & low) | quarter
        settle(index[v]);
      }
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) {
        const uint8_t* table = tables + r * stride + (w * 2 + half) * 64 * DIGITS;
        const __m512i high = _mm512_load_si512(table);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) {
          first[r][v] = _mm512_dpbusd_epi32(first[r][v], ones, _mm512_permutexvar_epi8(index[v], high));
          settle(first[r][v]);
        }
        if constexpr (DIGITS == 2) {
          const __m512i rest = _mm512_load_si512(table + 64);
#pragma GCC unroll 8
          for (int v = 0; v < NV; ++v) {
            second[r][v] = _mm512_dpbusd_epi32(second[r][v], _mm512_permutexvar_epi8(index[v], rest), ones);
            settle(second[r][v]);
          }
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      result[0][r][v] = first[r][v];
      if constexpr (DIGITS == 2) result[1][r][v] = second[r][v];
    }
  }
}

// Inputs of a segment as integers, in the order that digits have them: 64 bytes a word of 32, first those
// of the high 8-bit digit. Returns their sum.
template <int DIGITS>
int32_t quantize(const float* x, int words, float inverse, uint8_t* out) {
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
  for (int w = 0; w < words; ++w, x += 32, out += 32 * DIGITS) {
    const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), scale));
    const __m512i b = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16), scale));
    sum = _mm512_add_epi32(sum, _mm512_add_epi32(a, b));
    const auto bytes = [&](__m512i first, __m512i second) {
      const __m256i both = _mm256_set_m128i(_mm512_cvtepi32_epi8(second), _mm512_cvtepi32_epi8(first));
      return _mm256_permutexvar_epi8(order, both);
    };
    if (DIGITS == 1) {
      _mm256_storeu_si256((__m256i*)out, bytes(a, b));
    } else {  // x = 256 high + low, both signed
      const __m512i half = _mm512_set1_epi32(128);
      const __m512i ha = _mm512_srai_epi32(_mm512_add_epi32(a, half), 8);
      const __m512i hb = _mm512_srai_epi32(_mm512_add_epi32(b, half), 8);
      _mm256_storeu_si256((__m256i*)out, bytes(ha, hb));
      _mm256_storeu_si256((__m256i*)(out + 32), bytes(a, b));
    }
  }
  return _mm512_reduce_add_epi32(sum);
}

template <int DIGITS, bool REST, int MR, int NV>
[[gnu::noinline]] void add_levels(const uint8_t* weights, int64_t step, const uint8_t* inputs, int64_t stride,
                       int words, const LevelTable& table, __m512i (&result)[DIGITS][MR][NV]) {
  const __m512i low = _mm512_set1_epi8(15);
  const __m512i level = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)table.level));
  const __m512i rest = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)table.rest));
  const auto input = [](const uint8_t* at) {
    int32_t four;
    std::memcpy(&four, at, 4);
    return _mm512_set1_epi32(four);
  };
  __m512i first[MR][NV] = {}, second[MR][NV] = {};
  for (int w = 0; w < words; ++w, inputs += 32 * DIGITS) {
#pragma GCC unroll 8
    for (int p = 0; p < 4; ++p) {
#pragma GCC unroll 8
      for (int half = 0; half < 2; ++half) {
        __m512i value[NV], more[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) {
          __m512i digits = _mm512_load_si512(weights + v * step + (w * 4 + p) * 64);
          digits = _mm512_and_si512(half ? _mm512_srli_epi32(digits, 4) : digits, low);
          value[v] = _mm512_shuffle_epi8(level, digits);
          if (REST) more[v] = _mm512_shuffle_epi8(rest, digits);
          settle(value[v]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r) {
          const uint8_t* at = inputs + r * stride + 4 * (2 * p + half);
          const __m512i x = input(at);
#pragma GCC unroll 8
          for (int v = 0; v < NV; ++v) {
            first[r][v] = _mm512_dpbusd_epi32(first[r][v], value[v], x);
            if (REST) first[r][v] = _mm512_dpbusd_epi32(first[r][v], more[v], x);
            settle(first[r][v]);
          }
          if constexpr (DIGITS == 2) {
            const __m512i y = input(at + 32);
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) {
              second[r][v] = _mm512_dpbusd_epi32(second[r][v], value[v], y);
              settle(second[r][v]);
            }
          }
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      result[0][r][v] = first[r][v];
      if constexpr (DIGITS == 2) result[1][r][v] = second[r][v];
    }
  }
}
