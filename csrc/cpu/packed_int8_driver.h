// Rows times a packed weight in 8-bit arithmetic, around the inner loops of a variant (packed_int8_kernel.h,
// packed_int8_bytes.h): inputs become tables or integers tile by tile, chunk by chunk, and every output meets
// them while they are in the L1 cache. The loops bring along:
// - Levels: the codebook as integers; levels_of, unit_of; kTwoForms where add_levels has a form for narrow
//   levels and one for wide ones;
// - kRowsOfTile, kVectors: the shape of a register block; kSegment: inputs of one unit at most;
// - Tables: how many bytes of them an input has, and how many of a tile stay near (kPrepared); the largest sum
//   that must stay within kMost units; build() and add(), a block's products;
// - likewise for levels kMostInput, largest_input, quantize, add_levels.

constexpr float kLeast = 1e-30f;  // inputs below which a unit would be subnormal

// The most inputs that share a unit: a divisor of the group, so that a segment has one scale.
inline int segment_of(int64_t group_size, int most) {
  if (group_size <= 0) return most;
  int segment = most;
  while (group_size % segment != 0) segment -= 32;
  return segment;
}

// What a tile of rows is for every output, chunk by chunk of inputs.
struct Prepared {
  uint8_t* data;  // of row r at r * stride
  int64_t stride;
  float* unit;      // [row][segment]
  int32_t* offset;  // [row][segment]: what the levels' zero adds to a sum
  int64_t segments;
};

// The words of a row that a tile is prepared for at a time.
struct Chunk {
  int64_t word;  // the first
  int words, segment_words;
  bool last;
  float* before;  // [row][output]: what earlier chunks made; only where there are several
  int64_t before_stride;
};

// One shape of the kernel. WORDS 4 is the way by levels.
template <int WORDS, int DIGITS, bool FORM>
struct Kernel {
  static constexpr bool kTables = WORDS < 4;
  using TableWay = Tables<kTables ? WORDS : 1, DIGITS>;
  static constexpr int kInputBytes = kTables ? TableWay::kInputBytes : DIGITS;  // of a prepared input
  static constexpr int64_t kPrepared = kTables ? TableWay::kPrepared : 24 << 10;
  static constexpr int kRows = kRowsOfTile<WORDS, DIGITS>;

  const PackedMatrix& weight;
  const uint8_t* repacked;
  const Levels& levels;
  const TableWay tables;
  const float largest_level;

  Kernel(const PackedMatrix& weight_, const uint8_t* repacked_, const Levels& levels_)
      : weight(weight_), repacked(repacked_), levels(levels_), tables(weight.levels),
        largest_level(::blaq::largest_level(weight.levels, weight.bits)) {}

  // False where the row has no such unit.
  bool prepare(const float* x, int words, int segment_words, uint8_t* data, float* unit,
               int32_t* offset) const {
    constexpr float kMost = kTables ? TableWay::kMost : kMostInput<DIGITS>;
    for (int w = 0; w < words; w += segment_words) {
      const int count = std::min(segment_words, words - w);
      for (int i = 0; i < 2 * count; ++i) __builtin_prefetch(x + (w + count) * 32 + 16 * i);  // the next segment
      float most;
      if constexpr (kTables) {
        most = largest_level * tables.largest(x + w * 32, count * 32);
      } else {
        most = largest_input<DIGITS>(x + w * 32, count * 32, levels);
      }
      const bool zero = most == 0;
      if (!(zero || (most >= kLeast && most <= __FLT_MAX__ / 2))) return false;
      const float inverse = zero ? 0 : kMost / most;
      *unit++ = zero ? 0 : most / kMost * (kTables ? 1 : unit_of<DIGITS>(levels));
      uint8_t* to = data + w * 32 * kInputBytes;
      if constexpr (kTables) {
        tables.build(x + w * 32, count, inverse, to);
      } else {
        *offset++ = quantize<DIGITS>(x + w * 32, count, inverse, levels, to);
      }
    }
    return true;
  }

