// The functions of TrainingKernels, once for each variant; see foreach_isa.h. Plain loops: the compiler
// vectorises them, and without contraction the order of every rounding is the source's.

// One native register, and half of its lanes as doubles.
#if BLAQ_ISA_AVX512
constexpr int kLanes = 16;
#elif BLAQ_ISA_AVX2
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kHalf = kLanes / 2;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef double Doubles __attribute__((vector_size(8 * kHalf)));

static inline Floats broadcast(float x) { return Floats{} + x; }

static inline Floats load(const float* p) {
  Floats x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

static inline void store(float* p, Floats x) { __builtin_memcpy(p, &x, sizeof x); }

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

static inline void widen_halves(Floats x, Doubles& low, Doubles& high) {
#if BLAQ_ISA_AVX512
  low = (Doubles)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x));
  high = (Doubles)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1));
#elif BLAQ_ISA_AVX2
  low = (Doubles)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x));
  high = (Doubles)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1));
#elif defined(__x86_64__)
  low = (Doubles)_mm_cvtps_pd((__m128)x);
  high = (Doubles)_mm_cvtps_pd(_mm_movehl_ps((__m128)x, (__m128)x));
#else
  low = Doubles{x[0], x[1]};
  high = Doubles{x[2], x[3]};
#endif
}

static inline Floats magnitude(Floats x) { return (Floats)((Ints)x & 0x7FFFFFFF); }

static inline Floats floored(Floats d) {
  const Floats least = broadcast(kCurvatureFloor);
  return d > least ? d : least;
}

// Σ of two terms a lane, in registers: lane l of both sums is elements l, l + 16, l + 32, …
struct LaneSums {
  static constexpr int kRegisters = kSumLanes / kHalf;
  Doubles first[kRegisters], second[kRegisters];

  explicit LaneSums(const Sums& sums) {
    __builtin_memcpy(first, sums.first, sizeof first);
    __builtin_memcpy(second, sums.second, sizeof second);
  }
  void save(Sums* sums) const {
    __builtin_memcpy(sums->first, first, sizeof first);
    __builtin_memcpy(sums->second, second, sizeof second);
  }
};

// The same two sums in float32 over at most four elements a lane, as many as an error of 2^-23 allows:
// widening each element alone would cost more than the update itself.
struct ShortSums {
  static constexpr int kGroups = 4;
  Floats first[kSumLanes / kLanes] = {}, second[kSumLanes / kLanes] = {};

  void add(int r, Floats abs_w, Floats d) {
    first[r] += d * abs_w;
    second[r] += d;
  }
  void flush(LaneSums& lanes) const {
    for (int r = 0; r < kSumLanes / kLanes; ++r) {
      Doubles a[2], dd[2];
      widen_halves(first[r], a[0], a[1]);
      widen_halves(second[r], dd[0], dd[1]);
      for (int h = 0; h < 2; ++h) {
        lanes.first[2 * r + h] += a[h];
        lanes.second[2 * r + h] += dd[h];
      }
    }
  }
};

// body(i, r, sums) for every whole register, r its place among the lanes; the first index left over.
template <typename Body>
static inline __attribute__((always_inline)) int64_t sum_registers(int64_t n, LaneSums& lanes,
                                                                   const Body& body) {
  int64_t i = 0;
  while (i + kSumLanes <= n) {
    ShortSums sums;
    const int64_t whole = n / kSumLanes * kSumLanes, stop = i + ShortSums::kGroups * kSumLanes;
    for (const int64_t end = stop < whole ? stop : whole; i < end; i += kSumLanes) {
      for (int r = 0; r < kSumLanes / kLanes; ++r) body(i + r * kLanes, r, sums);
    }
    sums.flush(lanes);
  }
  return i;
}

static inline void add_weighted(Sums* sums, int lane, float abs_w, float d) {
  sums->first[lane] += static_cast<double>(d) * static_cast<double>(abs_w);
  sums->second[lane] += d;
}

static inline float root(float x) { return __builtin_sqrtf(x); }

static inline Floats root(Floats x) {
#if BLAQ_ISA_AVX512
  return (Floats)_mm512_sqrt_ps((__m512)x);
#elif BLAQ_ISA_AVX2
  return (Floats)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
  return (Floats)_mm_sqrt_ps((__m128)x);
#elif defined(__aarch64__)
  return (Floats)vsqrtq_f32((float32x4_t)x);
#else
  return Floats{root(x[0]), root(x[1]), root(x[2]), root(x[3])};
#endif
}

