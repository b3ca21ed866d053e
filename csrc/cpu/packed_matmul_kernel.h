// See packed_matmul.h and foreach_isa.h.
#include "cpu/lanes.h"

constexpr int kWords = 16;  // a block is 16 words of 32 inputs: a cache line of a plane's row
constexpr int64_t kCache = 32 << 10;  // bytes of tables or inputs that a tile reads again and again

// Input that the at-th digit of a word with four planes is the code of, counted over all words.
inline int64_t digit_input(int64_t at) { return at / 32 * 32 + at % 8 * 4 + at / 8 % 4; }

// Bit planes of 32 inputs to digits of 4 bits. With two planes the i-th digit of word p has the
// codes of inputs 4i + p and 4i + p + 2, with four planes that of input 4i + p.
template <int WORDS>
inline void interleave(Words* plane, int64_t step) {
  const auto mix = [](Words& a, Words& b, int by, uint32_t low) {
    const Words first = (a & low) | ((b & low) << by);
    b = ((a >> by) & low) | (b & ~low);
    a = first;
  };
  if constexpr (WORDS >= 2) mix(plane[0], plane[step], 1, 0x55555555);
  if constexpr (WORDS == 4) {
    mix(plane[2 * step], plane[3 * step], 1, 0x55555555);
    mix(plane[0], plane[2 * step], 2, 0x33333333);
    mix(plane[step], plane[3 * step], 2, 0x33333333);
  }
}

// words[i · step], i < 4·quads: 4 bytes of each of kLanes rows of a plane. `rows` and `bytes` say
// how many there are; past the last row anything is read, past the last byte of a row zeros.
inline void load_words(const uint8_t* row, int64_t stride, int64_t rows, int64_t bytes, int quads,
                       Words* words, int64_t step) {
  if (rows >= kLanes && bytes >= 16 * quads) {
    for (int i = 0; i < quads; ++i)
      transpose_16_bytes(row + 16 * i, stride, words + 4 * i * step, step);
    return;
  }
  alignas(64) uint8_t edge[kLanes * 4 * kWords] = {};
  const int64_t count = bytes < 16 * quads ? bytes : 16 * quads;
  for (int i = 0; i < kLanes && i < rows; ++i)
    std::memcpy(edge + i * 4 * kWords, row + i * stride, count);
  for (int i = 0; i < quads; ++i) {
    transpose_16_bytes(edge + 16 * i, 4 * kWords, words + 4 * i * step, step);
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
        load_words(from, row_bytes, weight.n - row, row_bytes - at, (words + 3) / 4, to,
                   WORDS * NB);
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
        Floats sum[kTerms];
        for (int j = 0; j < kTerms; ++j) {
          sum[j] = load(coefficients + 16 * j + half) * x[4 * i + p + WORDS * j];
        }
        if constexpr (kTerms == 4) sum[1] += sum[2] + sum[3];
        store(tables + 16 * (8 * p + i) + half, sum[0] + sum[1]);
      }
    }
  }
}

// A chunk of inputs made ready for every output, in tiles of a few rows.
struct Chunk {
  int words;
  float* data;  // of a tile: tables by row, or the inputs of each digit for all of the tile's rows
  int64_t first_group = 0, groups = 0;  // that the chunk touches
  float* panel = nullptr;               // [groups][outputs]: their scales
  int32_t* scale_at = nullptr;  // where in the panel, for each word (tables) or digit (levels)
};

// total[r][b] += what the tables of row r say of the digits of group b, from `word` on.
template <int WORDS, bool GROUPS, int MR, int NB>
void add_by_tables(const Words* digits, int words, const Chunk& chunk, int64_t word, float* total) {
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
        if (GROUPS) sum[r][b] *= load(chunk.panel + chunk.scale_at[word + at] + b * kLanes);
        store(to, load(to) + sum[r][b]);
      }
    }
  }
}