  // The product of MR rows from `row` on and 16 NV outputs over the prepared words, from word0 on, and all before
  // them, which `before` keeps where there is more than one chunk.
  template <int MR, int NV>
  void add(const Prepared& tile, const Product& product, int row, int64_t output, const Chunk& chunk) const {
    const int64_t step = padded(weight.k) / 32 * WORDS * 64;
    alignas(64) float scale[kMostSegments * 16 * NV], totals[MR][16 * NV];
    if (weight.group_size > 0) group_scales<NV>(output, chunk, scale);
    float* before = chunk.before + row * chunk.before_stride + output - product.begin;
    for (int r = 0; r < MR; ++r) {
      // The result is far away: it comes meanwhile.
      const float* out = product.out + (row + r) * product.out_stride + output - product.begin;
      for (int v = 0; v < NV; ++v) __builtin_prefetch(out + 16 * v, 1);
      if (chunk.word == 0) {
        std::memset(totals[r], 0, sizeof totals[r]);
      } else {
        std::memcpy(totals[r], before + r * chunk.before_stride, sizeof totals[r]);
      }
    }
    const Block block{repacked + output / 16 * step + chunk.word * WORDS * 64, step, tile.data, tile.stride,
                      chunk.words, chunk.segment_words, tile.unit, tile.offset, tile.segments,
                      weight.group_size > 0 ? scale : nullptr, totals[0], 16 * NV};
    if constexpr (kTables) {
      TableWay::template add<MR, NV>(block);
    } else {
      add_levels<DIGITS, FORM, MR, NV>(block, levels);
    }
    for (int r = 0; r < MR; ++r) {
      if (chunk.last) {
        finish(product, row + r, output, std::min<int64_t>(16 * NV, product.end - output), totals[r]);
      } else {
        std::memcpy(before + r * chunk.before_stride, totals[r], sizeof totals[r]);
      }
    }
  }

  // Scales of 16 NV outputs, segment by segment.
  template <int NV>
  void group_scales(int64_t output, const Chunk& chunk, float* scale) const {
    const int64_t groups = (weight.k + weight.group_size - 1) / weight.group_size;
    for (int w = 0; w < chunk.words; w += chunk.segment_words) {
      const int64_t group = (chunk.word + w) * 32 / weight.group_size;
      for (int i = 0; i < 16 * NV; ++i) {
        const int64_t n = std::min(output + i, weight.n - 1);
        *scale++ = rounded(weight.scale[n * groups + group], weight.round_scale);
      }
    }
  }

  void finish(const Product& product, int row, int64_t output, int64_t count, const float* __restrict from) const {
    float* __restrict out = product.out + row * product.out_stride + output - product.begin;
    if (weight.group_size == -1) {
      const float* scale = weight.scale + output;
      for (int64_t i = 0; i < count; ++i) out[i] = from[i] * rounded(scale[i], weight.round_scale);
    } else {
      const float scale = weight.group_size == 0 ? rounded(*weight.scale, weight.round_scale) : 1.0f;
      for (int64_t i = 0; i < count; ++i) out[i] = from[i] * scale;
    }
    if (weight.bias) {
      const float* __restrict bias = weight.bias + output;
      for (int64_t i = 0; i < count; ++i) out[i] += bias[i];
    }
  }

  template <int MR>
  void add_outputs(const Prepared& tile, const Product& product, int row, const Chunk& chunk) const {
    add_blocks<MR, kVectors<WORDS, DIGITS, MR>>(tile, product, row, product.begin, chunk);
  }

  // Outputs from n on, in the widest blocks that fit those there are, rounded up to whole registers.
  template <int MR, int NV>
  void add_blocks(const Prepared& tile, const Product& product, int row, int64_t n, const Chunk& chunk) const {
    for (; n + 16 * (NV - 1) < product.end; n += 16 * NV) add<MR, NV>(tile, product, row, n, chunk);
    if constexpr (NV > 1) add_blocks<MR, NV / 2>(tile, product, row, n, chunk);
  }

