// Nearest levels of a codebook times a scale: codes, values and the sums of a refit; see foreach_isa.h.
// update_kernel.h is included before.

static inline Words bits_of(Floats x) { return (Words)x; }
static inline uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }
static inline Floats float_of(Words u) { return (Floats)u; }
static inline float float_of(uint32_t u) { return std::bit_cast<float>(u); }

// Any codebook: |w| against each threshold in turn. `unit` times its level is a weight's value.
template <int kCount>
struct AnyLevels {
  float threshold[kMaxLevels], level[kMaxLevels];
  bool has_zero;

  AnyLevels(const Codebook& book, float scale, float unit) : has_zero(book.level[0] == 0.0f) {
    for (int j = 0; j < kCount; ++j) threshold[j] = book.mid[j] * scale, level[j] = book.level[j] * unit;
  }
  template <typename T>
  T value(T abs_w) const {
    T y = T{} + level[0];
    for (int j = 0; j + 1 < kCount; ++j) y = abs_w >= threshold[j] ? T{} + level[j + 1] : y;
    return y;
  }
  template <typename T>
  auto index(T abs_w) const {
    auto i = bits_of(T{});
    for (int j = 0; j + 1 < kCount; ++j) i = abs_w >= threshold[j] ? bits_of(T{}) + (j + 1) : i;
    return i;
  }
};

// Levels 1, 1/2, 1/4, …: thresholds are ¾α, ⅜α, …, floats of one mantissa, so a subtraction of bits
// counts the steps down from α, as a float's exponent has them.
struct Pow2Levels {
  static constexpr int kExponent = 23;
  uint32_t first, most, unit_bits;
  static constexpr bool has_zero = false;

  Pow2Levels(const Codebook& book, float scale, float unit)
      : first(bits_of(book.count > 1 ? book.mid[book.count - 2] * scale : 0.0f) + (1u << kExponent) - 1),
        most(static_cast<uint32_t>(book.count - 1) << kExponent), unit_bits(bits_of(unit)) {}
  // Steps down, in the exponent's place.
  template <typename T>
  auto steps(T abs_w) const {
    using Bits = decltype(bits_of(T{}));
    using Signed = std::conditional_t<std::is_same_v<T, float>, int32_t, Ints>;
    const Bits known = bits_of(larger(abs_w, T{}));  // NaN is on the lowest level
    const Signed down = (Signed)((Bits{} + first - known) & 0xFF800000u), top = Signed{} + (int32_t)most;
    const Signed some = down > 0 ? down : Signed{};
    return (Bits)(some < top ? some : top);
  }
  template <typename T>
  T value(T abs_w) const {
    return float_of(unit_bits - steps(abs_w));
  }
  template <typename T>
  auto index(T abs_w) const {
    return (most - steps(abs_w)) >> kExponent;
  }
};

// body(levels): the inner loops know what they compare with.
template <typename Body>
static inline void with_levels(const Codebook& book, float scale, float unit, const Body& body) {
  if (book.is_pow2 && scale >= kScaleTiny && scale < __builtin_inff()) {  // no level is subnormal
    return body(Pow2Levels(book, scale, unit));
  }
  switch (book.count) {
    case 1: return body(AnyLevels<1>(book, scale, unit));
    case 2: return body(AnyLevels<2>(book, scale, unit));
    case 3: return body(AnyLevels<3>(book, scale, unit));
    case 4: return body(AnyLevels<4>(book, scale, unit));
    case 5: return body(AnyLevels<5>(book, scale, unit));
    case 6: return body(AnyLevels<6>(book, scale, unit));
    case 7: return body(AnyLevels<7>(book, scale, unit));
    default: return body(AnyLevels<8>(book, scale, unit));
  }
}

template <typename Levels>
static void level_sums_of(const float* w, const float* d, int64_t n, const Levels levels, Sums* sums) {
  LaneSums lanes(*sums);
  int64_t i = sum_registers(n, lanes, [&](int64_t at, int r, ShortSums& partial) {
    const Floats abs_w = magnitude(load(w + at)), beta = levels.value(abs_w);
    const Floats db = floored(load(d + at)) * beta;
    partial.first[r] += db * abs_w;
    partial.second[r] += db * beta;
  });
  lanes.save(sums);
  for (int l = 0; i + l < n; ++l) {
    const float a = magnitude(w[i + l]);
    const double b = levels.value(a), db = static_cast<double>(floored(d[i + l])) * b;
    sums->first[l] += db * static_cast<double>(a);
    sums->second[l] += db * b;
  }
}