// total[r][b] += input × level, code by code.
template <bool GROUPS, int MR, int NB>
void add_by_levels(const Words* digits, int words, const float* levels, const Chunk& chunk,
                   int64_t word, float* total) {
  const float* x = chunk.data + word * 32 * MR;
  const int32_t* scale_at = GROUPS ? chunk.scale_at + word * 32 : nullptr;
  Floats sum[MR][NB] = {};
  for (int p = 0; p < 4 * words; ++p) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      Floats level[NB];
#pragma GCC unroll 4
      for (int b = 0; b < NB; ++b) {
        level[b] = lookup(levels, digits[b] >> (4 * i));
        if (GROUPS) level[b] *= load(chunk.panel + scale_at[i] + b * kLanes);
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
    if (GROUPS) scale_at += 8;
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

// Totals become outputs: times the scale unless groups have seen to it, plus the bias.
inline void finish(const PackedMatrix& weight, int64_t n, int count, const float* total,
                   float* out) {
  for (int i = 0; i < count; ++i) {
    const float scale =
        weight.group_size > 0 ? 1.0f : weight.scale[weight.group_size == 0 ? 0 : n + i];
    out[i] = total[i] * scale + (weight.bias ? weight.bias[n + i] : 0.0f);
  }
}

// Rows of a tile: accumulators fill the 32 registers of AVX-512, the 16 of the others.
template <bool TABLES>
constexpr int kTile = (TABLES ? 1 : 2) * (BLAQ_ISA_AVX512 ? 4 : 2);

// Tiles that share the digits of a block: tables of more rows would leave the cache.
template <bool TABLES>
constexpr int kTiles = TABLES ? 1 : kRows / kTile<false>;

// As many rows as a tile that has `left` of them computes, itself among them.
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
  chunk.panel = space.panel.take(chunk.groups * width);
  chunk.scale_at = reinterpret_cast<int32_t*>(space.scale_at.take(chunk.words * 32));
  for (int64_t i = 0; i < (TABLES ? chunk.words : chunk.words * 32); ++i) {
    const int64_t k = word0 * 32 + (TABLES ? i * 32 : digit_input(i));
    chunk.scale_at[i] = static_cast<int32_t>((group_of(k) - chunk.first_group) * width);
  }
}

// The chunk's panel for the outputs from `n` on.
inline void load_scales(const PackedMatrix& weight, int64_t n, int width, const Chunk& chunk) {
  const int64_t groups = (weight.k + weight.group_size - 1) / weight.group_size;
  for (int lane = 0; lane < width; ++lane) {
    const float* scale =
        weight.scale + std::min(n + lane, weight.n - 1) * groups + chunk.first_group;
    for (int64_t g = 0; g < chunk.groups; ++g) chunk.panel[g * width + lane] = scale[g];
  }
}

// out[r][j] for up to kTiles tiles of rows, NB groups of outputs at a time. WORDS: see interleave.
template <bool TABLES, int WORDS, bool GROUPS, int NB>
void multiply_tiles(const PackedMatrix& weight, const float* rows, int64_t stride, int count,
                    int64_t begin, int64_t end, float* out, int64_t out_stride, Workspace& space) {
  constexpr int kWidth = NB * kLanes, kMost = kTile<TABLES>;
  const int64_t word_bytes = (TABLES ? WORDS * 512 : 128) * tile_rows<TABLES>(count);
  const int64_t chunk_words = kCache / word_bytes, words = stride / 32;
  const int64_t tile_floats = chunk_words * word_bytes / 4;
  alignas(64) float coefficients[4 * 16];
  for (int i = 0; TABLES && i < 64; ++i) {
    coefficients[i] = weight.levels[(i % 16) >> (i / 16 * WORDS) & ((1 << WORDS) - 1)];
  }
  alignas(64) float total[kMost * kTiles<TABLES> * kWidth];
  alignas(64) Words digits[kWords * WORDS * NB];
  int64_t word0 = 0;
  do {
    Chunk chunk{static_cast<int>(std::min(chunk_words, words - word0)),
                space.data.take(tile_floats * kTiles<TABLES>)};
    for (int r = 0; r < count; r += kMost) {
      Chunk tile = chunk;
      tile.data += r / kMost * tile_floats;
      prepare<TABLES, WORDS>(coefficients, rows + r * stride, stride, std::min(count - r, kMost),
                             word0, tile);
    }
    if (GROUPS) prepare_scales<TABLES>(weight, word0, kWidth, chunk, space);
    for (int64_t n = begin; n < end; n += kWidth) {
      const int width = static_cast<int>(std::min<int64_t>(end - n, kWidth));
      std::memset(total, 0, sizeof total);
      for (int r = 0; word0 > 0 && r < count; ++r) {
        std::memcpy(total + r * kWidth, out + r * out_stride + n - begin, width * sizeof(float));
      }
      if (GROUPS) load_scales(weight, n, kWidth, chunk);
      for (int64_t word = 0; word < chunk.words; word += kWords) {
        const int block = static_cast<int>(std::min<int64_t>(chunk.words - word, kWords));
        load_digits<WORDS, NB>(weight, n, word0 + word, block, digits);
        for (int r = 0; r < count; r += kMost) {
          Chunk tile = chunk;
          tile.data += r / kMost * tile_floats;
          float* sums = total + r * kWidth;
          const auto add = [&]<int MR>() {
            if constexpr (MR <= kMost) {
              if constexpr (TABLES) {
                add_by_tables<WORDS, GROUPS, MR, NB>(digits, block, tile, word, sums);
              } else {
                add_by_levels<GROUPS, MR, NB>(digits, block, weight.levels, tile, word, sums);
              }
            }
          };
          switch (tile_rows<TABLES>(count - r)) {
            case 1:
              add.template operator()<1>();
              break;
            case 2:
              add.template operator()<2>();
              break;
            case 4:
              add.template operator()<4>();
              break;
            default:
              add.template operator()<8>();
          }
        }
      }
      for (int r = 0; r < count; ++r) {
        float* to = out + r * out_stride + n - begin;
        if (word0 + chunk.words < words) {
          std::memcpy(to, total + r * kWidth, width * sizeof(float));
        } else {
          finish(weight, n, width, total + r * kWidth, to);
        }
      }
    }
    word0 += chunk.words;
  } while (word0 < words);
}

template <bool TABLES, int WORDS>
void multiply(const PackedMatrix& weight, const float* rows, int64_t stride, int count,
              int64_t begin, int64_t end, float* out, int64_t out_stride, Workspace& space) {
  constexpr int kMost = kTile<TABLES> * kTiles<TABLES>;
  for (int r = 0; r < count; r += kMost) {
    const int left = std::min(count - r, kMost);
    constexpr int kGroups = TABLES && BLAQ_ISA_AVX512 ? 4 : 2;
    const auto run = left > 1
                         ? (weight.group_size > 0 ? multiply_tiles<TABLES, WORDS, true, kGroups>
                                                  : multiply_tiles<TABLES, WORDS, false, kGroups>)
                         : (weight.group_size > 0 ? multiply_tiles<TABLES, WORDS, true, 4>
                                                  : multiply_tiles<TABLES, WORDS, false, 4>);
    run(weight, rows + r * stride, stride, left, begin, end, out + r * out_stride, out_stride,
        space);
  }
}
