// See packed_matmul.h and foreach_isa.h.
#include "cpu/lanes.h"

constexpr int kWords = 16;     // a block is 16 words of 32 inputs: a cache line of a plane's row
constexpr int kMoreWords = 4;  // that a last block or chunk may have rather than leave so few
constexpr int64_t kCache = 32 << 10;  // bytes of tables or inputs that a tile reads again and again

// Input that the at-th digit of a word with four planes is the code of, counted over all words.
inline int64_t digit_input(int64_t at) { return at / 32 * 32 + at % 8 * 4 + at / 8 % 4; }

// words[i · step], i < 4·quads: 4 bytes of each of kLanes rows of a plane that ends at `end`.
// `rows` and `bytes` say how many there are: past the last row it is read again, past its bytes
// zeros.
inline void load_words(const uint8_t* row, int64_t stride, int64_t rows, int64_t bytes, int quads,
                       const uint8_t* end, Words* words, int64_t step) {
  for (int i = 0; i < quads; ++i, row += 16, bytes -= 16) {
    if (rows >= kLanes && bytes >= 16) {
      transpose_16_bytes(row, stride, words + 4 * i * step, step);
      continue;
    }
    const int64_t count = std::min<int64_t>(bytes, 16);
    uint64_t mask[2] = {};
    std::memset(mask, 0xff, count);
    uint64_t edge[kLanes][2] = {};
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint8_t* from = row + std::min<int64_t>(lane, rows - 1) * stride;
      std::memcpy(edge[lane], from, end - from >= 16 ? 16 : count);
      edge[lane][0] &= mask[0];
      edge[lane][1] &= mask[1];
    }
    transpose_16_bytes(reinterpret_cast<uint8_t*>(edge), 16, words + 4 * i * step, step);
  }
}

// digits[word][p][b]: the codes of NB groups of kLanes outputs from `n` on, `words` words from
// `word` on.
template <int WORDS, int NB>
inline void load_digits(const PackedMatrix& weight, int64_t n, int64_t word, int words,
                        Words* digits) {
  const int64_t row_bytes = (weight.k + 7) / 8, at = word * 4;
  for (int b = 0; b < NB; ++b) {
    const int64_t row = n + b * kLanes < weight.n ? n + b * kLanes : weight.n - 1;
    for (int p = 0; p < WORDS; ++p) {
      Words* to = digits + p * NB + b;
      if (p < weight.bits) {
        const uint8_t* from = weight.qweight + (p * weight.n + row) * row_bytes + at;
        if (at % 64 == 0) {
          for (int i = 0; i < kLanes; ++i)
            __builtin_prefetch(from + (NB * kLanes + i) * row_bytes, 0, 2);
        }
        load_words(from, row_bytes, weight.n - row, row_bytes - at, (words + 3) / 4,
                   weight.qweight + weight.bits * weight.n * row_bytes, to, WORDS * NB);
      } else {
        for (int i = 0; i < words; ++i) to[i * WORDS * NB] = Words{};
      }
    }
    for (int i = 0; i < words; ++i) interleave<WORDS>(digits + i * WORDS * NB + b, NB);
  }
}

// The 16 sums that the inputs of a digit can make, for 32 inputs: 8·WORDS tables.
template <int WORDS>
inline void build_tables(const float* x, const float* coefficients, float* tables) {
  constexpr int kTerms = 4 / WORDS;
  for (int p = 0; p < WORDS; ++p) {
    for (int i = 0; i < 8; ++i) {
      for (int half = 0; half < 16; half += kLanes) {
        Floats sum = load(coefficients + half) * x[4 * i + p];
        for (int j = 1; j < kTerms; ++j) {
          const Floats input = broadcast(x[4 * i + p + WORDS * j]);
          sum = multiply_add(load(coefficients + 16 * j + half), input, sum);
        }
        store(tables + 16 * (8 * p + i) + half, sum);
      }
    }
  }
}

// Where the scale comes in: at the end, or with its group; or in each weight, which is then
// rounded.
enum Scaling { kByOutput, kByGroup, kRoundToBf16, kRoundToHalf };

template <Scaling SCALING>
inline Floats scaled(Floats level, Floats scale) {
  if constexpr (SCALING == kRoundToBf16) return round_to_bf16(level * scale);
  if constexpr (SCALING == kRoundToHalf) return round_to_half(level * scale);
  return level * scale;
}

