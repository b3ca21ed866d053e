// The way by tables of 16-bit entries, for high accuracy with VBMI and VNNI of AVX-512; see packed_int8_driver.h.
//
// 16 bits of a weight's row are three indices into tables of up to 64 entries, all sums that 5, 5 and 6 inputs
// can make (2 bits: 3, 3 and 2). A register has the same 16 bits of 32 outputs, so a look-up needs no more than
// a shift: no other index of its 16 bits matters. Sums of 32 inputs fit 16 bits, by the choice of the unit.

template <int WORDS>
class Tables<WORDS, 2> {
 public:
  static constexpr int kInputBytes = WORDS == 1 ? 16 : 40;
  static constexpr int64_t kPrepared = 128 << 10;  // half of 1 MB, the L2 cache, is for the weight
  static constexpr float kMost = 32700;            // and what entries lose by rounding

  explicit Tables(const float* levels) {
    std::copy_n(levels, kCodes, level_);
    for (int j = 0; j < kFirst; ++j) {
      for (int e = 0; e < 16; ++e) first_[j][e] = levels[e >> (j * WORDS) & (kCodes - 1)];
    }
  }

  // The largest sum of 32 inputs' magnitudes; NaN where there is one, for its bits are above all others.
  static float largest(const float* x, int count) {
    int32_t most = 0;
    for (int i = 0; i < count; i += 32) {
      const __m512 a = _mm512_abs_ps(_mm512_loadu_ps(x + i)), b = _mm512_abs_ps(_mm512_loadu_ps(x + i + 16));
      most = std::max(most, std::bit_cast<int32_t>(_mm512_reduce_add_ps(_mm512_add_ps(a, b))));
    }
    return std::bit_cast<float>(most);
  }

  void build(const float* x, int words, float inverse, uint8_t* tables) const {
    const __m512 scale = _mm512_set1_ps(inverse);
    Scaled levels;
    for (int j = 0; j < kFirst; ++j) levels.first[j] = _mm512_mul_ps(_mm512_load_ps(first_[j]), scale);
    for (int c = 0; c < kCodes; ++c) levels.level[c] = _mm512_mul_ps(_mm512_set1_ps(level_[c]), scale);
    for (int w = 0; w < words; ++w, x += 32) {
      for (int p = 0; p < WORDS; ++p) {
        for (int half = 0; half < 2; ++half) {
          const float* input = x + 16 * half + p;
          tables = build_table<kInputs[0]>(levels, input, tables);
          tables = build_table<kInputs[1]>(levels, input + kInputs[0] * WORDS, tables);
          tables = build_table<kInputs[2]>(levels, input + 2 * kInputs[0] * WORDS, tables);
        }
      }
    }
  }

