// packed_linear in 8-bit arithmetic, whole: rows rounded, planes padded, and both ways to multiply.
#include "cuda/int8_linear_kernel.h"
#include "cuda/int8_warpgroup_kernel.h"

using namespace blaq;

BLAQ_TEST_EXPORT const char* order(int64_t seed) {
  emulate::machine.order = static_cast<uint32_t>(seed);
  return nullptr;
}

BLAQ_TEST_EXPORT const char* rows(int64_t type, const void* x, int64_t m, int64_t k, void* chunks) {
  auto* to = static_cast<RowChunk*>(chunks);
  return emulate::message_of([&] {
    if (type == 0) round_rows<Fp32>(static_cast<const float*>(x), m, k, to, nullptr);
    if (type == 1) round_rows<Narrow<Fp16>>(static_cast<const uint16_t*>(x), m, k, to, nullptr);
    if (type == 2) round_rows<Narrow<Bf16>>(static_cast<const uint16_t*>(x), m, k, to, nullptr);
  });
}

BLAQ_TEST_EXPORT const char* pad(const uint8_t* planes, int64_t rows, int64_t row_bytes,
                                 void* out) {
  return emulate::message_of([&] { pad_planes(planes, rows, row_bytes, out, nullptr); });
}

// words [count][2][bits] to fragments [count][4 steps][4].
template <int bits>
void decode_all(const uint32_t* words, int64_t count, const LevelBytes& levels, uint32_t* out) {
  for (int64_t i = 0; i < count * 4; ++i) {
    uint32_t of_two[2][bits], a[4];
    std::copy_n(words + i / 4 * 2 * bits, 2 * bits, &of_two[0][0]);
    decode_fragment<bits>(of_two, i % 4, levels, a);
    std::copy_n(a, 4, out + 4 * i);
  }
}

BLAQ_TEST_EXPORT const char* decode(int64_t bits, const uint32_t* words, int64_t count,
                                    const uint32_t* levels, uint32_t* out) {
  LevelBytes table;
  std::copy_n(levels, 4, table.word);
  const auto run = bits == 1   ? decode_all<1>
                   : bits == 2 ? decode_all<2>
                   : bits == 3 ? decode_all<3>
                               : decode_all<4>;
  run(words, count, table, out);
  return nullptr;
}

BLAQ_TEST_EXPORT const char* product(int64_t by_warpgroups, int64_t bits, int64_t type,
                                     const void* chunks, const uint8_t* planes, int64_t row_bytes,
                                     const float* scale, int64_t scale_stride, int64_t group_size,
                                     const void* bias, void* out, int64_t m, int64_t n, int64_t k,
                                     const uint32_t* levels, double level_unit,
                                     int64_t multiprocessors) {
  Int8Product call = {static_cast<const RowChunk*>(chunks),
                      {planes, n, row_bytes},
                      scale,
                      bias,
                      out,
                      m,
                      static_cast<int>(chunks_of(k)),
                      static_cast<int>(scale_stride),
                      static_cast<int>(group_size / kChunkInputs),
                      {},
                      static_cast<float>(level_unit),
                      static_cast<Number>(type)};
  std::copy_n(levels, 4, call.levels.word);
  const auto run = [&]<int b>() {
    if (by_warpgroups) return launch_by_warpgroups<b>(call, nullptr);
    launch_by_warps<b>(call, nullptr);
  };
  return emulate::message_of([&] {
    emulate::machine.multiprocessors = multiprocessors;
    if (bits == 1) run.template operator()<1>();
    if (bits == 2) run.template operator()<2>();
    if (bits == 3) run.template operator()<3>();
    if (bits == 4) run.template operator()<4>();
  });
}