// A chunk of inputs made ready for every output, in tiles of a few rows.
struct Chunk {
  float* data;  // of a tile: tables by row, or the inputs of each digit for all of the tile's rows
  int words = 0;
  int64_t first_group = 0, groups = 0;  // that the chunk touches
  float* panel = nullptr;               // [groups][outputs]: their scales
  int32_t* scale_at = nullptr;  // where in the panel, for each word (tables) or digit (levels)
};

// total[r][b] += what the tables of row r say of the digits of group b, from `word` on.
template <int WORDS, Scaling SCALING, int MR, int NB>
[[gnu::noinline]] void add_by_tables(const Words* digits, int words, const Chunk& chunk,
                                     int64_t word, float* total) {
  const int64_t row = int64_t{chunk.words} * WORDS * 128;
  const float* tables = chunk.data + word * WORDS * 128;
  for (int at = 0; at < words; ++at) {
    Floats sum[MR][NB] = {};
#pragma GCC unroll 2
    for (int p = 0; p < WORDS; ++p) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
          for (int b = 0; b < NB; ++b) {
            sum[r][b] += lookup(tables + r * row + 16 * i, digit(digits[p * NB + b], i));
            settle(sum[r][b]);
          }
        }
      }
      tables += 128;
    }
    digits += WORDS * NB;
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
      for (int b = 0; b < NB; ++b) {
        float* to = total + (r * NB + b) * kLanes;
        if (SCALING != kByOutput)
          sum[r][b] *= load(chunk.panel + chunk.scale_at[word + at] + b * kLanes);
        store(to, load(to) + sum[r][b]);
      }
    }
  }
}

// total[r][b] += input × level, code by code.
template <Scaling SCALING, int MR, int NB>
[[gnu::noinline]] void add_by_levels(const Words* digits, int words, const float* levels,
                                     const Chunk& chunk, int64_t word, float* total) {
  const float* x = chunk.data + word * 32 * MR;
  const int32_t* scale_at = SCALING != kByOutput ? chunk.scale_at + word * 32 : nullptr;
  Floats sum[MR][NB] = {};
  for (int p = 0; p < 4 * words; ++p) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      Floats level[NB];
#pragma GCC unroll 4
      for (int b = 0; b < NB; ++b) {
        level[b] = lookup(levels, digits[b] >> (4 * i));
        if (SCALING != kByOutput) {
          level[b] = scaled<SCALING>(level[b], load(chunk.panel + scale_at[i] + b * kLanes));
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) {
        const Floats input = broadcast(x[i * MR + r]);
#pragma GCC unroll 4
        for (int b = 0; b < NB; ++b) sum[r][b] = multiply_add(level[b], input, sum[r][b]);
      }
    }
    digits += NB;
    x += 8 * MR;
    if (SCALING != kByOutput) scale_at += 8;
    if (p % 16 == 15 || p + 1 == 4 * words) {  // sums of 128 products: less rounding error
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
        for (int b = 0; b < NB; ++b) {
          float* to = total + (r * NB + b) * kLanes;
          store(to, load(to) + sum[r][b]);
          sum[r][b] = Floats{};
        }
      }
    }
  }
}

// Totals become outputs: times the scale, unless groups have seen to it, plus the bias.
inline void finish(const PackedMatrix& weight, int64_t n, int count, float* total) {
  if (weight.group_size == -1) {
    for (int i = 0; i < count; ++i) total[i] *= rounded(weight.scale[n + i], weight.round_scale);
  } else if (weight.group_size == 0) {
    const float scale = rounded(*weight.scale, weight.round_scale);
    for (int i = 0; i < count; ++i) total[i] *= scale;
  }
  for (int i = 0; weight.bias && i < count; ++i) total[i] += weight.bias[n + i];
}

// Rows of a tile and groups of outputs: accumulators fill the 32 registers of AVX-512, or 16.
template <bool TABLES>
constexpr int kTile = (TABLES ? 1 : 2) * (BLAQ_ISA_AVX512 ? 4 : 2);
template <bool TABLES>
constexpr int kGroups = TABLES && BLAQ_ISA_AVX512 ? 4 : 2;
constexpr int kSingleGroups = 4;  // of one row alone

