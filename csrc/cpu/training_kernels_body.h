// The functions of TrainingKernels, once for each variant; see foreach_isa.h. Plain loops: the compiler
// vectorises them, and without contraction the order of every rounding is the source's.

static inline float magnitude(float x) { return __builtin_fabsf(x); }
static inline float floored(float d) { return d > kCurvatureFloor ? d : kCurvatureFloor; }

static inline uint32_t bits_of_float(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}

static inline float float_of_bits(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}

static inline uint16_t bf16_of(float x) {
  const uint32_t u = bits_of_float(x);
  const uint32_t rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
  return x != x ? 0x7FC0 : rounded;
}

// Branch-free, so that it vectorises everywhere: exact for normal and subnormal halves.
static inline float float_of_half(uint16_t h) {
  const uint32_t shifted = static_cast<uint32_t>(h & 0x7FFF) << 13;
  const float scaled = float_of_bits(shifted) * 0x1p112f;  // rebias; subnormal inputs become right, too
  const uint32_t special = (shifted >= 0x0F800000u) ? 0x7F800000u : 0u;
  return float_of_bits(bits_of_float(scaled) | special | (static_cast<uint32_t>(h & 0x8000) << 16));
}

static inline uint16_t half_of(float x) {
  const uint32_t u = bits_of_float(x), a = u & 0x7FFFFFFF, sign = (u >> 16) & 0x8000;
  const uint32_t normal = (a - 0x38000000u + 0x0FFF + ((a >> 13) & 1)) >> 13;
  const uint32_t small = bits_of_float(float_of_bits(a) + 0.5f) - 0x3F000000u;  // the adder rounds at 2^-24
  uint32_t h = a < 0x38800000u ? small : normal;
  h = a >= 0x477FF000u ? 0x7C00u : h;
  h = a > 0x7F800000u ? 0x7E00u : h;
  return static_cast<uint16_t>(h | sign);
}

static void widen(Dtype dtype, const void* in, float factor, int64_t n, float* __restrict out) {
  const uint16_t* halves = static_cast<const uint16_t*>(in);
  if (dtype == Dtype::bf16) {
    for (int64_t i = 0; i < n; ++i) out[i] = float_of_bits(static_cast<uint32_t>(halves[i]) << 16) * factor;
  } else if (dtype == Dtype::f16) {
    for (int64_t i = 0; i < n; ++i) out[i] = float_of_half(halves[i]) * factor;
  } else {
    const float* floats = static_cast<const float*>(in);
    for (int64_t i = 0; i < n; ++i) out[i] = floats[i] * factor;
  }
}

static void narrow(Dtype dtype, const float* in, int64_t n, void* out) {
  uint16_t* __restrict halves = static_cast<uint16_t*>(out);
  if (dtype == Dtype::bf16) {
    for (int64_t i = 0; i < n; ++i) halves[i] = bf16_of(in[i]);
  } else if (dtype == Dtype::f16) {
    for (int64_t i = 0; i < n; ++i) halves[i] = half_of(in[i]);
  } else {
    __builtin_memcpy(out, in, n * sizeof(float));
  }
}

static void trial(const float* __restrict grad, const float* __restrict latent, const float* __restrict m,
                  const float* __restrict v, int64_t n, const StepScalars& scalars, float* __restrict w,
                  float* __restrict d) {
  const StepScalars s = scalars;
  for (int64_t i = 0; i < n; ++i) {
    const float curvature = curvature_of(second_moment(v[i], grad[i], s), s);
    d[i] = curvature;
    w[i] = target_of(latent[i], first_moment(m[i], grad[i], s), curvature, s);
  }
}

template <bool kTrial, bool kClip>
static void step_loop(const float* __restrict grad, const float* __restrict trial_grad,
                      float* __restrict latent, float* __restrict m, float* __restrict v, int64_t n,
                      const StepScalars& scalars, float* __restrict d) {
  const StepScalars s = scalars;
  for (int64_t i = 0; i < n; ++i) {
    float g = grad[i];
    const float old = v[i];
    float moment = second_moment(old, g, s);
    float curvature = curvature_of(moment, s);
    if constexpr (kTrial) {
      const float gt = trial_grad[i];
      curvature = blended(curvature, curvature_of(second_moment(old, gt, s), s), s);  // Eq. 10
      g = blended(g, gt, s);                                                         // Eq. 9
      moment = second_moment(old, g, s);
    }
    const float first = first_moment(m[i], g, s);
    float target = target_of(latent[i], first, curvature, s);  // Eq. 8
    if constexpr (kClip) {
      target = target > s.clip ? s.clip : target;
      target = target < -s.clip ? -s.clip : target;
    }
    d[i] = curvature;
    m[i] = first;
    v[i] = moment;
    latent[i] = target;
  }
}