  template <int MR, int NV>
  [[gnu::noinline]] static void add(const Block& block) {
    constexpr int kPairs = (NV + 1) / 2;  // of registers; one alone is its own second
    const __m512i even = _mm512_set1_epi32(1), odd = _mm512_set1_epi32(1 << 16), low = _mm512_set1_epi32(0xffff);
    const uint8_t *weights = block.weights, *tables = block.data;
    const int64_t step = block.step, stride = block.stride;
    for (int word = 0, s = 0; word < block.words; word += block.segment_words, ++s) {
      __m512i sums[MR][2 * kPairs];
      each<MR * 2 * kPairs>([&](auto i) __attribute__((always_inline)) {
        sums[i / (2 * kPairs)][i % (2 * kPairs)] = _mm512_setzero_si512();
      });
      const int count = std::min(block.segment_words, block.words - word);
      for (int w = 0; w < count; ++w) {
        __m512i narrow[MR][kPairs];
        each<2 * WORDS>([&](auto i) __attribute__((always_inline)) {
          constexpr bool kHigh = i % 2;
          __m512i index[kPairs];
          each<kPairs>([&](auto u) __attribute__((always_inline)) {
            const uint8_t* from = weights + 2 * u * step;
            const __m512i a = _mm512_load_si512(from);
            const __m512i b = _mm512_load_si512(from + (2 * u + 1 < NV ? step : 0));
            index[u] = kHigh ? _mm512_ternarylogic_epi32(b, low, _mm512_srli_epi32(a, 16), 0xBA)  // (b & ~low) | a
                             : _mm512_ternarylogic_epi32(a, low, _mm512_slli_epi32(b, 16), 0xEA);
            settle(index[u]);
          });
          each<3>([&](auto g) __attribute__((always_inline)) {
            each<MR>([&](auto r) __attribute__((always_inline)) {
              __m512i entries[kPairs], table = _mm512_load_si512(tables + r * stride);
              settle(table);
              each<kPairs>([&](auto u) __attribute__((always_inline)) {
                entries[u] = kBits[g] == 6 ? _mm512_permutex2var_epi16(table, index[u],
                                                                       _mm512_load_si512(tables + r * stride + 64))
                                           : _mm512_permutexvar_epi16(index[u], table);
                settle(entries[u]);
              });
              each<kPairs>([&](auto u) __attribute__((always_inline)) {
                __m512i& sum = narrow[r][u];
                sum = i == 0 && g == 0 ? entries[u] : _mm512_add_epi16(sum, entries[u]);
                settle(sum);
              });
            });
            each<kPairs>([&](auto u) __attribute__((always_inline)) {
              if (g < 2) index[u] = _mm512_srli_epi16(index[u], kBits[g]);
              settle(index[u]);
            });
            tables += kBits[g] == 6 ? 128 : 64;
          });
          if (kHigh) weights += 64;
        });
        each<MR * kPairs>([&](auto i) __attribute__((always_inline)) {
          constexpr int r = i / kPairs, u = i % kPairs;
          sums[r][2 * u] = _mm512_dpwssd_epi32(sums[r][2 * u], narrow[r][u], even);
          settle(sums[r][2 * u]);
          sums[r][2 * u + 1] = _mm512_dpwssd_epi32(sums[r][2 * u + 1], narrow[r][u], odd);
          settle(sums[r][2 * u + 1]);
        });
      }
      add_segment<false, NV>(block, s, sums);
    }
  }

 private:
  static constexpr int kCodes = 1 << WORDS, kFirst = 4 / WORDS;  // whose sums are 16
  static constexpr int kInputs[3] = {WORDS == 1 ? 5 : 3, WORDS == 1 ? 5 : 3, WORDS == 1 ? 6 : 2};
  static constexpr int kBits[3] = {kInputs[0] * WORDS, kInputs[1] * WORDS, kInputs[2] * WORDS};

  struct Scaled {
    __m512 first[kFirst], level[kCodes];
  };

  // A register of sums for every 5 bits at most; returns where the next table stands.
  template <int INPUTS>
  [[gnu::always_inline]] static uint8_t* build_table(const Scaled& levels, const float* x, uint8_t* table) {
    __m512 sums[4];
    sums[0] = _mm512_mul_ps(levels.first[0], _mm512_set1_ps(x[0]));
    for (int j = 1; j < kFirst; ++j) {
      sums[0] = _mm512_fmadd_ps(levels.first[j], _mm512_set1_ps(x[j * WORDS]), sums[0]);
    }
    int parts = 1;
    for (int j = kFirst; j < INPUTS; ++j, parts *= kCodes) {
      const __m512 input = _mm512_set1_ps(x[j * WORDS]);
      for (int c = kCodes - 1; c >= 0; --c) {
        for (int i = 0; i < parts; ++i) sums[c * parts + i] = _mm512_fmadd_ps(levels.level[c], input, sums[i]);
      }
    }
    if (parts == 1) {
      _mm512_store_si512(table, _mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_cvtps_epi32(sums[0]))));
      return table + 64;
    }
    const __m512i low_words = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28,
                                               26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    for (int i = 0; i < parts; i += 2, table += 64) {
      _mm512_store_si512(table, _mm512_permutex2var_epi16(_mm512_cvtps_epi32(sums[i]), low_words,
                                                          _mm512_cvtps_epi32(sums[i + 1])));
    }
    return table;
  }

  float level_[kCodes];
  alignas(64) float first_[kFirst][16];
};