  bool run(const Product& product, Buffer& buffer, Buffer& totals_buffer) const {
    const int64_t words = product.row_stride / 32, width = (product.end - product.begin + 15) / 16 * 16;
    const int segment_words = segment_of(weight.group_size, kSegment<WORDS, DIGITS, FORM>) / 32;
    const int rows = std::min(product.count, kRows);
    int64_t most = kPrepared / (32 * kInputBytes * rows) / segment_words * segment_words;
    most = std::clamp<int64_t>(most, segment_words, kMostSegments * segment_words);
    most = std::min(most, words);
    const int64_t segments = (most + segment_words - 1) / segment_words;
    Prepared tile;
    // Rows a multiple of 4096 bytes apart would share the sets of the L1 cache.
    tile.stride = (most * 32 * kInputBytes + 1023) / 1024 * 1024 + 256;
    tile.segments = segments;
    float* memory = buffer.take((tile.stride * kRows) / 4 + 2 * segments * kRows);
    tile.data = reinterpret_cast<uint8_t*>(memory);
    tile.unit = memory + tile.stride * kRows / 4;
    tile.offset = reinterpret_cast<int32_t*>(tile.unit + segments * kRows);
    Chunk chunk{0, 0, segment_words, false, nullptr, width};
    if (most < words) chunk.before = totals_buffer.take(product.count * width);
    for (int r = 0; r < product.count;) {
      const int left = product.count - r, count = left >= kRows ? kRows : std::min(left, 4);
      for (chunk.word = 0; chunk.word < words; chunk.word += most) {
        chunk.words = static_cast<int>(std::min(most, words - chunk.word));
        chunk.last = chunk.word + most >= words;
        for (int i = 0; i < count; ++i) {
          const float* x = product.rows + (r + i) * product.row_stride + chunk.word * 32;
          if (!prepare(x, chunk.words, segment_words, tile.data + i * tile.stride, tile.unit + i * segments,
                       tile.offset + i * segments)) {
            return false;
          }
        }
        const auto add_rows = [&](auto mr) {
          if constexpr (mr <= kRows) {
            if (count == mr) add_outputs<mr>(tile, product, r, chunk);
          }
        };
        add_rows(std::integral_constant<int, 1>{});
        add_rows(std::integral_constant<int, 2>{});
        add_rows(std::integral_constant<int, 3>{});
        add_rows(std::integral_constant<int, 4>{});
        if constexpr (kRows > 4) add_rows(std::integral_constant<int, kRows>{});
      }
      r += count;
    }
    return true;
  }
};

template <int WORDS, int DIGITS, bool FORM>
bool run(const PackedMatrix& weight, const uint8_t* repacked, const Levels& levels, const Product& product,
         Int8Workspace& space) {
  return Kernel<WORDS, DIGITS, FORM>(weight, repacked, levels).run(product, space.prepared, space.totals);
}

template <int DIGITS>
bool multiply_with(const PackedMatrix& weight, const uint8_t* repacked, Accuracy accuracy,
                   const Product& product) {
  thread_local Int8Workspace space;
  const Levels levels = levels_of(weight, accuracy);
  if (weight.bits == 1) return run<1, DIGITS, false>(weight, repacked, levels, product, space);
  if (weight.bits == 2) return run<2, DIGITS, false>(weight, repacked, levels, product, space);
  if constexpr (kTwoForms) {
    if (levels.wide) return run<4, DIGITS, true>(weight, repacked, levels, product, space);
  }
  return run<4, DIGITS, false>(weight, repacked, levels, product, space);
}

static bool multiply_packed(const PackedMatrix& weight, const uint8_t* repacked, Accuracy accuracy,
                            const Product& product) {
  const auto multiply = accuracy == Accuracy::high ? multiply_with<2> : multiply_with<1>;
  return multiply(weight, repacked, accuracy, product);
}