// Rows that a tile with `left` of them computes, itself among them: as few as its code is made for.
template <bool TABLES>
constexpr int tile_rows(int left) {
  return left >= kTile<TABLES> || left > 4 ? kTile<TABLES> : left > 2 ? 4 : left;
}

template <bool TABLES, int WORDS>
void prepare(const float* coefficients, const float* rows, int64_t stride, int count, int64_t word0,
             const Chunk& chunk) {
  if constexpr (TABLES) {
    for (int r = 0; r < count; ++r) {
      for (int64_t i = 0; i < chunk.words; ++i) {
        build_tables<WORDS>(rows + r * stride + (word0 + i) * 32, coefficients,
                            chunk.data + (r * chunk.words + i) * WORDS * 128);
      }
    }
  } else {
    const int width = tile_rows<false>(count);
    for (int64_t at = 0; at < chunk.words * 32; ++at) {
      const float* x = rows + word0 * 32 + digit_input(at);
      for (int r = 0; r < width; ++r) chunk.data[at * width + r] = r < count ? x[r * stride] : 0.0f;
    }
  }
}

template <bool TABLES>
void prepare_scales(const PackedMatrix& weight, int64_t word0, int width, Chunk& chunk,
                    Workspace& space) {
  if (chunk.words == 0) return;
  const auto group_of = [&](int64_t k) { return std::min(k, weight.k - 1) / weight.group_size; };
  chunk.first_group = group_of(word0 * 32);
  chunk.groups = group_of((word0 + chunk.words) * 32) - chunk.first_group + 1;
  chunk.panel = space.panel.take((chunk.groups + 3) * width);
  chunk.scale_at = reinterpret_cast<int32_t*>(space.scale_at.take(chunk.words * 32));
  for (int64_t i = 0; i < (TABLES ? chunk.words : chunk.words * 32); ++i) {
    const int64_t k = word0 * 32 + (TABLES ? i * 32 : digit_input(i));
    chunk.scale_at[i] = static_cast<int32_t>((group_of(k) - chunk.first_group) * width);
  }
}

// The chunk's panel for NB groups of outputs from `n` on.
template <int NB>
void load_scales(const PackedMatrix& weight, int64_t n, const Chunk& chunk) {
  const int64_t groups = (weight.k + weight.group_size - 1) / weight.group_size;
  const auto bytes = [&](int64_t row, int64_t group) {
    return reinterpret_cast<const uint8_t*>(weight.scale + row * groups + group);
  };
  for (int b = 0; b < NB; ++b) {
    const int64_t row = std::min(n + b * kLanes, weight.n - 1);
    load_words(bytes(row, chunk.first_group), groups * 4, weight.n - row,
               (groups - chunk.first_group) * 4, static_cast<int>((chunk.groups + 3) / 4),
               bytes(weight.n, 0), reinterpret_cast<Words*>(chunk.panel) + b, NB);
  }
  for (int64_t i = 0; i < chunk.groups * NB * kLanes; i += kLanes) {
    if (weight.round_scale == Rounding::none) break;
    const Floats scale = load(chunk.panel + i);
    const bool half = weight.round_scale == Rounding::half;
    store(chunk.panel + i, half ? round_to_half(scale) : round_to_bf16(scale));
  }
}

// The totals of one tile, by the code for its number of rows.
template <bool TABLES, int WORDS, Scaling SCALING, int NB>
void add_tile(const PackedMatrix& weight, const Words* digits, int words, const Chunk& tile,
              int64_t word, int left, float* total) {
  const auto add = [&]<int MR>() {
    if constexpr (MR <= kTile<TABLES> && (MR == 1 || NB == kGroups<TABLES>)) {
      if constexpr (TABLES) {
        add_by_tables<WORDS, SCALING, MR, NB>(digits, words, tile, word, total);
      } else {
        add_by_levels<SCALING, MR, NB>(digits, words, weight.levels, tile, word, total);
      }
    }
  };
  const int rows = tile_rows<TABLES>(left);
  if (rows == 1) return add.template operator()<1>();
  if (rows == 2) return add.template operator()<2>();
  if (rows == 4) return add.template operator()<4>();
  return add.template operator()<8>();
}

