// Hopper's products of a warpgroup (sm_90a): 64 rows of A from registers, B from shared memory, asynchronous.
//
// Warp w of the four has rows 16 w to 16 w + 15, with fragments of A and D as in mma.h; D goes on in steps of
// 8 columns. B lies in core matrices of 8 columns times 16 bytes, each 128 bytes in one piece (PTX ISA,
// "Asynchronous Warpgroup Level Matrix Instructions", K-major without swizzle).
//
// The emulation multiplies where a thread waits, with what shared memory holds by then.
#pragma once

#include "device.h"

namespace blaq {

// B in shared memory: core matrices that follow one another along K are `along_k` bytes apart, those along
// the columns `along_n`.
struct MatrixB {
#if defined(__CUDACC__)
  uint64_t bits;
  __device__ __forceinline__ MatrixB(const void* start, uint32_t along_k, uint32_t along_n)
      : bits(uint64_t{(static_cast<uint32_t>(__cvta_generic_to_shared(start)) & 0x3ffff) >> 4} |
             uint64_t{along_k >> 4} << 16 | uint64_t{along_n >> 4} << 32) {}
  // The same, `bytes` further on.
  __device__ __forceinline__ MatrixB moved(uint32_t bytes) const {
    MatrixB other = *this;
    other.bits += bytes >> 4;
    return other;
  }
#else
  const unsigned char* start;
  uint32_t along_k, along_n;
  MatrixB(const void* start_, uint32_t along_k_, uint32_t along_n_)
      : start(static_cast<const unsigned char*>(start_)), along_k(along_k_), along_n(along_n_) {
    emulate::check_aligned(start, 16, "MatrixB");
  }
  MatrixB moved(uint32_t bytes) const { return {start + bytes, along_k, along_n}; }
  uint32_t word(int column, int i) const {  // 32 bits of a column, i from 0 to 7
    uint32_t bits;
    std::memcpy(&bits, start + i / 4 * along_k + column / 8 * along_n + column % 8 * 16 + i % 4 * 4, 4);
    return bits;
  }
#endif
};

#if !defined(__CUDACC__)
namespace emulate {

struct Product {  // that a thread has begun
  int (*d)[4];
  uint32_t a[4];
  MatrixB b;
  int columns, group;
  bool adds;  // to what d holds
  int (*dot)(uint32_t, uint32_t);
};
struct Products {
  std::vector<Product> begun;
  int groups = 0;  // committed
  uint64_t block = 0;
};

inline Products& products() {
  static std::vector<Products> of_thread(2048);
  Products& mine = of_thread[machine.current];
  if (mine.block != machine.block_number) mine = {{}, 0, machine.block_number};
  return mine;
}

inline void multiply(const Product& product, const Place& place) {
  meet<int>(~0u, place, product, [](auto in, auto, uint32_t) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < in[lane]->columns / 2; ++i) {
        const int e = i % 4, column = i / 4 * 8 + lane % 4 * 2 + e % 2, row = lane / 4 * 4, half = e / 2;
        int& sum = in[lane]->d[i / 4][e];
        if (!in[lane]->adds) sum = 0;
        for (int word = 0; word < 8; ++word) {
          sum += in[lane]->dot(in[row + word % 4]->a[half + word / 4 * 2],
                               in[lane]->b.word(column, word));
        }
      }
    }
  });
}

}  // namespace emulate
#endif

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define BLAQ_SM90A(...) asm volatile(__VA_ARGS__)
#elif defined(__CUDACC__)
#define BLAQ_SM90A(...) asm volatile("trap;")  // a kernel that is never launched there
#endif

