// The weighted histogram of |w|; see foreach_isa.h. levels_kernel.h is included before.

// Sums in double: a pile of equal weights, as clipping makes, would lose a float sum's digits one by one.
static inline void add_terms(void* bin, const float* terms) {
  double* const sums = static_cast<double*>(bin);
#if defined(__x86_64__)
  const __m128d wide = _mm_cvtps_pd(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i*)terms)));
  _mm_storeu_pd(sums, _mm_add_pd(_mm_loadu_pd(sums), wide));
#else
  sums[0] += terms[0];
  sums[1] += terms[1];
#endif
}

template <typename T>
static inline auto offset_of(T abs_w, const Bins& bins) {
  using Signed = std::conditional_t<std::is_same_v<T, float>, int32_t, Ints>;
  const Signed at = (Signed)(bits_of(abs_w) >> kBinShift) - bins.base, some = at > 0 ? at : Signed{};
  const Signed highest = Signed{} + (bins.count - 1);
  return (some < highest ? some : highest) * static_cast<int32_t>(sizeof(Pair));
}

static void histogram(const float* w, const float* d, int64_t n, const Bins& bins, const Next& next) {
  constexpr int kPiece = 256;  // offsets and terms are in L1 by the time that they are read
  alignas(64) int32_t offset[kPiece];
  alignas(64) float terms[2 * kPiece];  // d|w| and d of each element
  char* const sums = reinterpret_cast<char*>(bins.sums);
  const char* at[Next::kMost];
  for (int k = 0; k < Next::kMost; ++k) at[k] = next.begin[k];
  int64_t i = 0;
  while (i + kSumLanes <= n) {
    const int count = static_cast<int>(n - i < kPiece ? (n - i) / kSumLanes * kSumLanes : kPiece);
    for (int l = 0; l < count; l += kLanes) {
      const Floats a = magnitude(load(w + i + l)), least = floored(load(d + i + l));
      const Ints to = offset_of(a, bins);
      __builtin_memcpy(offset + l, &to, sizeof to);
      store_pairs(terms + 2 * l, least * a, least);
    }
    for (int l = 0; l < count; l += kSumLanes) {
#pragma GCC unroll 5
      for (int k = 0; k < Next::kMost; ++k) {
        __builtin_prefetch(at[k]);
        at[k] += next.step[k];
      }
#pragma GCC unroll 16
      for (int k = 0; k < kSumLanes; ++k) add_terms(sums + offset[l + k], terms + 2 * (l + k));
    }
    i += count;
  }
  for (; i < n; ++i) {
    const float a = magnitude(w[i]), least = floored(d[i]), both[2] = {least * a, least};
    add_terms(sums + offset_of(a, bins), both);
  }
}
