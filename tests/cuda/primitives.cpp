// Every wrapper of csrc/cuda/device.h and bulk.h, and faults that the emulation must find.
#include "cuda/bulk.h"

using namespace blaq;

template <int table>
void lop3_tables(uint32_t* out) {
  if constexpr (table > 0) lop3_tables<table - 1>(out);
  out[table] = lop3<table>(0xf0, 0xcc, 0xaa);
}
BLAQ_TEST_EXPORT const char* all_lop3(uint32_t* out) { return lop3_tables<255>(out), nullptr; }

BLAQ_TEST_EXPORT const char* all_prmt(uint32_t low, uint32_t high, uint32_t* out, uint32_t* plain) {
  for (uint32_t selector = 0; selector < 1 << 16; ++selector) {
    out[selector] = prmt(low, high, selector);
    plain[selector] = __byte_perm(low, high, selector);
  }
  return nullptr;
}

template <typename Type>
const char* halves(float* out, const float* in, int64_t count, uint16_t* back) {
  for (uint32_t x = 0; x < 1 << 16; ++x) out[x] = Type::to_float(x);
  for (int64_t i = 0; i < count; ++i) back[i] = Type::from_float(in[i]);
  return nullptr;
}
BLAQ_TEST_EXPORT const char* fp16(float* out, const float* in, int64_t n, uint16_t* back) {
  return halves<Fp16>(out, in, n, back);
}
BLAQ_TEST_EXPORT const char* bf16(float* out, const float* in, int64_t n, uint16_t* back) {
  return halves<Bf16>(out, in, n, back);
}

// a [32, 4], b [32, 2], d [32, 4]: the registers of every lane.
template <int which, typename T>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, T* d) {
  uint32_t x[4], y[2];
  T z[4];
  const int lane = threadIdx.x;
  for (int i = 0; i < 4; ++i) x[i] = a[lane * 4 + i], z[i] = d[lane * 4 + i];
  for (int i = 0; i < 2; ++i) y[i] = b[lane * 2 + i];
  if constexpr (which == 0) mma_m16n8k16<Fp16>(z, x, y);
  if constexpr (which == 1) mma_m16n8k16<Bf16>(z, x, y);
  if constexpr (which == 2) mma_m16n8k32_s8<true>(z, x, y);
  if constexpr (which == 3) mma_m16n8k32_s8<false>(z, x, y);
  if constexpr (which == 4) mma_m16n8k256_and(z, x, y);
  if constexpr (which == 5) mma_m16n8k256_xor(z, x, y);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = z[i];
}

template <bool exclusive>
__global__ void mma_8x8_kernel(const uint32_t* a, const uint32_t* b, int* d) {
  int z[2] = {d[threadIdx.x * 2], d[threadIdx.x * 2 + 1]};
  mma_m8n8k128<exclusive>(z, a[threadIdx.x], b[threadIdx.x]);
  for (int i = 0; i < 2; ++i) d[threadIdx.x * 2 + i] = z[i];
}

BLAQ_TEST_EXPORT const char* mma(int which, const uint32_t* a, const uint32_t* b, void* d) {
  const Grid grid = {1, 32};
  auto* f = static_cast<float*>(d);
  auto* i = static_cast<int*>(d);
  return emulate::message_of([&] {
    if (which == 0) launch(mma_kernel<0, float>, grid, nullptr, a, b, f);
    if (which == 1) launch(mma_kernel<1, float>, grid, nullptr, a, b, f);
    if (which == 2) launch(mma_kernel<2, int>, grid, nullptr, a, b, i);
    if (which == 3) launch(mma_kernel<3, int>, grid, nullptr, a, b, i);
    if (which == 4) launch(mma_kernel<4, int>, grid, nullptr, a, b, i);
    if (which == 5) launch(mma_kernel<5, int>, grid, nullptr, a, b, i);
    if (which == 6) launch(mma_8x8_kernel<false>, grid, nullptr, a, b, i);
    if (which == 7) launch(mma_8x8_kernel<true>, grid, nullptr, a, b, i);
  });
}

