// binary_linear on the host: all ways to count, all types and tiles.
#include "cuda/binary_warpgroup_kernel.h"

using namespace blaq;

template <typename Type>
const char* multiply(int way, const void* x, void* bits, const void* weight, const void* scale,
                     const void* bias, void* out, int64_t m, int64_t n, int64_t k, int64_t group_size) {
  using Word = typename Type::Word;
  const BinaryProduct<Type> call = {static_cast<const uint64_t*>(weight), nullptr,
                                    static_cast<const typename Type::Sum*>(scale),
                                    static_cast<const Word*>(bias), static_cast<Word*>(out), m, n, k, group_size};
  return emulate::message_of([&] {
    const auto run = way == 0   ? binary_linear<Type, false>
                     : way == 1 ? binary_linear<Type, true>
                                : binary_linear_by_warpgroups<Type>;
    run(static_cast<const Word*>(x), static_cast<uint64_t*>(bits), call, nullptr);
  });
}

BLAQ_TEST_EXPORT const char* product(int type, int way, const void* x, void* bits, const void* weight,
                                     const void* scale, const void* bias, void* out, int64_t m, int64_t n,
                                     int64_t k, int64_t group_size) {
  const auto f = type == 0   ? multiply<Fp32>
                 : type == 1 ? multiply<Narrow<Fp16>>
                 : type == 2 ? multiply<Narrow<Bf16>>
                             : multiply<Fp64>;
  return f(way, x, bits, weight, scale, bias, out, m, n, k, group_size);
}

BLAQ_TEST_EXPORT const char* order(int64_t seed) {
  emulate::machine.order = static_cast<uint32_t>(seed);
  return nullptr;
}