static void step(const float* grad, const float* trial_grad, float* latent, float* m, float* v, int64_t n,
                 const StepScalars& s, float* d) {
  const bool clips = s.clip > 0;
  if (trial_grad) {
    clips ? step_loop<true, true>(grad, trial_grad, latent, m, v, n, s, d)
          : step_loop<true, false>(grad, trial_grad, latent, m, v, n, s, d);
  } else {
    clips ? step_loop<false, true>(grad, nullptr, latent, m, v, n, s, d)
          : step_loop<false, false>(grad, nullptr, latent, m, v, n, s, d);
  }
}

// Sixteen elements at a time, the last ones filled up with zeros: a zero adds nothing.
template <typename Body>
static inline __attribute__((always_inline)) void by_sixteen(const float* w, const float* d, int64_t n,
                                                             const Body& body) {
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes) body(w + i, d + i);
  if (i < n) {
    float last_w[kSumLanes] = {}, last_d[kSumLanes] = {};
    for (int64_t l = 0; i + l < n; ++l) last_w[l] = w[i + l], last_d[l] = d[i + l];
    for (int64_t l = n - i; l < kSumLanes; ++l) last_d[l] = -1.0f;  // marks what does not count
    body(last_w, last_d);
  }
}

// A curvature is never negative; -1 is by_sixteen's mark.
static inline double counted(float d) { return d == -1.0f ? 0.0 : static_cast<double>(floored(d)); }

static void weighted_sums(const float* w, const float* d, int64_t n, Sums* sums) {
  double first[kSumLanes], second[kSumLanes];
  for (int l = 0; l < kSumLanes; ++l) first[l] = sums->first[l], second[l] = sums->second[l];
  by_sixteen(w, d, n, [&](const float* wi, const float* di) {
    for (int l = 0; l < kSumLanes; ++l) {
      const double dd = counted(di[l]);
      first[l] += dd * static_cast<double>(magnitude(wi[l]));
      second[l] += dd;
    }
  });
  for (int l = 0; l < kSumLanes; ++l) sums->first[l] = first[l], sums->second[l] = second[l];
}

template <int kCount>
static void level_sums_of(const float* w, const float* d, int64_t n, const Codebook& book, float scale,
                          Sums* sums) {
  float threshold[kCount], level[kCount];
  for (int j = 0; j < kCount; ++j) threshold[j] = book.mid[j] * scale, level[j] = book.level[j];
  double first[kSumLanes], second[kSumLanes];
  for (int l = 0; l < kSumLanes; ++l) first[l] = sums->first[l], second[l] = sums->second[l];
  by_sixteen(w, d, n, [&](const float* wi, const float* di) {
    for (int l = 0; l < kSumLanes; ++l) {
      const float a = magnitude(wi[l]);
      float beta = level[0];
      for (int j = 0; j + 1 < kCount; ++j) beta = a >= threshold[j] ? level[j + 1] : beta;
      const double b = beta, db = counted(di[l]) * b;
      first[l] += db * static_cast<double>(a);
      second[l] += db * b;
    }
  });
  for (int l = 0; l < kSumLanes; ++l) sums->first[l] = first[l], sums->second[l] = second[l];
}

// body(std::integral_constant) for the codebook's number of magnitudes: the inner loops unroll.
template <typename Body>
static inline void with_count(int count, const Body& body) {
  switch (count) {
    case 1: return body(std::integral_constant<int, 1>{});
    case 2: return body(std::integral_constant<int, 2>{});
    case 3: return body(std::integral_constant<int, 3>{});
    case 4: return body(std::integral_constant<int, 4>{});
    case 5: return body(std::integral_constant<int, 5>{});
    case 6: return body(std::integral_constant<int, 6>{});
    case 7: return body(std::integral_constant<int, 7>{});
    default: return body(std::integral_constant<int, 8>{});
  }
}

static void level_sums(const float* w, const float* d, int64_t n, const Codebook& book, float scale,
                       Sums* sums) {
  with_count(book.count, [&](auto count) { level_sums_of<count()>(w, d, n, book, scale, sums); });
}

static float max_abs(const float* w, int64_t n) {
  uint32_t largest = 0;  // non-negative floats ascend as their bits do
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t u = bits_of_float(magnitude(w[i]));
    const uint32_t known = u > 0x7F800000u ? 0u : u;
    largest = known > largest ? known : largest;
  }
  return float_of_bits(largest);
}