static inline float load_as(const float* p, float) { return *p; }
static inline Floats load_as(const float* p, Floats) { return load(p); }
static inline void store(float* p, float x) { *p = x; }

// One element, or one register of them, at index i. Returns w = ω*.
template <typename T>
static inline T trial_at(const float* grad, const float* latent, const float* m, const float* v, int64_t i,
                         const StepScalars& s, T* d) {
  const T g = load_as(grad + i, T{});
  *d = curvature_of(second_moment(load_as(v + i, T{}), g, s), s, [](T x) { return root(x); });
  return target_of(load_as(latent + i, T{}), first_moment(load_as(m + i, T{}), g, s), *d, s);
}

template <typename T, bool kTrial, bool kClip>
static inline T step_at(const float* grad, const float* trial_grad, const float* latent, float* m, float* v,
                        int64_t i, const StepScalars& s, T* d) {
  const auto sqrt = [](T x) { return root(x); };
  T g = load_as(grad + i, T{});
  const T old = load_as(v + i, T{});
  T moment = second_moment(old, g, s);
  *d = curvature_of(moment, s, sqrt);
  if constexpr (kTrial) {
    const T gt = load_as(trial_grad + i, T{});
    *d = blended(*d, curvature_of(second_moment(old, gt, s), s, sqrt), s);  // Eq. 10
    g = blended(g, gt, s);                                                  // Eq. 9
    moment = second_moment(old, g, s);
  }
  const T first = first_moment(load_as(m + i, T{}), g, s);
  store(m + i, first);
  store(v + i, moment);
  T w = target_of(load_as(latent + i, T{}), first, *d, s);  // Eq. 8
  if constexpr (kClip) {
    const T most = T{} + s.clip;
    w = w > most ? most : w;
    w = w < -most ? -most : w;
  }
  return w;
}

static void trial(const float* grad, const float* latent, const float* m, const float* v, int64_t n,
                  const StepScalars& scalars, float* w, float* d, Sums* sums) {
  const StepScalars s = scalars;
  LaneSums lanes(*sums);
  int64_t i = sum_registers(n, lanes, [&](int64_t at, int r, ShortSums& partial) {
    Floats curvature;
    const Floats target = trial_at<Floats>(grad, latent, m, v, at, s, &curvature);
    store(w + at, target);
    store(d + at, curvature);
    partial.add(r, magnitude(target), floored(curvature));
  });
  lanes.save(sums);
  for (int l = 0; i < n; ++i, ++l) {
    w[i] = trial_at<float>(grad, latent, m, v, i, s, d + i);
    add_weighted(sums, l, magnitude(w[i]), floored(d[i]));
  }
}

template <bool kTrial, bool kClip>
static int64_t step_of(const float* grad, const float* trial_grad, float* latent, float* m, float* v,
                       int64_t n, const StepScalars& scalars, float* d, Sums* sums) {
  const StepScalars s = scalars;
  LaneSums lanes(*sums);
  Ints changed{};
  int64_t i = sum_registers(n, lanes, [&](int64_t at, int r, ShortSums& partial) {
    Floats curvature;
    const Floats before = load(latent + at);
    const Floats w = step_at<Floats, kTrial, kClip>(grad, trial_grad, latent, m, v, at, s, &curvature);
    store(latent + at, w);
    store(d + at, curvature);
    changed -= (before < 0.0f) ^ (w < 0.0f);
    partial.add(r, magnitude(w), floored(curvature));
  });
  lanes.save(sums);
  int64_t count = 0;
  for (int l = 0; l < kLanes; ++l) count += changed[l];
  for (int l = 0; i < n; ++i, ++l) {
    const float w = step_at<float, kTrial, kClip>(grad, trial_grad, latent, m, v, i, s, d + i);
    count += (latent[i] < 0.0f) != (w < 0.0f);
    latent[i] = w;
    add_weighted(sums, l, magnitude(w), floored(d[i]));
  }
  return count;
}

static int64_t step(const float* grad, const float* trial_grad, float* latent, float* m, float* v, int64_t n,
                    const StepScalars& s, float* d, Sums* sums) {
  const bool clips = s.clip > 0;
  if (trial_grad) {
    return clips ? step_of<true, true>(grad, trial_grad, latent, m, v, n, s, d, sums)
                 : step_of<true, false>(grad, trial_grad, latent, m, v, n, s, d, sums);
  }
  return clips ? step_of<false, true>(grad, nullptr, latent, m, v, n, s, d, sums)
               : step_of<false, false>(grad, nullptr, latent, m, v, n, s, d, sums);
}