// WORDS: see interleave.
template <bool TABLES, int WORDS, Scaling SCALING, int NB>
void multiply_groups(const PackedMatrix& weight, const Product& product, Workspace& space) {
  constexpr int kWidth = NB * kLanes, kRowsOfTile = kTile<TABLES>;
  const int count = product.count, tiles = (count + kRowsOfTile - 1) / kRowsOfTile;
  const int64_t word_bytes = (TABLES ? WORDS * 512 : 128) * tile_rows<TABLES>(count);
  const int64_t chunk_words = kCache / word_bytes, words = product.row_stride / 32;
  const int64_t tile_floats = (chunk_words + kMoreWords) * word_bytes / 4;
  const auto next = [](int64_t most, int64_t left) {
    return left <= most + kMoreWords ? left : most;
  };
  alignas(64) float coefficients[4 * 16];
  for (int i = 0; TABLES && i < 64; ++i) {
    coefficients[i] = weight.levels[(i % 16) >> (i / 16 * WORDS) & ((1 << WORDS) - 1)];
  }
  alignas(64) float total[kRows * kWidth];
  alignas(64) Words digits[(kWords + kMoreWords) * WORDS * NB];
  Chunk chunk{space.data.take(tile_floats * tiles)};
  const auto tile_of = [&](int r) {
    Chunk tile = chunk;
    tile.data += r / kRowsOfTile * tile_floats;
    return tile;
  };
  int64_t word0 = 0;
  do {
    chunk.words = static_cast<int>(next(chunk_words, words - word0));
    const bool last = word0 + chunk.words == words;
    for (int r = 0; r < count; r += kRowsOfTile) {
      prepare<TABLES, WORDS>(coefficients, product.rows + r * product.row_stride,
                             product.row_stride, std::min(count - r, kRowsOfTile), word0,
                             tile_of(r));
    }
    if (SCALING != kByOutput) prepare_scales<TABLES>(weight, word0, kWidth, chunk, space);
    for (int64_t n = product.begin; n < product.end; n += kWidth) {
      const int width = static_cast<int>(std::min<int64_t>(product.end - n, kWidth));
      float* out = product.out + n - product.begin;
      std::memset(total, 0, tiles * kRowsOfTile * kWidth * sizeof(float));
      for (int r = 0; word0 > 0 && r < count; ++r) {
        std::memcpy(total + r * kWidth, out + r * product.out_stride, width * sizeof(float));
      }
      if (SCALING != kByOutput) load_scales<NB>(weight, n, chunk);
      for (int64_t word = 0, block; word < chunk.words; word += block) {
        block = next(kWords, chunk.words - word);
        load_digits<WORDS, NB>(weight, n, word0 + word, block, digits);
        for (int r = 0; r < count; r += kRowsOfTile) {
          add_tile<TABLES, WORDS, SCALING, NB>(weight, digits, block, tile_of(r), word, count - r,
                                               total + r * kWidth);
        }
      }
      for (int r = 0; r < count; ++r) {
        if (last) finish(weight, n, width, total + r * kWidth);
        std::memcpy(out + r * product.out_stride, total + r * kWidth, width * sizeof(float));
      }
    }
    word0 += chunk.words;
  } while (word0 < words);
}

template <bool TABLES, int WORDS, Scaling SCALING>
void multiply_scaled(const PackedMatrix& weight, const Product& product, Workspace& space) {
  const auto run = product.count == 1 ? multiply_groups<TABLES, WORDS, SCALING, kSingleGroups>
                                      : multiply_groups<TABLES, WORDS, SCALING, kGroups<TABLES>>;
  run(weight, product, space);
}

template <bool TABLES, int WORDS>
void multiply(const PackedMatrix& weight, const Product& product, Workspace& space) {
  if constexpr (!TABLES) {
    if (weight.round_weight == Rounding::bf16) {
      return multiply_scaled<TABLES, WORDS, kRoundToBf16>(weight, product, space);
    }
    if (weight.round_weight == Rounding::half) {
      return multiply_scaled<TABLES, WORDS, kRoundToHalf>(weight, product, space);
    }
  }
  const auto run = weight.group_size > 0 ? multiply_scaled<TABLES, WORDS, kByGroup>
                                         : multiply_scaled<TABLES, WORDS, kByOutput>;
  run(weight, product, space);
}
