// CUDA's words for a host compiler: a kernel's own source, compiled by g++, runs block by block
// here, and blocks of a cluster side by side.
//
// A block's threads are fibers. One runs until it must wait for others (__syncthreads, __syncwarp,
// a shuffle, an mma) and then another does, in an order that the caller may shuffle: a kernel whose
// result depends on the order has a race. An error instead of a wrong result: a barrier that
// threads reach at different places or never, an access outside of memory that ends at a guard
// page, a misaligned 16-byte access, a write behind shared memory. Shared memory starts as NaN in
// every block.
//
// Not shown: races between blocks that run at once, memory order, caches, and times.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static  // prefer blaq::shared<T>(), which every block finds poisoned
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

namespace blaq {

struct Grid {  // shape of a launch, as in launch.h
  dim3 blocks, threads;
  size_t shared = 0;     // bytes of dynamic shared memory
  unsigned cluster = 1;  // blocks that run together, side by side in x
};

namespace emulate {

constexpr size_t kStack = 256 << 10;
constexpr unsigned char kPoison = 0xff;  // NaN in every float, the largest of every unsigned
constexpr size_t kGuard = 256;           // bytes behind dynamic shared memory that must stay poison

struct Place {  // where in the source a thread waits
  const char* what;
  const char* file;
  int line;
  bool operator==(const Place& other) const {
    return line == other.line && !std::strcmp(what, other.what) && !std::strcmp(file, other.file);
  }
  std::string text() const {
    const char* slash = std::strrchr(file, '/');
    return std::string(what) + " (" + (slash ? slash + 1 : file) + ":" + std::to_string(line) + ")";
  }
};

struct Copy {  // a cp.async that has not arrived
  void* to;
  unsigned char bytes[16];
  int size, group;
};

struct Thread {
  dim3 index, block;
  int of_cluster;  // its block's number
  enum { kReady, kWaiting, kDone } state;
  Place place;
  bool started;
  jmp_buf context;
  std::vector<Copy> copies;
  int group;  // cp.async groups committed so far
};

// Lanes of a warp that wait for one another; the last to come computes for all.
struct Meeting {
  uint32_t mask, here;
  Place place;
  const void* in[32];
  void* out[32];
};

struct Block {  // of a cluster
  std::vector<unsigned char> dynamic;
  int at_barrier = 0;
  int64_t barrier_sum = 0, barrier_result = 0;
};

struct Machine {
  std::vector<Thread> threads;  // of a cluster's blocks, one after another
  std::vector<Block> blocks;
  std::vector<std::vector<Meeting>> meetings;  // of each warp
  unsigned char* stacks = nullptr;
  size_t stack_count = 0;
  int current = 0, at_cluster_barrier = 0;
  uint64_t block_number = 0;  // of all blocks or clusters ever run: what shared<T>() is as old as
  std::string error;
  jmp_buf scheduler;
  sigjmp_buf fault;
  ucontext_t root;
  std::function<void()> body;
  unsigned multiprocessors = 4;
  uint32_t order = 0;  // 0: ascending; 1: descending; others: seed of a shuffle
};
inline Machine machine;

inline Thread& self() { return machine.threads[machine.current]; }
inline int lane() { return machine.current % 32; }

inline std::string who(int thread) {
  const dim3 block = machine.threads[thread].block;
  return "thread " + std::to_string(thread % (machine.threads.size() / machine.blocks.size())) +
         " of block " + std::to_string(block.x) + "," + std::to_string(block.y) + "," +
         std::to_string(block.z);
}

inline void to_scheduler() {
  if (!_setjmp(self().context)) _longjmp(machine.scheduler, 1);
}

[[noreturn]] inline void fail(const std::string& what) {
  machine.error = who(machine.current) + ": " + what;
  _longjmp(machine.scheduler, 1);
}

inline void wait(const Place& place) {
  self().state = Thread::kWaiting;
  self().place = place;
  to_scheduler();
}

inline Block& my_block() { return machine.blocks[self().of_cluster]; }

inline int64_t barrier(const Place& place, int64_t value = 0) {
  Block& block = my_block();
  const int of_cluster = self().of_cluster;
  for (const Thread& other : machine.threads) {
    if (other.of_cluster == of_cluster && other.state == Thread::kWaiting &&
        !std::strncmp(other.place.what, "__syncthreads", 13) && !(other.place == place)) {
      fail("divergent barrier: at " + place.text() + " while another thread is at " +
           other.place.text());
    }
  }
  block.barrier_sum += value;
  if (++block.at_barrier < static_cast<int>(machine.threads.size() / machine.blocks.size())) {
    wait(place);
    return block.barrier_result;
  }
  block.barrier_result = block.barrier_sum;
  block.barrier_sum = block.at_barrier = 0;
  for (Thread& other : machine.threads) {
    if (other.of_cluster == of_cluster && other.state == Thread::kWaiting && other.place == place) {
      other.state = Thread::kReady;
    }
  }
  return block.barrier_result;
}

// For all threads of a cluster.
inline void cluster_barrier(const Place& place) {
  if (++machine.at_cluster_barrier < static_cast<int>(machine.threads.size())) return wait(place);
  machine.at_cluster_barrier = 0;
  for (Thread& other : machine.threads) {
    if (other.state == Thread::kWaiting && other.place == place) other.state = Thread::kReady;
  }
}

// Every lane of `mask` brings an In; the last calls combine(in, out, mask) with all of them, where
// in[i] and out[i] are lane i's, or null for a lane outside of the mask.
template <typename Out, typename In, typename Combine>
Out meet(uint32_t mask, const Place& place, const In& in, const Combine& combine) {
  if (!(mask >> lane() & 1)) fail(place.text() + ": the mask must hold the calling lane");
  Out out{};
  auto& meetings = machine.meetings[machine.current / 32];
  auto mine = std::find_if(meetings.begin(), meetings.end(), [&](const Meeting& meeting) {
    return meeting.mask == mask && meeting.place == place;
  });
  if (mine == meetings.end()) mine = meetings.insert(mine, {mask, 0, place, {}, {}});
  mine->here |= 1u << lane();
  mine->in[lane()] = &in;
  mine->out[lane()] = &out;
  if (mine->here != mask) {
    wait(place);
    return out;
  }
  const Meeting all = *mine;
  meetings.erase(mine);
  const In* ins[32];
  Out* outs[32];
  for (int i = 0; i < 32; ++i) {
    ins[i] = static_cast<const In*>(all.in[i]);
    outs[i] = static_cast<Out*>(all.out[i]);
    Thread& other = machine.threads[machine.current / 32 * 32 + i];
    if (mask >> i & 1 && other.state == Thread::kWaiting) other.state = Thread::kReady;
  }
  combine(ins, outs, mask);
  return out;
}

inline void check_aligned(const void* pointer, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes) {
    fail(std::string(what) + ": address must be a multiple of " + std::to_string(bytes));
  }
}

}  // namespace emulate
}  // namespace blaq

#include "emulate_launch.h"
#include "emulate_intrinsics.h"
