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

inline void wake_waiting() {  // to look again
  for (Thread& other : machine.threads) {
    if (other.state == Thread::kWaiting && other.place.what == kBarrierWait)
      other.state = Thread::kReady;
  }
}

inline void end_phase_if_complete(BarrierState& state) {
  if (state.pending < 0) fail("more arrivals at a barrier in shared memory than it counts");
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

// Waits for the end of a phase of this parity; not for one after the next.
BLAQ_DEVICE void wait_for_phase(Barrier& barrier, uint32_t parity) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile(
      "{ .reg .pred p;\nwaiting:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra "
      "waiting; }" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
#elif defined(__CUDACC__)
  BLAQ_SM90A("");
#else
  emulate::BarrierState& state = emulate::state_of(barrier);
  while (state.parity == static_cast<int8_t>(parity)) {
    auto& copies = emulate::bulk_copies();
    const size_t before = copies.size();
    for (size_t i = 0; i < copies.size();) {
      if (copies[i].barrier != &barrier) {
        ++i;
        continue;
      }
      std::memcpy(copies[i].to, copies[i].data.data(), copies[i].data.size());
      state.bytes -= static_cast<int32_t>(copies[i].data.size());
      copies.erase(copies.begin() + i);
    }
    if (copies.size() != before) {
      emulate::end_phase_if_complete(state);
    } else {
      emulate::wait({emulate::kBarrierWait, __FILE__, __LINE__});
    }
  }
#endif
}

// Global memory to shared: whole multiples of 16 bytes, of which the barrier's phase has been told.
BLAQ_DEVICE void bulk_copy(void* to, const void* from, int bytes, Barrier& barrier) {
#if defined(__CUDACC__)
  BLAQ_SM90A(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(&barrier)) : "memory");
#else
  emulate::check_aligned(to, 16, "bulk_copy");
  emulate::check_aligned(from, 16, "bulk_copy");
  if (bytes % 16) emulate::fail("bulk_copy: size must be a multiple of 16");
  const auto* start = static_cast<const unsigned char*>(from);
  emulate::bulk_copies().push_back({to, {start, start + bytes}, &barrier});
  std::memset(to, emulate::kPoison, bytes);
  emulate::wake_waiting();
#endif
}

}  // namespace blaq
