// What surrounds packed_linear's int8 product, on the host.
#include "cuda/packed_int8_kernel.h"

using namespace blaq;

BLAQ_TEST_EXPORT const char* rows(int type, const void* x, int64_t m, int64_t k, int64_t padded_k, void* out,
                                  float* units) {
  return emulate::message_of([&] {
    if (type == 0) quantize_rows<Fp32>(static_cast<const float*>(x), m, k, padded_k, out, units, nullptr);
    if (type == 1) {
      quantize_rows<Narrow<Fp16>>(static_cast<const uint16_t*>(x), m, k, padded_k, out, units, nullptr);
    }
    if (type == 2) {
      quantize_rows<Narrow<Bf16>>(static_cast<const uint16_t*>(x), m, k, padded_k, out, units, nullptr);
    }
  });
}

BLAQ_TEST_EXPORT const char* decode(const uint8_t* planes, int bits, int64_t n, int64_t row_bytes, int64_t k,
                                    const int8_t* levels, void* out, int64_t padded_n, int64_t padded_k) {
  Int8Levels table;
  std::copy_n(levels, 16, table.of_code);
  return emulate::message_of(
      [&] { decode_int8(planes, bits, n, row_bytes, k, table, out, padded_n, padded_k, nullptr); });
}

BLAQ_TEST_EXPORT const char* scaled(int type, const int32_t* sums, int64_t padded_n, const float* units,
                                    double level_unit, const float* scale, int scale_of_row, const void* bias,
                                    void* out, int64_t m, int64_t n) {
  const auto call = [&]<typename Type>(Type) {
    using Word = typename Type::Word;
    scale_sums<Type>(sums, padded_n, units, static_cast<float>(level_unit), scale, scale_of_row,
                     static_cast<const Word*>(bias), static_cast<Word*>(out), m, n, nullptr);
  };
  return emulate::message_of([&] {
    if (type == 0) call(Fp32());
    if (type == 1) call(Narrow<Fp16>());
    if (type == 2) call(Narrow<Bf16>());
  });
}
