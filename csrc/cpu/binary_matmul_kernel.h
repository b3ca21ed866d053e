// Counts of the bits in which rows of inputs and rows of a weight differ; see foreach_isa.h. A lane is an
// output: a word of inputs meets that word of kLanes outputs in one register.

#if BLAQ_ISA_AVX512
BLAQ_BEGIN_TARGET(
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,avx2,fma,f16c")
constexpr int kLanes = 8, kTileRows = 8, kTileBlocks = 2;
#elif BLAQ_ISA_AVX2
constexpr int kLanes = 4, kTileRows = 4, kTileBlocks = 1;
#else
constexpr int kLanes = 2, kTileRows = 2, kTileBlocks = 1;
#endif

typedef uint64_t Lanes __attribute__((vector_size(8 * kLanes)));
typedef int32_t Counts __attribute__((vector_size(4 * kLanes)));

// ones(x) counts in each lane (AVX-512) or in each byte, which a run of kRun words cannot overflow;
// per_lane() adds the bytes up.
#if BLAQ_ISA_AVX512
constexpr int64_t kRun = INT64_MAX / 2;
inline Lanes ones(Lanes x) { return (Lanes)_mm512_popcnt_epi64((__m512i)x); }
inline Lanes per_lane(Lanes x) { return x; }
#elif BLAQ_ISA_AVX2
constexpr int64_t kRun = 31;
inline Lanes ones(Lanes x) {
  const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                         0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const __m256i digit = _mm256_set1_epi8(15), all = (__m256i)x;
  const __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(all, digit));
  const __m256i high =
      _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(all, 4), digit));
  return (Lanes)_mm256_add_epi8(low, high);
}
inline Lanes per_lane(Lanes x) {
  return (Lanes)_mm256_sad_epu8((__m256i)x, _mm256_setzero_si256());
}
#else
constexpr int64_t kRun = 31;
inline Lanes ones(Lanes x) {
#if defined(__aarch64__)
  return (Lanes)vcntq_u8((uint8x16_t)x);
#else
  constexpr uint64_t kPairs = 0x5555555555555555, kDigits = 0x3333333333333333;
  x -= x >> 1 & kPairs;
  x = (x & kDigits) + (x >> 2 & kDigits);
  return (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0f;
#endif
}
inline Lanes per_lane(Lanes x) {
  x = (x & 0x00ff00ff00ff00ff) + (x >> 8 & 0x00ff00ff00ff00ff);
  x += x >> 16;
  return (x + (x >> 32)) & 0xffff;
}
#endif

// kRows rows against kBlocks blocks of 8 outputs. The order of words of a weight is BinaryMatrix's.
template <int kRows, int kBlocks>
inline void count_tile(const uint64_t* weight, int64_t block, const uint64_t* rows, int64_t stride,
                       int64_t words, int32_t* counts, int64_t counts_stride) {
  constexpr int kParts = 8 / kLanes, kRegisters = kBlocks * kParts;
  Lanes total[kRows][kRegisters] = {};
  for (int64_t first = 0; first < words; first += kRun) {
    const int64_t last = std::min(words, first + kRun);
    Lanes run[kRows][kRegisters] = {};
    for (int64_t w = first; w < last; ++w) {
      Lanes of_weight[kRegisters];
      for (int i = 0; i < kRegisters; ++i) {
        const uint64_t* from = weight + i / kParts * block + w * 8 + i % kParts * kLanes;
        std::memcpy(&of_weight[i], from, sizeof(Lanes));
      }
      for (int r = 0; r < kRows; ++r) {
        for (int i = 0; i < kRegisters; ++i) {
          run[r][i] += ones(of_weight[i] ^ rows[r * stride + w]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < kRegisters; ++i) total[r][i] += per_lane(run[r][i]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kRegisters; ++i) {
      const Counts narrow = __builtin_convertvector(total[r][i], Counts);
      std::memcpy(counts + r * counts_stride + i * kLanes, &narrow, sizeof narrow);
    }
  }
}

template <int kBlocks>
inline void count_blocks(const uint64_t* weight, int64_t block, const uint64_t* rows, int64_t stride,
                         int count, int64_t words, int32_t* counts, int64_t counts_stride) {
  int r = 0;
  const auto tiles = [&]<int kRows>() __attribute__((always_inline)) {
    for (; r + kRows <= count; r += kRows) {
      count_tile<kRows, kBlocks>(weight, block, rows + r * stride, stride, words,
                                 counts + r * counts_stride, counts_stride);
    }
  };
  tiles.template operator()<kTileRows>();
  if constexpr (kTileRows > 4) tiles.template operator()<4>();
  if constexpr (kTileRows > 2) tiles.template operator()<2>();
  tiles.template operator()<1>();
}

// counts[r][j] for outputs j of `blocks` blocks of 8.
inline void count_differences(const uint64_t* weight, int64_t block, int64_t blocks,
                              const uint64_t* rows, int64_t stride, int count, int64_t words,
                              int32_t* counts, int64_t counts_stride) {
  int64_t b = 0;
  for (; b + kTileBlocks <= blocks; b += kTileBlocks) {
    count_blocks<kTileBlocks>(weight + b * block, block, rows, stride, count, words, counts + b * 8,
                              counts_stride);
  }
  for (; b < blocks; ++b) {
    count_blocks<1>(weight + b * block, block, rows, stride, count, words, counts + b * 8,
                    counts_stride);
  }
}

#if BLAQ_ISA_AVX512
BLAQ_END_TARGET
#endif
