// CUDA's functions on the host, by their definitions in the CUDA programming guide; part of
// emulate.h.
#pragma once

#define BLAQ_WHERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(BLAQ_WHERE) { blaq::emulate::barrier({"__syncthreads", file, line}); }
inline int __syncthreads_count(int x, BLAQ_WHERE) {
  return blaq::emulate::barrier({"__syncthreads_count", file, line}, x != 0);
}
inline int __syncthreads_or(int x, BLAQ_WHERE) {
  return blaq::emulate::barrier({"__syncthreads_or", file, line}, x != 0) != 0;
}
inline int __syncthreads_and(int x, BLAQ_WHERE) {
  return blaq::emulate::barrier({"__syncthreads_and", file, line}, x == 0) == 0;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

inline void __syncwarp(uint32_t mask = ~0u, BLAQ_WHERE) {
  blaq::emulate::meet<int>(mask, {"__syncwarp", file, line}, 0, [](auto...) {});
}

namespace blaq::emulate {

template <typename T>
struct Shuffled {
  T value;
  int from;
};

// `from` is a lane, or −1 for one's own value.
template <typename T>
T shuffle(uint32_t mask, const Place& place, T value, int from) {
  return meet<T>(mask, place, Shuffled<T>{value, from < 0 ? lane() : from},
                 [&](auto in, auto out, uint32_t all) {
    for (int i = 0; i < 32; ++i) {
      if (!(all >> i & 1)) continue;
      if (!(all >> in[i]->from & 1)) fail(place.text() + ": reads a lane outside of the mask");
      *out[i] = in[in[i]->from]->value;
    }
  });
}

template <typename T, typename Op>
T reduce(uint32_t mask, const Place& place, T value, const Op& op) {
  return meet<T>(mask, place, value, [&](auto in, auto out, uint32_t all) {
    T total = *in[std::countr_zero(all)];
    for (int i = std::countr_zero(all) + 1; i < 32; ++i) {
      if (all >> i & 1) total = op(total, *in[i]);
    }
    for (int i = 0; i < 32; ++i) {
      if (all >> i & 1) *out[i] = total;
    }
  });
}

}  // namespace blaq::emulate

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, BLAQ_WHERE) {
  const int first = blaq::emulate::lane() / width * width;
  return blaq::emulate::shuffle(mask, {"__shfl_sync", file, line}, value, first + source % width);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, BLAQ_WHERE) {
  const int lane = blaq::emulate::lane(), from = lane ^ bits;
  return blaq::emulate::shuffle(mask, {"__shfl_xor_sync", file, line}, value,
                                from / width <= lane / width ? from : -1);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, BLAQ_WHERE) {
  const int lane = blaq::emulate::lane(), from = lane + static_cast<int>(delta);
  return blaq::emulate::shuffle(mask, {"__shfl_down_sync", file, line}, value,
                                from / width == lane / width ? from : -1);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, BLAQ_WHERE) {
  const int lane = blaq::emulate::lane(), from = lane - static_cast<int>(delta);
  return blaq::emulate::shuffle(mask, {"__shfl_up_sync", file, line}, value,
                                from >= lane / width * width ? from : -1);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, BLAQ_WHERE) {
  const uint32_t bit = predicate ? 1u << blaq::emulate::lane() : 0;
  return blaq::emulate::reduce(mask, {"__ballot_sync", file, line}, bit, std::bit_or<>());
}
inline int __any_sync(uint32_t mask, int predicate, BLAQ_WHERE) {
  return blaq::emulate::reduce(mask, {"__any_sync", file, line}, int{predicate != 0}, std::bit_or<>());
}
inline int __all_sync(uint32_t mask, int predicate, BLAQ_WHERE) {
  return blaq::emulate::reduce(mask, {"__all_sync", file, line}, int{predicate != 0}, std::bit_and<>());
}
template <typename T>
T __reduce_add_sync(uint32_t mask, T value, BLAQ_WHERE) {
  return blaq::emulate::reduce(mask, {"__reduce_add_sync", file, line}, value, std::plus<>());
}
template <typename T>
T __reduce_min_sync(uint32_t mask, T value, BLAQ_WHERE) {
  return blaq::emulate::reduce(mask, {"__reduce_min_sync", file, line}, value,
                               [](T a, T b) { return std::min(a, b); });
}
template <typename T>
T __reduce_max_sync(uint32_t mask, T value, BLAQ_WHERE) {
  return blaq::emulate::reduce(mask, {"__reduce_max_sync", file, line}, value,
                               [](T a, T b) { return std::max(a, b); });
}
inline uint32_t __reduce_or_sync(uint32_t mask, uint32_t value, BLAQ_WHERE) {
  return blaq::emulate::reduce(mask, {"__reduce_or_sync", file, line}, value, std::bit_or<>());
}
inline uint32_t __activemask() { return ~0u; }

