// One register of an optimizer step and the weighted sums of its result; see foreach_isa.h. The order of
// every rounding is the source's: all variants give the same bits.
#include "cpu/lanes.h"

typedef double Doubles __attribute__((vector_size(4 * kLanes)));
constexpr int kHalf = kLanes / 2;

static inline float magnitude(float x) { return __builtin_fabsf(x); }
static inline Floats magnitude(Floats x) { return (Floats)((Words)x & 0x7FFFFFFF); }

static inline float larger(float a, float b) { return a > b ? a : b; }

template <typename T>
static inline T floored(T d) {
  return larger(d, T{} + kCurvatureFloor);
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

// Lines that the hardware's prefetchers do not fetch in time: a page ends every 1024 elements, and each
// stream has its own. 8 lines ahead is best of 1 to 128; farther ahead, streams evict one another.
template <typename... Streams>
static inline void fetch_ahead(int64_t i, Streams... streams) {
  constexpr int64_t kAhead = 128;
  (__builtin_prefetch(streams + i + kAhead), ...);
}

// Where an update leaves its result. For one bit the signs are all that the rest of the step needs.
struct KeepValues {
  float* w;
  float* d;
  template <typename T>
  void put(int64_t i, int, T target, T curvature) {
    store(w + i, target);
    store(d + i, curvature);
  }
};

struct KeepCurvature {
  float* d;
  template <typename T>
  void put(int64_t i, int, T, T curvature) {
    store(d + i, curvature);
  }
};

struct KeepSigns {
  uint16_t* negative;  // bit i mod 16 of word i / 16
  uint32_t word = 0;
  void put(int64_t i, int r, Floats target, Floats) {
    word |= negative_lanes(target) << (r * kLanes);
    if (r == kSumLanes / kLanes - 1) negative[i / kSumLanes] = static_cast<uint16_t>(word), word = 0;
  }
  void put(int64_t i, int lane, float target, float) {
    if (lane == 0) negative[i / kSumLanes] = 0;
    negative[i / kSumLanes] |= static_cast<uint16_t>((target < 0.0f) << lane);
  }
};

template <typename Keep>
static void trial_of(const float* grad, const float* latent, const float* m, const float* v, int64_t n,
                     const StepScalars& scalars, Keep keep, Sums* sums) {
  const StepScalars s = scalars;
  LaneSums lanes(*sums);
  int64_t i = sum_registers(n, lanes, [&](int64_t at, int r, ShortSums& partial) {
    if (r == 0) fetch_ahead(at, grad, latent, m, v);
    Floats curvature;
    const Floats target = trial_at<Floats>(grad, latent, m, v, at, s, &curvature);
    keep.put(at, r, target, curvature);
    partial.add(r, magnitude(target), floored(curvature));
  });
  lanes.save(sums);
  for (int l = 0; i < n; ++i, ++l) {
    float curvature;
    const float target = trial_at<float>(grad, latent, m, v, i, s, &curvature);
    keep.put(i, l, target, curvature);
    add_weighted(sums, l, magnitude(target), floored(curvature));
  }
}

static void trial(const float* grad, const float* latent, const float* m, const float* v, int64_t n,
                  const StepScalars& s, float* w, float* d, Sums* sums) {
  trial_of(grad, latent, m, v, n, s, KeepValues{w, d}, sums);
}

static void trial_signs(const float* grad, const float* latent, const float* m, const float* v, int64_t n,
                        const StepScalars& s, uint16_t* negative, Sums* sums) {
  trial_of(grad, latent, m, v, n, s, KeepSigns{negative}, sums);
}

// Returns how many signs are new, where KeepSigns keeps them.
template <bool kTrial, bool kClip, typename Keep>
static int64_t step_of(const float* grad, const float* trial_grad, float* latent, float* m, float* v,
                       int64_t n, const StepScalars& scalars, Keep keep, Sums* sums) {
  constexpr bool kSigns = std::is_same_v<Keep, KeepSigns>;
  const StepScalars s = scalars;
  LaneSums lanes(*sums);
  int64_t changed = 0;
  int64_t i = sum_registers(n, lanes, [&](int64_t at, int r, ShortSums& partial) {
    if (r == 0) fetch_ahead(at, grad, latent, m, v);
    if (kTrial && r == 0) fetch_ahead(at, trial_grad);
    Floats curvature;
    const Floats before = load(latent + at);
    const Floats w = step_at<Floats, kTrial, kClip>(grad, trial_grad, latent, m, v, at, s, &curvature);
    store(latent + at, w);
    if (kSigns) changed += __builtin_popcount(negative_lanes(before) ^ negative_lanes(w));
    keep.put(at, r, w, curvature);
    partial.add(r, magnitude(w), floored(curvature));
  });
  lanes.save(sums);
  for (int l = 0; i < n; ++i, ++l) {
    float curvature;
    const float w = step_at<float, kTrial, kClip>(grad, trial_grad, latent, m, v, i, s, &curvature);
    changed += (latent[i] < 0.0f) != (w < 0.0f);
    latent[i] = w;
    keep.put(i, l, w, curvature);
    add_weighted(sums, l, magnitude(w), floored(curvature));
  }
  return changed;
}

template <typename Keep>
static int64_t step_keeping(const float* grad, const float* trial_grad, float* latent, float* m, float* v,
                            int64_t n, const StepScalars& s, Keep keep, Sums* sums) {
  const auto run = trial_grad ? (s.clip > 0 ? step_of<true, true, Keep> : step_of<true, false, Keep>)
                              : (s.clip > 0 ? step_of<false, true, Keep> : step_of<false, false, Keep>);
  return run(grad, trial_grad, latent, m, v, n, s, keep, sums);
}

static void step(const float* grad, const float* trial_grad, float* latent, float* m, float* v, int64_t n,
                 const StepScalars& s, float* d, Sums* sums) {
  step_keeping(grad, trial_grad, latent, m, v, n, s, KeepCurvature{d}, sums);
}

static int64_t step_signs(const float* grad, const float* trial_grad, float* latent, float* m, float* v,
                          int64_t n, const StepScalars& s, uint16_t* negative, Sums* sums) {
  return step_keeping(grad, trial_grad, latent, m, v, n, s, KeepSigns{negative}, sums);
}

// v was β2·old + (1 - β2)g², g the gradient of Eq. 9: what remains of v without g is β2·old.
template <typename T, bool kTrial>
static inline T left_curvature_at(const float* grad, const float* trial_grad, const float* v, int64_t i,
                                  const StepScalars& s) {
  const auto sqrt = [](T x) { return root(x); };
  const T moment = load_as(v + i, T{});
  if constexpr (!kTrial) return curvature_of(moment, s, sqrt);
  const T g = load_as(grad + i, T{}), gt = load_as(trial_grad + i, T{}), both = blended(g, gt, s);
  const T old = larger(moment - s.one_minus_beta2 * (both * both), T{});
  return blended(curvature_of(old + s.one_minus_beta2 * (g * g), s, sqrt),
                 curvature_of(old + s.one_minus_beta2 * (gt * gt), s, sqrt), s);
}

template <bool kTrial>
static void curvature_left(const float* grad, const float* trial_grad, const float* v, int64_t n,
                           const StepScalars& s, float* d) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    store(d + i, left_curvature_at<Floats, kTrial>(grad, trial_grad, v, i, s));
  }
  for (; i < n; ++i) d[i] = left_curvature_at<float, kTrial>(grad, trial_grad, v, i, s);
}

static void curvature(const float* grad, const float* trial_grad, const float* v, int64_t n,
                      const StepScalars& s, float* d) {
  (trial_grad ? curvature_left<true> : curvature_left<false>)(grad, trial_grad, v, n, s, d);
}

static void weighted_sums(const float* w, const float* d, int64_t n, Sums* sums) {
  LaneSums lanes(*sums);
  int64_t i = sum_registers(n, lanes, [&](int64_t at, int r, ShortSums& partial) {
    partial.add(r, magnitude(load(w + at)), floored(load(d + at)));
  });
  lanes.save(sums);
  for (int l = 0; i < n; ++i, ++l) add_weighted(sums, l, magnitude(w[i]), floored(d[i]));
}
