// What a kernel needs beside CUDA's own words: single instructions, by one name for nvcc and for
// the host emulation (emulate.h). Kernels are ordinary CUDA in headers that include this one.
//
// Conventions of csrc/cuda:
//  * <op>_kernel.h holds kernels and the host function that launches them, both free of torch;
//    <op>.cu checks tensors and registers the op; tests/cuda/<op>.cpp runs the kernel in emulation.
//  * fp32 inside; -fmad=false, so that a sum is fused with a product only where fmaf stands, and the
//    emulation gives the same bits; offsets are int64_t where numel can pass 2^31.
//  * shared memory comes from shared<T>() or dynamic_shared<T>(); no float atomics, no locks.
//  * no early return before a barrier: __syncthreads and the lanes of a warp's mask meet in full.
//  * values of 16 bits are uint16_t or pairs in uint32_t, and Fp16 or Bf16 says what the bits mean.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include "launch.h"
#define BLAQ_DEVICE __device__ __forceinline__
#else
#include "emulate.h"
#define BLAQ_DEVICE inline
#endif

namespace blaq {

// ------------------------------------------------------------------------------------- bits

// Any function of three bits, for 32 of them: `table` has its value for a = 0xf0, b = 0xcc, c =
// 0xaa.
template <int table>
BLAQ_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDACC__)
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(table));
  return d;
#else
  uint32_t d = 0;
  for (int i = 0; i < 8; ++i) {
    if (table >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return d;
#endif
}

// One instruction where nvcc would make two: the mask and the constant are both immediates.
template <uint32_t mask, uint32_t set>
BLAQ_DEVICE uint32_t and_or(uint32_t x) { return lop3<(0xf0 & 0xcc) | 0xaa>(x, mask, set); }

template <uint32_t mask>
BLAQ_DEVICE uint32_t and_xor(uint32_t x, uint32_t y) { return lop3<(0xf0 & 0xcc) ^ 0xaa>(x, mask, y); }

// Four bytes of [low, high] by the nibbles of `selector`; its 8 asks for a byte of copies of the
// sign.
BLAQ_DEVICE uint32_t prmt(uint32_t low, uint32_t high, uint32_t selector) {
#if defined(__CUDACC__)
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(low), "r"(high), "r"(selector));
  return d;
#else
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t choice = selector >> 4 * i, byte = bytes >> 8 * (choice & 7) & 0xff;
    d |= (choice & 8 ? (byte & 0x80 ? 0xff : 0) : byte) << 8 * i;
  }
  return d;
#endif
}

// ------------------------------------------------------------------------------------- 16-bit floats

BLAQ_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
BLAQ_DEVICE float bits_float(uint32_t x) { return __uint_as_float(x); }

struct Fp16 {
  static constexpr uint16_t kOne = 0x3c00;
  static constexpr int kMantissa = 10;  // bits below the exponent's lowest
  static constexpr float kSmallest = 0x1p-14f, kLargest = 65504;  // of the normal numbers
  static BLAQ_DEVICE float to_float(uint16_t x) {
#if defined(__CUDACC__)
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
#else
    return static_cast<float>(std::bit_cast<_Float16>(x));
#endif
  }
  static BLAQ_DEVICE uint16_t from_float(float x) {
#if defined(__CUDACC__)
    uint16_t y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
#else
    return x != x ? 0x7fff : std::bit_cast<uint16_t>(static_cast<_Float16>(x));
#endif
  }
};

struct Bf16 {
  static constexpr uint16_t kOne = 0x3f80;
  static constexpr int kMantissa = 7;
  static constexpr float kSmallest = 0x1p-126f, kLargest = 0x1.fep127f;
  static BLAQ_DEVICE float to_float(uint16_t x) { return bits_float(static_cast<uint32_t>(x) << 16); }
  static BLAQ_DEVICE uint16_t from_float(float x) {
#if defined(__CUDACC__)
    uint16_t y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
#else
    const uint32_t bits = float_bits(x);
    return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
#endif
  }
};

// ------------------------------------------------------------------------------------- memory

// 16 bytes that are read once: past L1, which has nothing to gain from them.
BLAQ_DEVICE uint4 load_stream(const void* address) {
#if defined(__CUDACC__)
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
  return v;
#else
  emulate::check_aligned(address, 16, "load_stream");
  return *static_cast<const uint4*>(address);
#endif
}

// 16 bytes of global memory, and in the order of the source: where an address comes out of a table,
// nvcc does not know which memory it is into.
BLAQ_DEVICE uint4 load_16(const void* address) {
#if defined(__CUDACC__)
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
  return v;
#else
  emulate::check_aligned(address, 16, "load_16");
  return *static_cast<const uint4*>(address);
#endif
}
// The same `offset` bytes further on where `inside`, zeros elsewhere, without a branch.
template <int offset>
BLAQ_DEVICE uint4 load_16_if(bool inside, const void* address) {
#if defined(__CUDACC__)
  uint4 v;
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; "
      "mov.b32 %3, 0; @p ld.global.v4.u32 {%0, %1, %2, %3}, [%4 + %6];}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(address), "r"(static_cast<int>(inside)), "n"(offset) : "memory");
  return v;
#else
  return inside ? load_16(static_cast<const char*>(address) + offset) : make_uint4(0, 0, 0, 0);
#endif
}
BLAQ_DEVICE void store_16(void* address, uint4 v) {
#if defined(__CUDACC__)
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w) : "memory");
#else
  emulate::check_aligned(address, 16, "store_16");
  *static_cast<uint4*>(address) = v;
#endif
}

// Global memory to shared, 16 bytes, without registers: the first `bytes` of them, then zeros.
// There after cp_async_wait and a barrier.
BLAQ_DEVICE void cp_async(void* to, const void* from, int bytes = 16) {
#if defined(__CUDACC__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
      static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from), "r"(bytes) : "memory");
#else
  emulate::check_aligned(to, 16, "cp_async");
  emulate::check_aligned(from, 16, "cp_async");
  emulate::Copy copy = {to, {}, 16, emulate::self().group};
  std::memcpy(copy.bytes, from, bytes);
  std::memset(to, emulate::kPoison, 16);
  emulate::self().copies.push_back(copy);
#endif
}

BLAQ_DEVICE void cp_async_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  ++emulate::self().group;
#endif
}

// Waits until at most `pending` of this thread's committed groups are on their way.
template <int pending>
BLAQ_DEVICE void cp_async_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#else
  emulate::Thread& thread = emulate::self();
  std::erase_if(thread.copies, [&](const emulate::Copy& copy) {
    if (copy.group >= thread.group - pending) return false;
    std::memcpy(copy.to, copy.bytes, 16);
    return true;
  });
#endif
}

// Programmatic dependent launch (sm_90 and later; nothing before): the next kernel of the stream
// may begin; the one before has ended and its results are there.
BLAQ_DEVICE void launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
BLAQ_DEVICE void wait_for_dependencies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace blaq

#include "mma.h"
