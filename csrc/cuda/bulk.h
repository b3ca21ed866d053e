// Hopper's bulk copies to shared memory, by one instruction of one thread, and the barriers in
// shared memory on which they are waited for (PTX ISA, "mbarrier"). A phase of a barrier ends when
// its arrivals have come and its bytes are there; phases have parity 0, 1, 0, …
//
// In the emulation bytes come no sooner than some thread waits for them, and are poison until then.
#pragma once

#include "wgmma.h"

namespace blaq {

struct Barrier {
  uint64_t state;
};

#if !defined(__CUDACC__)
namespace emulate {

struct BarrierState {
  int32_t bytes;  // still to come
  int8_t count, pending, parity, unused;
};
inline BarrierState& state_of(Barrier& barrier) {
  return reinterpret_cast<BarrierState&>(barrier.state);
}

struct BulkCopy {
  void* to;
  std::vector<unsigned char> data;
  Barrier* barrier;
};
inline std::vector<BulkCopy>& bulk_copies() {  // of this block, on their way
  static std::vector<BulkCopy> all;
  static uint64_t block = 0;
  if (block != machine.block_number) all.clear(), block = machine.block_number;
  return all;
}

constexpr const char* kBarrierWait = "wait of a barrier in shared memory";

// What is on its way to this barrier; whether there was anything.
inline bool deliver(Barrier& barrier) {
  return std::erase_if(bulk_copies(), [&](const BulkCopy& copy) {
    if (copy.barrier != &barrier) return false;
    std::memcpy(copy.to, copy.data.data(), copy.data.size());
    state_of(barrier).bytes -= static_cast<int32_t>(copy.data.size());
    return true;
  });
}

inline void wake_waiting() {  // to look again
  for (Thread& other : machine.threads) {
    if (other.state == Thread::kWaiting && other.place.what == kBarrierWait)
      other.state = Thread::kReady;
  }
}

inline void end_phase_if_complete(BarrierState& state) {
  if (state.pending || state.bytes) return;
  state.pending = state.count;
  state.parity ^= 1;
  wake_waiting();
}

}  // namespace emulate
#endif

#if defined(__CUDACC__)
BLAQ_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

// By one thread; others may use the barriers behind fence_barriers and a __syncthreads.
BLAQ_DEVICE void init_barrier(Barrier& barrier, int arrivals) {
#if defined(__CUDACC__)
  BLAQ_SM90A("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
             "r"(arrivals) : "memory");
#else
  emulate::state_of(barrier) = {0, static_cast<int8_t>(arrivals), static_cast<int8_t>(arrivals), 0,
                                0};
#endif
}

BLAQ_DEVICE void fence_barriers() {
#if defined(__CUDACC__)
  BLAQ_SM90A("fence.mbarrier_init.release.cluster;" :: : "memory");
#endif
}

BLAQ_DEVICE void arrive(Barrier& barrier) {
#if defined(__CUDACC__)
  BLAQ_SM90A("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
#else
  emulate::BarrierState& state = emulate::state_of(barrier);
  --state.pending;
  emulate::end_phase_if_complete(state);
#endif
}

// And lets the phase end no sooner than `bytes` have come.
BLAQ_DEVICE void arrive_and_expect(Barrier& barrier, int bytes) {
#if defined(__CUDACC__)
  BLAQ_SM90A(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
      "r"(bytes) : "memory");
#else
  emulate::state_of(barrier).bytes += bytes;
  arrive(barrier);
#endif
}

// The same at a barrier of another block of the cluster.
BLAQ_DEVICE void arrive_in_block(Barrier& barrier, int of_cluster) {
#if defined(__CUDACC__)
  BLAQ_SM90A(
      "{ .reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(shared_address(&barrier)),
      "r"(of_cluster) : "memory");
#else
  arrive(*emulate::in_block(&barrier, of_cluster));
#endif
}

// Waits for the end of a phase of this parity; not for one after the next. Orders what goes through
// shared memory, as all does here: wider scopes would empty L1 each time.
BLAQ_DEVICE void wait_for_phase(Barrier& barrier, uint32_t parity) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile(
      "{ .reg .pred done;\nwaiting:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra waiting; }" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
#elif defined(__CUDACC__)
  BLAQ_SM90A("");
#else
  emulate::BarrierState& state = emulate::state_of(barrier);
  while (state.parity == static_cast<int8_t>(parity)) {
    if (emulate::deliver(barrier)) {
      emulate::end_phase_if_complete(state);
    } else {
      emulate::wait({emulate::kBarrierWait, __FILE__, __LINE__});
    }
  }
#endif
}

// Global memory to the same place in the shared memory of all `blocks` of the cluster: whole
// multiples of 16 bytes, of which each block's barrier hears.
BLAQ_DEVICE void bulk_copy(void* to, const void* from, int bytes, Barrier& barrier, int blocks) {
#if defined(__CUDACC__)
  BLAQ_SM90A(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(&barrier)),
      "h"(static_cast<uint16_t>((1 << blocks) - 1)) : "memory");
#else
  emulate::check_aligned(to, 16, "bulk_copy");
  emulate::check_aligned(from, 16, "bulk_copy");
  if (bytes % 16) emulate::fail("bulk_copy: size must be a multiple of 16");
  const auto* start = static_cast<const unsigned char*>(from);
  for (int block = 0; block < blocks; ++block) {
    void* there = emulate::in_block(static_cast<unsigned char*>(to), block);
    emulate::bulk_copies().push_back(
        {there, {start, start + bytes}, emulate::in_block(&barrier, block)});
    std::memset(there, emulate::kPoison, bytes);
  }
  emulate::wake_waiting();
#endif
}

// For all threads of all blocks of a cluster: before one touches another's shared memory, and
// before one ends that another may still touch.
BLAQ_DEVICE void sync_cluster() {
#if defined(__CUDACC__)
  BLAQ_SM90A("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" :: : "memory");
#else
  emulate::cluster_barrier({"sync_cluster", __FILE__, __LINE__});
#endif
}

}  // namespace blaq