static void weighted_sums(const float* w, const float* d, int64_t n, Sums* sums) {
  LaneSums lanes(*sums);
  int64_t i = sum_registers(n, lanes, [&](int64_t at, int r, ShortSums& partial) {
    partial.add(r, magnitude(load(w + at)), floored(load(d + at)));
  });
  lanes.save(sums);
  for (int l = 0; i < n; ++i, ++l) add_weighted(sums, l, magnitude(w[i]), floored(d[i]));
}

template <int kCount>
static void level_sums_of(const float* w, const float* d, int64_t n, const Codebook& book, float scale,
                          Sums* sums) {
  float threshold[kCount], level[kCount];
  for (int j = 0; j < kCount; ++j) threshold[j] = book.mid[j] * scale, level[j] = book.level[j];
  LaneSums lanes(*sums);
  int64_t i = sum_registers(n, lanes, [&](int64_t at, int r, ShortSums& partial) {
    const Floats abs_w = magnitude(load(w + at));
    Floats beta = broadcast(level[0]);
    for (int j = 0; j + 1 < kCount; ++j) {
      beta = abs_w >= broadcast(threshold[j]) ? broadcast(level[j + 1]) : beta;
    }
    const Floats db = floored(load(d + at)) * beta;
    partial.first[r] += db * abs_w;
    partial.second[r] += db * beta;
  });
  lanes.save(sums);
  for (int l = 0; i + l < n; ++l) {
    const float a = magnitude(w[i + l]);
    float beta = level[0];
    for (int j = 0; j + 1 < kCount; ++j) beta = a >= threshold[j] ? level[j + 1] : beta;
    const double b = beta, db = static_cast<double>(floored(d[i + l])) * b;
    sums->first[l] += db * static_cast<double>(a);
    sums->second[l] += db * b;
  }
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
  Ints most{};  // non-negative floats ascend as their bits do, NaN above all
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Ints u = (Ints)magnitude(load(w + i));
    most = u > most ? u : most;
  }
  int32_t largest = 0;
  for (int l = 0; l < kLanes; ++l) largest = most[l] > largest ? most[l] : largest;
  for (; i < n; ++i) {
    const auto u = static_cast<int32_t>(bits_of_float(magnitude(w[i])));
    largest = u > largest ? u : largest;
  }
  return float_of_bits(static_cast<uint32_t>(largest));
}

// Sums in double: a pile of equal weights, as clipping makes, would lose a float sum's digits one by one.
static inline void add_terms(Pair* sums, const float* terms) {
#if defined(__x86_64__)
  const __m128d wide = _mm_cvtps_pd(_mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(terms))));
  _mm_storeu_pd(&sums->first, _mm_add_pd(_mm_loadu_pd(&sums->first), wide));
#else
  sums->first += terms[0];
  sums->second += terms[1];
#endif
}

static void histogram(const float* w, const float* d, int64_t n, int base, int bins, Pair* out) {
  constexpr int kPiece = 256;
  int32_t bin[kPiece];
  float terms[2 * kPiece];  // d|w| and d of each element
  for (int64_t start = 0; start < n; start += kPiece) {
    const int count = static_cast<int>(n - start < kPiece ? n - start : kPiece);
    for (int i = 0; i < count; ++i) {
      const float a = magnitude(w[start + i]);
      const int32_t b = static_cast<int32_t>(bits_of_float(a) >> kBinShift) - base;
      const int32_t low = b < 0 ? 0 : b;
      bin[i] = low >= bins ? bins - 1 : low;
      const float least = floored(d[start + i]);
      terms[2 * i] = least * a;
      terms[2 * i + 1] = least;
    }
    for (int i = 0; i < count; ++i) add_terms(out + bin[i], terms + 2 * i);
  }
}

struct Thresholds {
  float at[kMaxLevels], value[kMaxLevels];

  Thresholds(const Codebook& book, float scale) {
    for (int j = 0; j < book.count; ++j) at[j] = book.mid[j] * scale, value[j] = book.level[j] * scale;
  }
};

// Code of each lane, one a 32-bit integer.
template <int kCount>
static inline Ints code_of(Floats w, const Thresholds& thresholds, int sign_shift, bool zero_level) {
  const Floats a = magnitude(w);
  Ints index{};
  for (int j = 0; j + 1 < kCount; ++j) index = a >= broadcast(thresholds.at[j]) ? Ints{} + (j + 1) : index;
  Ints negative = w < 0.0f;
  if (zero_level) negative &= index > 0;  // a zero level has one code
  return index | (negative & (1 << sign_shift));
}