// One thread runs at a time, so a plain read and write is atomic. CUDA has these types and no
// others.
#define BLAQ_ATOMIC(name, T, expression)   \
  inline T name(T* address, T value) {     \
    const T before = *address;             \
    *address = (expression);               \
    return before;                         \
  }
using blaq_u64 = unsigned long long;
BLAQ_ATOMIC(atomicAdd, int, before + value)
BLAQ_ATOMIC(atomicAdd, unsigned, before + value)
BLAQ_ATOMIC(atomicAdd, blaq_u64, before + value)
BLAQ_ATOMIC(atomicSub, unsigned, before - value)
BLAQ_ATOMIC(atomicMin, unsigned, std::min(before, value))
BLAQ_ATOMIC(atomicMax, unsigned, std::max(before, value))
BLAQ_ATOMIC(atomicMin, int, std::min(before, value))
BLAQ_ATOMIC(atomicMax, int, std::max(before, value))
BLAQ_ATOMIC(atomicMin, blaq_u64, std::min(before, value))
BLAQ_ATOMIC(atomicMax, blaq_u64, std::max(before, value))
BLAQ_ATOMIC(atomicOr, unsigned, before | value)
BLAQ_ATOMIC(atomicAnd, unsigned, before & value)
BLAQ_ATOMIC(atomicXor, unsigned, before ^ value)
BLAQ_ATOMIC(atomicExch, unsigned, value)
BLAQ_ATOMIC(atomicInc, unsigned, before >= value ? 0 : before + 1)
#undef BLAQ_ATOMIC

inline int __popc(uint32_t x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<uint32_t>(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(static_cast<uint32_t>(x)) + 1 : 0; }
inline uint32_t __brev(uint32_t x) {
  uint32_t y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
  return y;
}
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= (bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return out;
}
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
  return (static_cast<uint64_t>(high) << 32 | low) << (shift & 31) >> 32;
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return (static_cast<uint64_t>(high) << 32 | low) >> (shift & 31);
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
  return c;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b >> 32; }

inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
// Every rounding is to nearest even here, as these names say, and no product is fused with a sum
// but by fmaf: nvcc has -fmad=false, g++ -ffp-contract=off.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __uint2float_rn(uint32_t x) { return static_cast<float>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __ull2float_rn(unsigned long long x) { return static_cast<float>(x); }
// Out of range saturates and NaN becomes 0, as in PTX.
inline uint32_t __float2uint_rn(float x) {
  return x != x || x <= 0 ? 0 : x >= 0x1p32f ? ~0u : static_cast<uint32_t>(std::nearbyint(x));
}
inline int __float2int_rn(float x) {
  return x != x ? 0 : x >= 0x1p31f ? INT32_MAX : x < -0x1p31f ? INT32_MIN
                                                 : static_cast<int>(std::nearbyint(x));
}
inline unsigned long long __float2ull_rn(float x) {
  return x != x ? 0x8000000000000000ull  // PTX says 0x8000… for a 64-bit result from NaN
         : x <= 0 ? 0 : x >= 0x1p64f ? ~0ull : static_cast<unsigned long long>(std::nearbyint(x));
}
template <typename T>
T __ldg(const T* address) {
  blaq::emulate::check_aligned(address, sizeof(T), "__ldg");
  return *address;
}
using std::max;
using std::min;
