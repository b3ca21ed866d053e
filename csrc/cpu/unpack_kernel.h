// Bit planes of one row to weights, 64 inputs at a time; see foreach_isa.h.

// 64 codes of one byte each, from the 8 bytes that `plane[b]` has of every plane.
inline void spread_codes(const uint64_t* plane, int bits, uint8_t* codes) {
#if BLAQ_ISA_AVX512
  __m512i block = _mm512_setzero_si512();
  for (int b = 0; b < bits; ++b) {
    block = _mm512_or_si512(block, _mm512_maskz_set1_epi8(plane[b], static_cast<char>(1 << b)));
  }
  _mm512_storeu_si512(codes, block);
#else
  for (int byte = 0; byte < 8; ++byte) {
    uint64_t block = 0;
    for (int b = 0; b < bits; ++b) {
      // Byte i keeps bit i, then becomes 0 or 1: 0x7f carries any set bit into the top one.
      const uint64_t bit =
          (plane[b] >> (8 * byte) & 0xff) * 0x0101010101010101u & 0x8040201008040201u;
      block |= ((bit + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u) << b;
    }
    std::memcpy(codes + 8 * byte, &block, 8);
  }
#endif
}

// out[i] = table[codes[i]]; a table has 16 values.
template <typename T>
inline void lookup_codes(const T* table, const uint8_t* codes, int64_t count, T* out) {
  int64_t i = 0;
#if BLAQ_ISA_AVX512
  if constexpr (sizeof(T) == 2) {
    const __m512i values = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)table));
    for (; i + 32 <= count; i += 32) {
      const __m512i index = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(codes + i)));
      _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(index, values));
    }
  } else if constexpr (sizeof(T) == 4) {
    const __m512i values = _mm512_loadu_si512(table);
    for (; i + 16 <= count; i += 16) {
      const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + i)));
      _mm512_storeu_si512(out + i, _mm512_permutexvar_epi32(index, values));
    }
  }
#elif BLAQ_ISA_AVX2
  if constexpr (sizeof(T) == 2) {
    const __m128i first = _mm_loadu_si128((const __m128i*)table), byte = _mm_set1_epi16(0xff);
    const __m128i second = _mm_loadu_si128((const __m128i*)table + 1);
    const __m128i low = _mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(second, byte));
    const __m128i high = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
    for (; i + 16 <= count; i += 16) {
      const __m128i index = _mm_loadu_si128((const __m128i*)(codes + i));
      const __m128i l = _mm_shuffle_epi8(low, index), h = _mm_shuffle_epi8(high, index);
      _mm_storeu_si128((__m128i*)(out + i), _mm_unpacklo_epi8(l, h));
      _mm_storeu_si128((__m128i*)(out + i) + 1, _mm_unpackhi_epi8(l, h));
    }
  } else if constexpr (sizeof(T) == 4) {
    const __m256 low = _mm256_loadu_ps((const float*)table);
    const __m256 high = _mm256_loadu_ps((const float*)table + 8);
    for (; i + 8 <= count; i += 8) {
      const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(codes + i)));
      const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
      _mm256_storeu_ps((float*)(out + i),
                       _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                        _mm256_permutevar8x32_ps(high, index), upper));
    }
  }
#endif
  for (; i < count; ++i) out[i] = table[codes[i]];
}

// Weights of the inputs [8·first, last) of a row to out[8·first, last); `planes` is the row's first
// byte in plane 0, `values` the signed level of each code, `scales` the row's.
template <typename S, typename T>
void unpack_row(const uint8_t* planes, int64_t plane_stride, int bits, int64_t first, int64_t last,
                const S* values, const S* scales, int64_t group_size, T* out) {
  alignas(64) uint8_t codes[64];
  alignas(64) T table[16];
  int64_t group_end = 0;
  for (int64_t k = 8 * first; k < last; k += 64) {
    const int64_t count = last - k < 64 ? last - k : 64;
    uint64_t plane[4] = {};
    for (int b = 0; b < bits; ++b)
      std::memcpy(&plane[b], planes + b * plane_stride + k / 8, (count + 7) / 8);
    spread_codes(plane, bits, codes);
    for (int64_t done = 0; done < count;) {
      if (k + done >= group_end) {
        const int64_t group = group_size > 0 ? (k + done) / group_size : 0;
        group_end = group_size > 0 ? (group + 1) * group_size : last;
        for (int i = 0; i < 1 << bits; ++i) table[i] = narrow<T>(values[i] * scales[group]);
      }
      const int64_t piece = count < group_end - k ? count : group_end - k;
      lookup_codes(table, codes + done, piece - done, out + k + done);
      done = piece;
    }
  }
}
