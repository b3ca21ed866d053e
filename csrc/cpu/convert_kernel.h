// Runs of numbers between a tensor's dtype and the one computed in; see foreach_isa.h.

template <typename T, typename S>
void widen(const T* in, S* out, int64_t count) {
  int64_t i = 0;
  if constexpr (std::is_same_v<T, S>) {
    std::memcpy(out, in, count * sizeof(T));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    for (; i < count; ++i) out[i] = std::bit_cast<float>(static_cast<uint32_t>(in[i].x) << 16);
  } else {
#if BLAQ_ISA_AVX512
    for (; i + 16 <= count; i += 16) {
      _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(in + i))));
    }
#elif BLAQ_ISA_AVX2
    for (; i + 8 <= count; i += 8) {
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(in + i))));
    }
#endif
    for (; i < count; ++i) out[i] = static_cast<float>(in[i]);
  }
}

// Rounds to nearest even, as torch does.
template <typename S, typename T>
void narrow_run(const S* in, T* out, int64_t count) {
  int64_t i = 0;
  if constexpr (std::is_same_v<T, S>) {
    std::memcpy(out, in, count * sizeof(T));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    for (; i < count; ++i) {
      const uint32_t bits = std::bit_cast<uint32_t>(in[i]);
      const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
      out[i].x = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
    }
  } else {
    constexpr int kNearest = 0;
#if BLAQ_ISA_AVX512
    for (; i + 16 <= count; i += 16) {
      const __m256i half = _mm512_cvtps_ph(_mm512_loadu_ps(in + i), kNearest);
      _mm256_storeu_si256((__m256i*)(out + i), half);
    }
#elif BLAQ_ISA_AVX2
    for (; i + 8 <= count; i += 8) {
      const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), kNearest);
      _mm_storeu_si128((__m128i*)(out + i), half);
    }
#else
    static_cast<void>(kNearest);
#endif
    for (; i < count; ++i) out[i] = static_cast<Half>(in[i]);
  }
}
