// One native register of floats, and what kernels do with it, in each variant; see foreach_isa.h.
// Kernel files include it inside the variant's namespace. Arithmetic is the compiler's own.

#if BLAQ_ISA_AVX512
constexpr int kLanes = 16;
#elif BLAQ_ISA_AVX2
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

inline Floats broadcast(float x) {
#if BLAQ_ISA_AVX512
  return (Floats)_mm512_set1_ps(x);
#elif BLAQ_ISA_AVX2
  return (Floats)_mm256_set1_ps(x);
#else
  return Floats{x, x, x, x};
#endif
}

inline Floats load(const float* p) {
  Floats x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline void store(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }

// a where a > b, else b: also where a is NaN.
inline Floats larger(Floats a, Floats b) {
#if BLAQ_ISA_AVX512
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif BLAQ_ISA_AVX2
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// Bytes to lanes, and the low bytes of lanes back.
inline Words load_bytes(const uint8_t* p) {
#if BLAQ_ISA_AVX512
  return (Words)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif BLAQ_ISA_AVX2
  return (Words)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  return Words{p[0], p[1], p[2], p[3]};
#endif
}

inline void store_bytes(uint8_t* p, Words x) {
#if BLAQ_ISA_AVX512
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)x));
#elif BLAQ_ISA_AVX2
  const __m128i low = _mm256_castsi256_si128((__m256i)x), high = _mm256_extracti128_si256((__m256i)x, 1);
  const __m128i words = _mm_packus_epi32(low, high);
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(words, words));
#else
  for (int l = 0; l < kLanes; ++l) p[l] = static_cast<uint8_t>(x[l]);
#endif
}

// A store that may leave the line out of the cache, for memory that can_stream().
inline bool can_stream(const float* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(Floats) == 0; }

inline void put(float* p, Floats x, bool streams) {
  if (!streams) return store(p, x);
#if BLAQ_ISA_AVX512
  _mm512_stream_ps(p, (__m512)x);
#elif BLAQ_ISA_AVX2
  _mm256_stream_ps(p, (__m256)x);
#else
  store(p, x);
#endif
}

// Bit l is set where lane l is below 0.
inline uint32_t negative_lanes(Floats x) {
#if BLAQ_ISA_AVX512
  return _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_LT_OQ);
#elif BLAQ_ISA_AVX2
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_setzero_ps(), _CMP_LT_OQ));
#elif defined(__x86_64__)
  return _mm_movemask_ps(_mm_cmplt_ps((__m128)x, _mm_setzero_ps()));
#else
  return (x[0] < 0) | (x[1] < 0) << 1 | (x[2] < 0) << 2 | (x[3] < 0) << 3;
#endif
}

// a[0], b[0], a[1], b[1], …
inline void store_pairs(float* p, Floats a, Floats b) {
#if BLAQ_ISA_AVX512
  store(p, __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
  store(p + kLanes,
        __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
#elif BLAQ_ISA_AVX2
  store(p, __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11));
  store(p + kLanes, __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15));
#else
  store(p, __builtin_shufflevector(a, b, 0, 4, 1, 5));
  store(p + kLanes, __builtin_shufflevector(a, b, 2, 6, 3, 7));
#endif
}

// Ends the compiler's freedom to move a sum: g++ would gather all terms first and spill them.
template <typename Lanes>
inline void settle(Lanes& x) {
#if defined(__x86_64__)
  asm volatile("" : "+v"(x));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(x));
#endif
}

// a · b + c; one rounding where the variant has it.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if BLAQ_ISA_AVX512
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif BLAQ_ISA_AVX2
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

inline Floats round_to_bf16(Floats x) {
  const Words bits = (Words)x;
  return (Floats)((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000);
}

inline Floats round_to_half(Floats x) {
#if BLAQ_ISA_AVX512
  return (Floats)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)x, 0));
#elif BLAQ_ISA_AVX2
  return (Floats)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)x, 0));
#else
  const auto at = [&](int lane) { return static_cast<float>(static_cast<Half>(x[lane])); };
  return Floats{at(0), at(1), at(2), at(3)};
#endif
}

// The i-th digit of 4 bits of every lane, garbage above it. Shifts share two ports of Zen 4 with
// look-ups, a multiplier shifts on the others: 14 % faster where nothing else multiplies.
inline Words digit(Words digits, int i) {
#if BLAQ_ISA_AVX512
  const Words half = i < 4 ? digits : digits >> 16;
  if (i % 4 == 0) return half;
  const __m512i by = _mm512_set1_epi16(static_cast<short>(1 << (16 - 4 * (i % 4))));
  return (Words)_mm512_mulhi_epu16((__m512i)half, by);
#else
  return digits >> (4 * i);
#endif
}