// A warpgroup's registers a thread, from a block's equal shares on: some give so that others take.
template <int count>
BLAQ_DEVICE void take_registers() {
#if defined(__CUDACC__)
  BLAQ_SM90A("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
#endif
}
template <int count>
BLAQ_DEVICE void give_registers() {
#if defined(__CUDACC__)
  BLAQ_SM90A("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
#endif
}

// What threads wrote to shared memory becomes visible to products. Before the barrier after writing.
BLAQ_DEVICE void fence_shared_for_products() {
#if defined(__CUDACC__)
  BLAQ_SM90A("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Before the first product of fragments a: what makes them comes before, or ptxas lets products wait.
template <int count>
BLAQ_DEVICE void begin_products(uint32_t (&a)[count][4]) {
#if defined(__CUDACC__)
#pragma unroll
  for (int i = 0; i < count * 4; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
  BLAQ_SM90A("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

BLAQ_DEVICE void commit_products() {
#if defined(__CUDACC__)
  BLAQ_SM90A("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  ++emulate::products().groups;
#endif
}

// Waits until at most `pending` committed groups go on; d is theirs, and may be read only then.
template <int pending, int kJ>
BLAQ_DEVICE void wait_for_products(int (&d)[kJ][4]) {
#if defined(__CUDACC__)
  BLAQ_SM90A("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
#pragma unroll
  for (int i = 0; i < kJ * 4; ++i) asm volatile("" : "+r"(d[i / 4][i % 4])::"memory");
#else
  emulate::Products& mine = emulate::products();
  while (!mine.begun.empty() && mine.begun.front().group < mine.groups - pending) {
    emulate::multiply(mine.begun.front(), {"wait_for_products", __FILE__, __LINE__});
    mine.begun.erase(mine.begun.begin());
  }
#endif
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define BLAQ_FOUR(j) "+r"(d[j][0]), "+r"(d[j][1]), "+r"(d[j][2]), "+r"(d[j][3])
#define BLAQ_WGMMA_N128(shape_and_types, adds)                                                    \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %69, 0;\n"                                         \
               "wgmma.mma_async.sync.aligned." shape_and_types " {"                               \
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "\
               "{%64, %65, %66, %67}, %68, p; }\n"                                                \
               : BLAQ_FOUR(0), BLAQ_FOUR(1), BLAQ_FOUR(2), BLAQ_FOUR(3), BLAQ_FOUR(4), BLAQ_FOUR(5),\
                 BLAQ_FOUR(6), BLAQ_FOUR(7), BLAQ_FOUR(8), BLAQ_FOUR(9), BLAQ_FOUR(10), BLAQ_FOUR(11),\
                 BLAQ_FOUR(12), BLAQ_FOUR(13), BLAQ_FOUR(14), BLAQ_FOUR(15)                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits), "r"(static_cast<int>(adds)))
#endif

// Begins D += popcount(a & b) for a [64, 256 bits] · b [256 bits, 128].
BLAQ_DEVICE void wgmma_m64n128k256_and(int (&d)[16][4], const uint32_t (&a)[4], const MatrixB& b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  BLAQ_WGMMA_N128("m64n128k256.s32.b1.b1.and.popc", true);
#elif defined(__CUDACC__)
  BLAQ_SM90A("");
#else
  emulate::Products& mine = emulate::products();
  mine.begun.push_back({d, {a[0], a[1], a[2], a[3]}, b, 128, mine.groups, true,
                        [](uint32_t x, uint32_t y) { return std::popcount(x & y); }});
#endif
}

// Begins D = a [64, 32] · b [32, 128] of signed bytes, on top of D where `adds`.
BLAQ_DEVICE void wgmma_m64n128k32_s8(int (&d)[16][4], const uint32_t (&a)[4], const MatrixB& b,
                                     bool adds) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  BLAQ_WGMMA_N128("m64n128k32.s32.s8.s8", adds);
#elif defined(__CUDACC__)
  BLAQ_SM90A("");
#else
  emulate::Products& mine = emulate::products();
  const auto dot = [](uint32_t x, uint32_t y) {
    return x && y ? emulate::dot_bytes<int8_t, int8_t>(x, y) : 0;
  };
  mine.begun.push_back({d, {a[0], a[1], a[2], a[3]}, b, 128, mine.groups, adds, dot});
#endif
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#undef BLAQ_WGMMA_N128
#undef BLAQ_FOUR
#endif

}  // namespace blaq
