// Pixels between a tensor with one plane for each channel and [pixel][channel]; see foreach_isa.h.
// After convert_kernel.h.

#if BLAQ_ISA_AVX512
template <typename T>
inline __m512 load_some(const T* from, __mmask16 some) {
  if constexpr (std::is_same_v<T, float>) {
    return _mm512_maskz_loadu_ps(some, from);
  } else {
    const __m256i x = _mm256_maskz_loadu_epi16(some, from);
    if constexpr (std::is_same_v<T, Half>) return _mm512_cvtph_ps(x);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
}

// 16 x 16
inline void transpose(__m512 (&x)[16]) {
  __m512 y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_shuffle_ps(y[i], y[i + 2], 0x44);
    x[i + 1] = _mm512_shuffle_ps(y[i], y[i + 2], 0xEE);
    x[i + 2] = _mm512_shuffle_ps(y[i + 1], y[i + 3], 0x44);
    x[i + 3] = _mm512_shuffle_ps(y[i + 1], y[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    y[i] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x88);
    y[i + 4] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xDD);
    y[i + 8] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0x88);
    y[i + 12] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0xDD);
  }
  for (int i = 0; i < 8; ++i) {
    const int at = i % 4 + i / 4 * 4;
    x[at] = _mm512_shuffle_f32x4(y[at], y[at + 8], 0x88);
    x[at + 8] = _mm512_shuffle_f32x4(y[at], y[at + 8], 0xDD);
  }
}
#endif

// to[i · stride + c] = from[c · plane + i]
template <typename T>
void from_planes(const T* from, int64_t plane, int64_t channels, int64_t count, float* to,
                 int64_t stride) {
  int64_t c = 0;
#if BLAQ_ISA_AVX512
  for (; count > 1 && c < channels; c += 16) {
    const int rows = static_cast<int>(std::min<int64_t>(16, channels - c));
    const __mmask16 lanes = static_cast<__mmask16>((1u << rows) - 1);
    for (int64_t i = 0; i < count; i += 16) {
      const int columns = static_cast<int>(std::min<int64_t>(16, count - i));
      const __mmask16 some = static_cast<__mmask16>((1u << columns) - 1);
      __m512 x[16];
      for (int r = 0; r < 16; ++r) {
        x[r] = r < rows ? load_some(from + (c + r) * plane + i, some) : _mm512_setzero_ps();
      }
      transpose(x);
      for (int j = 0; j < columns; ++j)
        _mm512_mask_storeu_ps(to + (i + j) * stride + c, lanes, x[j]);
    }
  }
#endif
  for (; c < channels; ++c) {
    for (int64_t i = 0; i < count; ++i)
      to[i * stride + c] = static_cast<float>(from[c * plane + i]);
  }
}

// to[j · plane + r] = from[r · stride + j], r < count, j < width
template <typename S, typename T>
void to_planes(const S* from, int64_t stride, int64_t count, int64_t width, T* to, int64_t plane) {
  int64_t r = 0;
#if BLAQ_ISA_AVX512
  if constexpr (std::is_same_v<S, float> && std::is_same_v<T, float>) {
    for (; r + 4 < count; r += 16) {
      const int rows = static_cast<int>(std::min<int64_t>(16, count - r));
      const __mmask16 some = static_cast<__mmask16>((1u << rows) - 1);
      for (int64_t j = 0; j < width; j += 16) {
        const int columns = static_cast<int>(std::min<int64_t>(16, width - j));
        const __mmask16 lanes = static_cast<__mmask16>((1u << columns) - 1);
        __m512 x[16];
        for (int i = 0; i < 16; ++i) {
          x[i] = i < rows ? load_some(from + (r + i) * stride + j, lanes) : _mm512_setzero_ps();
        }
        transpose(x);
        for (int i = 0; i < columns; ++i)
          _mm512_mask_storeu_ps(to + (j + i) * plane + r, some, x[i]);
      }
    }
    for (; r + 4 == count && width % 16 == 0; r += 4) {
      for (int64_t j = 0; j < width; j += 16) {
        __m512 x[4];
        for (int i = 0; i < 4; ++i) x[i] = _mm512_loadu_ps(from + (r + i) * stride + j);
        const __m512 a = _mm512_unpacklo_ps(x[0], x[1]), b = _mm512_unpackhi_ps(x[0], x[1]);
        const __m512 c = _mm512_unpacklo_ps(x[2], x[3]), d = _mm512_unpackhi_ps(x[2], x[3]);
        x[0] = _mm512_shuffle_ps(a, c, 0x44), x[1] = _mm512_shuffle_ps(a, c, 0xEE);
        x[2] = _mm512_shuffle_ps(b, d, 0x44), x[3] = _mm512_shuffle_ps(b, d, 0xEE);
        for (int i = 0; i < 4; ++i) {  // lane l has output 4 l + i
          float* at = to + (j + i) * plane + r;
          _mm_storeu_ps(at, _mm512_castps512_ps128(x[i]));
          _mm_storeu_ps(at + 4 * plane, _mm512_extractf32x4_ps(x[i], 1));
          _mm_storeu_ps(at + 8 * plane, _mm512_extractf32x4_ps(x[i], 2));
          _mm_storeu_ps(at + 12 * plane, _mm512_extractf32x4_ps(x[i], 3));
        }
      }
    }
  }
#endif
  for (; r < count; r += 32) {
    const int64_t rows = std::min<int64_t>(32, count - r);
    for (int64_t j = 0; j < width; ++j) {
      S line[32];
      for (int64_t i = 0; i < rows; ++i) line[i] = from[(r + i) * stride + j];
      narrow_run<S, T>(line, to + j * plane + r, rows);
    }
  }
}