static void level_sums(const float* w, const float* d, int64_t n, const Codebook& book, float scale,
                       Sums* sums) {
  with_levels(book, scale, 1.0f, [&](const auto& levels) { level_sums_of(w, d, n, levels, sums); });
}

// A zero level has one code.
template <typename T, typename Levels>
static inline auto code_of(T w, const Levels& levels, int sign_shift) {
  const auto index = levels.index(magnitude(w));
  const auto sign = bits_of(T{}) + (1u << sign_shift);
  auto code = w < 0.0f ? index | sign : index;
  if (levels.has_zero) code = index > 0 ? code : index;
  return code;
}

template <typename T, typename Levels>
static inline T value_of(T w, const Levels& levels) {
  const T y = levels.value(magnitude(w));
  const T signed_y = w < 0.0f ? float_of(bits_of(y) | 0x80000000u) : y;
  return levels.has_zero ? signed_y + 0.0f : signed_y;  // a zero level has no sign: -0 + 0 is +0
}

template <typename Levels>
static void codes_of(const float* w, int64_t n, const Levels levels, int sign_shift, uint8_t* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_bytes(out + i, code_of(load(w + i), levels, sign_shift));
  for (; i < n; ++i) out[i] = static_cast<uint8_t>(code_of(w[i], levels, sign_shift));
}

static void codes(const float* w, int64_t n, const Codebook& book, float scale, uint8_t* out) {
  with_levels(book, scale, scale,
              [&](const auto& levels) { codes_of(w, n, levels, book.sign_shift, out); });
}

template <bool kFlips, typename Levels>
static int64_t values_of(const float* w, int64_t n, const Levels levels, int sign_shift,
                         const uint8_t* old_codes, bool streams, float* out) {
  Words same{};  // counts down
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    fetch_ahead(i, w);
    const Floats x = load(w + i);
    put(out + i, value_of(x, levels), streams);
    if constexpr (kFlips) same += (Words)(code_of(x, levels, sign_shift) == load_bytes(old_codes + i));
  }
  int64_t flips = i;
  for (int l = 0; l < kLanes; ++l) flips += static_cast<int32_t>(same[l]);
  for (; i < n; ++i) {
    out[i] = value_of(w[i], levels);
    if constexpr (kFlips) flips += code_of(w[i], levels, sign_shift) != old_codes[i];
  }
  return kFlips ? flips : 0;
}

static int64_t values(const float* w, int64_t n, const Codebook& book, float scale,
                      const uint8_t* old_codes, bool streams, float* out) {
  int64_t flips = 0;
  streams = streams && can_stream(out);
  with_levels(book, scale, scale, [&](const auto& levels) {
    const auto run = old_codes ? values_of<true, std::decay_t<decltype(levels)>>
                               : values_of<false, std::decay_t<decltype(levels)>>;
    flips = run(w, n, levels, book.sign_shift, old_codes, streams, out);
  });
  return flips;
}

// One bit: the scale with the signs that KeepSigns kept.
static void sign_values(const uint16_t* negative, int64_t n, float scale, bool streams, float* out) {
  Words bit;
  for (int l = 0; l < kLanes; ++l) bit[l] = 1u << l;
  const Words positive = Words{} + bits_of(scale);
  streams = streams && can_stream(out);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const uint32_t word = negative[i / kSumLanes] >> (i % kSumLanes);
    put(out + i, (Floats)((bit & word) != 0 ? positive | 0x80000000u : positive), streams);
  }
  for (; i < n; ++i) {
    out[i] = float_of(bits_of(scale) | (negative[i / kSumLanes] >> i % kSumLanes & 1u) << 31);
  }
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
    const auto u = static_cast<int32_t>(bits_of(magnitude(w[i])));
    largest = u > largest ? u : largest;
  }
  return float_of(static_cast<uint32_t>(largest));
}