template <int kCount>
static inline float value_of(float w, const Thresholds& thresholds) {
  const float a = magnitude(w);
  float y = thresholds.value[0];
  for (int j = 0; j + 1 < kCount; ++j) y = a >= thresholds.at[j] ? thresholds.value[j + 1] : y;
  return (w < 0.0f ? -y : y) + 0.0f;  // a zero level has no sign: -0 + 0 is +0
}

template <int kCount>
static inline uint8_t code_of(float w, const Thresholds& thresholds, int sign_shift, bool zero_level) {
  const float a = magnitude(w);
  int index = 0;
  for (int j = 0; j + 1 < kCount; ++j) index += a >= thresholds.at[j];
  const bool negative = w < 0.0f && (index > 0 || !zero_level);
  return static_cast<uint8_t>(index | negative << sign_shift);
}

template <int kCount>
static void codes_of(const float* w, int64_t n, const Codebook& book, float scale, uint8_t* __restrict out) {
  constexpr int kPiece = 256;
  int32_t wide[kPiece];
  const Thresholds thresholds(book, scale);
  const int shift = book.sign_shift;
  const bool zero = book.level[0] == 0.0f;
  int64_t i = 0;
  for (; i + kPiece <= n; i += kPiece) {
    for (int k = 0; k < kPiece; k += kLanes) {
      const Ints code = code_of<kCount>(load(w + i + k), thresholds, shift, zero);
      __builtin_memcpy(wide + k, &code, sizeof code);
    }
    for (int k = 0; k < kPiece; ++k) out[i + k] = static_cast<uint8_t>(wide[k]);
  }
  for (; i < n; ++i) out[i] = code_of<kCount>(w[i], thresholds, shift, zero);
}

static void codes(const float* w, int64_t n, const Codebook& book, float scale, uint8_t* out) {
  with_count(book.count, [&](auto count) { codes_of<count()>(w, n, book, scale, out); });
}

template <int kCount, bool kFlips>
static int64_t values_of(const float* w, int64_t n, const Codebook& book, float scale,
                         const uint8_t* old_codes, float* out) {
  constexpr int kPiece = 256;
  int32_t old[kPiece];
  const Thresholds thresholds(book, scale);
  const int shift = book.sign_shift;
  const bool zero = book.level[0] == 0.0f;
  Ints changed{};
  int64_t i = 0;
  for (; i + kLanes <= n;) {
    const int64_t stop = (n - i < kPiece ? n - i : kPiece) / kLanes * kLanes;
    if constexpr (kFlips) {
      for (int64_t k = 0; k < stop; ++k) old[k] = old_codes[i + k];
    }
    for (int64_t k = 0; k < stop; k += kLanes) {
      const Floats x = load(w + i + k), a = magnitude(x);
      Floats y = broadcast(thresholds.value[0]);
      for (int j = 0; j + 1 < kCount; ++j) {
        y = a >= broadcast(thresholds.at[j]) ? broadcast(thresholds.value[j + 1]) : y;
      }
      store(out + i + k, (x < 0.0f ? -y : y) + 0.0f);  // -0 + 0 is +0
      if constexpr (kFlips) {
        Ints before;
        __builtin_memcpy(&before, old + k, sizeof before);
        changed -= code_of<kCount>(x, thresholds, shift, zero) != before;
      }
    }
    i += stop;
  }
  int64_t flips = 0;
  for (int l = 0; l < kLanes; ++l) flips += changed[l];
  for (; i < n; ++i) {
    out[i] = value_of<kCount>(w[i], thresholds);
    if constexpr (kFlips) flips += code_of<kCount>(w[i], thresholds, shift, zero) != old_codes[i];
  }
  return flips;
}

static int64_t values(const float* w, int64_t n, const Codebook& book, float scale,
                      const uint8_t* old_codes, float* out) {
  int64_t flips = 0;
  with_count(book.count, [&](auto count) {
    flips = old_codes ? values_of<count(), true>(w, n, book, scale, old_codes, out)
                      : values_of<count(), false>(w, n, book, scale, nullptr, out);
  });
  return flips;
}

static void signs(const float* __restrict w, int64_t n, uint8_t* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = w[i] < 0.0f;
}

static void sign_values(const uint8_t* __restrict negative, int64_t n, float scale, float* __restrict out) {
  const uint32_t positive = bits_of_float(scale);
  for (int64_t i = 0; i < n; ++i) out[i] = float_of_bits(positive | static_cast<uint32_t>(negative[i]) << 31);
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
    values, signs,  sign_values, scaled_update, blend_range, stream};