static void histogram(const float* w, const float* d, int64_t n, int base, int bins, Pair* out) {
  constexpr int kPiece = 256;
  int32_t bin[kPiece];
  double first[kPiece], second[kPiece];
  for (int64_t start = 0; start < n; start += kPiece) {
    const int count = static_cast<int>(n - start < kPiece ? n - start : kPiece);
    for (int i = 0; i < count; ++i) {
      const float a = magnitude(w[start + i]);
      const int32_t b = static_cast<int32_t>(bits_of_float(a) >> 17) - base;
      const int32_t low = b < 0 ? 0 : b;
      bin[i] = low >= bins ? bins - 1 : low;
      second[i] = floored(d[start + i]);
      first[i] = second[i] * static_cast<double>(a);
    }
    for (int i = 0; i < count; ++i) {
      Pair& target = out[bin[i]];
      target.first += first[i];
      target.second += second[i];
    }
  }
}

template <int kCount>
static void codes_of(const float* __restrict w, int64_t n, const Codebook& book, float scale,
                     uint8_t* __restrict out) {
  float threshold[kCount];
  for (int j = 0; j < kCount; ++j) threshold[j] = book.mid[j] * scale;
  const uint32_t sign = 1u << book.sign_shift;
  const uint32_t zero_has_sign = book.level[0] != 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    const float a = magnitude(w[i]);
    uint32_t index = 0;
    for (int j = 0; j + 1 < kCount; ++j) index += a >= threshold[j] ? 1u : 0u;
    const bool negative = (w[i] < 0.0f) & ((index > 0) | (zero_has_sign != 0));
    out[i] = static_cast<uint8_t>(index | (negative ? sign : 0u));
  }
}

static void codes(const float* w, int64_t n, const Codebook& book, float scale, uint8_t* out) {
  with_count(book.count, [&](auto count) { codes_of<count()>(w, n, book, scale, out); });
}

template <int kCount>
static void values_of(const float* __restrict w, int64_t n, const Codebook& book, float scale,
                      float* __restrict out) {
  float threshold[kCount], value[kCount];
  for (int j = 0; j < kCount; ++j) threshold[j] = book.mid[j] * scale, value[j] = book.level[j] * scale;
  for (int64_t i = 0; i < n; ++i) {
    const float a = magnitude(w[i]);
    float x = value[0];
    for (int j = 0; j + 1 < kCount; ++j) x = a >= threshold[j] ? value[j + 1] : x;
    out[i] = (w[i] < 0.0f ? -x : x) + 0.0f;  // a zero level has no sign: -0 + 0 is +0
  }
}

static void values(const float* w, int64_t n, const Codebook& book, float scale, float* out) {
  with_count(book.count, [&](auto count) { values_of<count()>(w, n, book, scale, out); });
}

static void signs(const float* __restrict w, int64_t n, uint8_t* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = w[i] < 0.0f;
}

static void sign_values(const uint8_t* __restrict negative, int64_t n, float scale, float* __restrict out) {
  const uint32_t positive = bits_of_float(scale);
  for (int64_t i = 0; i < n; ++i) out[i] = float_of_bits(positive | static_cast<uint32_t>(negative[i]) << 31);
}

static int64_t count_different(const uint8_t* a, const uint8_t* b, int64_t n) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += a[i] != b[i];
  return count;
}

static void scaled_update(const float* __restrict latent, const float* __restrict grad,
                          const float* __restrict curvature, int64_t n, float* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = latent[i] - grad[i] / curvature[i];
}

static void blend_range(const float* __restrict current, const float* __restrict trial_values, float a,
                        float one_minus_a, int64_t n, float* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = a * current[i] + one_minus_a * trial_values[i];
}

static void stream(const void* in, int64_t bytes, void* out) {
#if BLAQ_ISA_AVX512
  if (reinterpret_cast<uintptr_t>(out) % 64 == 0) {
    const char* from = static_cast<const char*>(in);
    char* to = static_cast<char*>(out);
    int64_t i = 0;
    for (; i + 64 <= bytes; i += 64) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
    }
    __builtin_memcpy(to + i, from + i, bytes - i);
    return;
  }
#elif BLAQ_ISA_AVX2
  if (reinterpret_cast<uintptr_t>(out) % 32 == 0) {
    const char* from = static_cast<const char*>(in);
    char* to = static_cast<char*>(out);
    int64_t i = 0;
    for (; i + 32 <= bytes; i += 32) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
    }
    __builtin_memcpy(to + i, from + i, bytes - i);
    return;
  }
#endif
  __builtin_memcpy(out, in, bytes);
}

static const TrainingKernels kTable = {
    widen,  narrow, trial, step,  weighted_sums, level_sums,      max_abs,       histogram,   codes,
    values, signs,  sign_values, count_different, scaled_update, blend_range, stream};