// a [32, 4], b [32, 4], chosen [32], d [32, 4]: the registers of every lane.
template <typename Type, int kLanes>
__global__ void sparse_kernel(const uint32_t* a, const uint32_t* b, const uint32_t* chosen,
                              float* d) {
  uint32_t x[4], y[4];
  float z[4];
  const int lane = threadIdx.x;
  for (int i = 0, at = lane * 4; i < 4; ++i, ++at) x[i] = a[at], y[i] = b[at], z[i] = d[at];
  mma_m16n8k32_sparse<Type, kLanes>(z, x, y, chosen[lane]);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = z[i];
}
BLAQ_TEST_EXPORT const char* sparse(int bf16, int lanes, const uint32_t* a, const uint32_t* b,
                                    const uint32_t* chosen, float* d) {
  const auto kernel = bf16 ? lanes ? sparse_kernel<Bf16, 1> : sparse_kernel<Bf16, 0>
                      : lanes ? sparse_kernel<Fp16, 1> : sparse_kernel<Fp16, 0>;
  return emulate::message_of([&] { launch(kernel, {1, 32}, nullptr, a, b, chosen, d); });
}

// in: `count` matrices of 8 × 8 halves; out [32, count].
template <int count, bool transposed>
__global__ void ldmatrix_kernel(const uint4* in, uint32_t* out) {
  auto* rows = dynamic_shared<uint4>();
  if (threadIdx.x < 8 * count) cp_async(rows + threadIdx.x, in + threadIdx.x);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  uint32_t d[count];
  ldmatrix<count, transposed>(d, rows + threadIdx.x % (8 * count));
  for (int i = 0; i < count; ++i) out[threadIdx.x * count + i] = d[i];
}
BLAQ_TEST_EXPORT const char* load_matrices(int count, bool transposed, const uint4* in, uint32_t* out) {
  return emulate::message_of([&] {
    const Grid grid = {1, 32, static_cast<size_t>(count) * 128};
    const auto kernel = count == 1   ? transposed ? ldmatrix_kernel<1, true> : ldmatrix_kernel<1, false>
                        : count == 2 ? transposed ? ldmatrix_kernel<2, true> : ldmatrix_kernel<2, false>
                        : transposed ? ldmatrix_kernel<4, true>
                                     : ldmatrix_kernel<4, false>;
    launch(kernel, grid, nullptr, in, out);
  });
}

// out [12, 32] of in [32]: what each shuffle and vote gives every lane.
__global__ void warp_kernel(const uint32_t* in, uint32_t* out) {
  const uint32_t x = in[threadIdx.x], lane = threadIdx.x, all = ~0u;
  const uint32_t half = lane < 16 ? 0xffffu : 0xffff0000u;
  uint32_t results[] = {
      __shfl_sync(all, x, 5), __shfl_sync(all, x, lane + 3, 8), __shfl_xor_sync(all, x, 9),
      __shfl_down_sync(all, x, 3), __shfl_up_sync(all, x, 3, 16), __ballot_sync(all, x & 1),
      __reduce_add_sync(all, x), __reduce_max_sync(all, x), __reduce_add_sync(half, x),
      static_cast<uint32_t>(__any_sync(half, x & 1)), static_cast<uint32_t>(__all_sync(all, x & 1)),
      __reduce_or_sync(half, x)};
  for (int i = 0; i < 12; ++i) out[i * 32 + lane] = results[i];
}
BLAQ_TEST_EXPORT const char* warp(const uint32_t* in, uint32_t* out) {
  return emulate::message_of([&] { launch(warp_kernel, {1, 32}, nullptr, in, out); });
}

// Sums in [n] into out [1]: a partial sum for each block, the last block adds them up.
__global__ void sum_kernel(const uint32_t* in, int n, unsigned long long* partial, unsigned* ticket,
                           unsigned long long* out) {
  struct Scratch {
    uint32_t sum;
    bool last;
  };
  Scratch& scratch = shared<Scratch>();
  if (threadIdx.x == 0) scratch.sum = 0;
  __syncthreads();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(&scratch.sum, i < n ? in[i] : 0u);
  __syncthreads();
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = scratch.sum;
    __threadfence();
    scratch.last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (scratch.last && threadIdx.x == 0) {
    for (unsigned b = 0; b < gridDim.x; ++b) atomicAdd(out, partial[b]);
  }
}
BLAQ_TEST_EXPORT const char* sum(const uint32_t* in, int n, unsigned long long* partial, unsigned* ticket,
                       unsigned long long* out, uint32_t order) {
  return emulate::message_of([&] {
    emulate::machine.order = order;
    launch(sum_kernel, {static_cast<unsigned>((n + 63) / 64), 64}, nullptr, in, n, partial, ticket, out);
  });
}