// table[low 4 bits of each lane]; a table has 16 floats.
inline Floats lookup(const float* table, Words index) {
#if BLAQ_ISA_AVX512
  return (Floats)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
#elif BLAQ_ISA_AVX2
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)index);
  return (Floats)_mm256_blendv_ps(low, high, (__m256)(Words)(index << 28));
#else
  const auto at = [&](int lane) { return table[index[lane] & 15]; };
  return Floats{at(0), at(1), at(2), at(3)};
#endif
}

// words[i · step] has 4 bytes of each of kLanes rows: the i-th four of those from `row` on. Rows
// are `stride` bytes apart.
inline void transpose_16_bytes(const uint8_t* row, int64_t stride, Words* words, int64_t step) {
#if BLAQ_ISA_AVX512
  __m512i quad[4];
  for (int i = 0; i < 4; ++i) {
    const auto part = [&](int j) {
      return _mm_loadu_si128((const __m128i*)(row + (4 * j + i) * stride));
    };
    quad[i] = _mm512_castsi128_si512(part(0));
    quad[i] = _mm512_mask_broadcast_i32x4(quad[i], 0x00f0, part(1));
    quad[i] = _mm512_mask_broadcast_i32x4(quad[i], 0x0f00, part(2));
    quad[i] = _mm512_mask_broadcast_i32x4(quad[i], 0xf000, part(3));
  }
  const __m512i a = _mm512_unpacklo_epi32(quad[0], quad[1]);
  const __m512i b = _mm512_unpacklo_epi32(quad[2], quad[3]);
  const __m512i c = _mm512_unpackhi_epi32(quad[0], quad[1]);
  const __m512i d = _mm512_unpackhi_epi32(quad[2], quad[3]);
  words[0] = (Words)_mm512_unpacklo_epi64(a, b);
  words[step] = (Words)_mm512_unpackhi_epi64(a, b);
  words[2 * step] = (Words)_mm512_unpacklo_epi64(c, d);
  words[3 * step] = (Words)_mm512_unpackhi_epi64(c, d);
#elif BLAQ_ISA_AVX2
  __m256i quad[4];
  for (int i = 0; i < 4; ++i) {
    const auto part = [&](int j) {
      return _mm_loadu_si128((const __m128i*)(row + (4 * j + i) * stride));
    };
    quad[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(part(0)), part(1), 1);
  }
  const __m256i a = _mm256_unpacklo_epi32(quad[0], quad[1]);
  const __m256i b = _mm256_unpacklo_epi32(quad[2], quad[3]);
  const __m256i c = _mm256_unpackhi_epi32(quad[0], quad[1]);
  const __m256i d = _mm256_unpackhi_epi32(quad[2], quad[3]);
  words[0] = (Words)_mm256_unpacklo_epi64(a, b);
  words[step] = (Words)_mm256_unpackhi_epi64(a, b);
  words[2 * step] = (Words)_mm256_unpacklo_epi64(c, d);
  words[3 * step] = (Words)_mm256_unpackhi_epi64(c, d);
#else
  uint32_t word[kLanes][4];
  for (int i = 0; i < kLanes; ++i) std::memcpy(word[i], row + i * stride, 16);
  for (int i = 0; i < 4; ++i) {
    words[i * step] = Words{word[0][i], word[1][i], word[2][i], word[3][i]};
  }
#endif
}

// Bit planes of 32 inputs to digits of 4 bits. With two planes the i-th digit of word p has the
// codes of inputs 4i + p and 4i + p + 2, with four planes that of input 4i + p.
template <int WORDS>
inline void interleave(Words* plane, int64_t step) {
  const auto mix = [](Words& a, Words& b, int by, uint32_t low) {
    const Words first = (a & low) | (b << by & ~low);
    b = (a >> by & low) | (b & ~low);
    a = first;
  };
  if constexpr (WORDS >= 2) mix(plane[0], plane[step], 1, 0x55555555);
  if constexpr (WORDS == 4) {
    mix(plane[2 * step], plane[3 * step], 1, 0x55555555);
    mix(plane[0], plane[2 * step], 2, 0x33333333);
    mix(plane[step], plane[3 * step], 2, 0x33333333);
  }
}