// What a kernel must not do; each is found.
__global__ void fault_kernel(int which, uint32_t* memory) {
  uint32_t* words = dynamic_shared<uint32_t>();  // of 64 bytes
  const unsigned thread = threadIdx.x;
  switch (which) {
    case 0:
      if (thread < 40) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case 1: __syncwarp(thread < 32 ? 0xffffu : ~0u); break;
    case 2: if (thread != 3) __reduce_add_sync(~0u, 1u); break;
    case 3: memory[0] = load_stream(reinterpret_cast<char*>(memory) + 4).x; break;
    case 4: if (thread == 0) words[16] = 1; break;
    case 5: memory[1 << 20] = 1; break;
    case 6: if (thread == 7) cp_async(words, memory), cp_async_commit(); break;
    case 7: if (thread < 63) __syncthreads(); break;
    case 8: thread & 1 ? __syncwarp() : (void)__shfl_sync(~0u, 1, 0); break;
    case 9: memory[thread] = words[thread % 16]; break;  // no fault: poison
    case 10:  // a race: the barrier between write and read is missing
      if (thread == 17) memory[64] = 1;
      memory[thread] = memory[64];
      break;
    case 11: {
      Barrier& barrier = *dynamic_shared<Barrier>();
      if (thread == 0) init_barrier(barrier, 64);
      __syncthreads();
      if (thread < 63) arrive(barrier);
      wait_for_phase(barrier, 0);
      break;
    }
    case 12: if (thread == 0) bulk_copy(words, memory, 12, *dynamic_shared<Barrier>(), 1); break;
  }
}
BLAQ_TEST_EXPORT const char* fault(int which, uint32_t* memory, uint32_t order) {
  return emulate::message_of([&] {
    emulate::machine.order = order;
    launch(fault_kernel, {1, 64, 64}, nullptr, which, memory);
  });
}

// Each of two blocks fetches half of in [64] for both, and writes out [2, 64] what it then has.
__global__ void cluster_kernel(const uint32_t* in, uint32_t* out) {
  struct Shared {
    uint32_t words[64];
    Barrier full;
  };
  Shared& memory = *dynamic_shared<Shared>();
  const int block = blockIdx.x;
  if (threadIdx.x == 0) init_barrier(memory.full, 1), fence_barriers();
  sync_cluster();
  if (threadIdx.x == 5) {
    arrive_and_expect(memory.full, sizeof memory.words);
    bulk_copy(memory.words + 32 * block, in + 32 * block, 128, memory.full, 2);
  }
  wait_for_phase(memory.full, 0);
  out[blockIdx.x * 64 + threadIdx.x] = memory.words[threadIdx.x];
  sync_cluster();
}
BLAQ_TEST_EXPORT const char* cluster(const uint32_t* in, uint32_t* out, uint32_t order) {
  return emulate::message_of([&] {
    emulate::machine.order = order;
    launch(cluster_kernel, {2, 64, 264, 2}, nullptr, in, out);
  });
}

// d [128 threads, 16, 4] += or = a [128, 4] · b [2 halves of 16 bytes, 128 columns].
__global__ void warpgroup_kernel(const uint32_t* a, const uint4* b, int* d, bool adds) {
  uint4* columns = dynamic_shared<uint4>();
  for (int half = 0; half < 2; ++half) columns[half * 128 + threadIdx.x] = b[half * 128 + threadIdx.x];
  int sum[16][4];
  uint32_t mine[1][4];
  std::copy_n(d + threadIdx.x * 64, 64, &sum[0][0]);
  std::copy_n(a + threadIdx.x * 4, 4, mine[0]);
  fence_shared_for_products();
  __syncthreads();
  begin_products(mine);
  wgmma_m64n128k32_s8(sum, mine[0], MatrixB(columns, 128 * 16, 128), adds);
  commit_products();
  wait_for_products<0>(sum);
  std::copy_n(&sum[0][0], 64, d + threadIdx.x * 64);
}
BLAQ_TEST_EXPORT const char* warpgroup(const uint32_t* a, const uint4* b, int* d, int adds) {
  return emulate::message_of(
      [&] { launch(warpgroup_kernel, {1, 128, 4096}, nullptr, a, b, d, adds != 0); });
}
