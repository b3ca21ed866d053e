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

inline void start() {  // first function of every fiber
  machine.body();
  if (!self().copies.empty()) fail("ends with a cp.async that it never waited for");
  self().state = Thread::kDone;
  _longjmp(machine.scheduler, 1);
}

inline void on_fault(int) { siglongjmp(machine.fault, 1); }

inline std::vector<int> permutation(int count) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (machine.order == 1) std::reverse(order.begin(), order.end());
  if (machine.order > 1) std::shuffle(order.begin(), order.end(), std::mt19937(machine.order));
  return order;
}

inline void resume(int thread) {
  machine.current = thread;
  Thread& one = machine.threads[thread];
  threadIdx = one.index;
  blockIdx = one.block;
  if (_setjmp(machine.scheduler)) return;
  if (one.started) _longjmp(one.context, 1);
  one.started = true;
  ucontext_t fresh;
  getcontext(&fresh);
  fresh.uc_stack.ss_sp = machine.stacks + thread * kStack;
  fresh.uc_stack.ss_size = kStack;
  fresh.uc_link = nullptr;
  makecontext(&fresh, start, 0);
  swapcontext(&machine.root, &fresh);  // only ever left by _longjmp
}

// Those for whom nobody comes: one thread for each place.
inline void report_waiting() {
  std::vector<Place> places;
  for (size_t i = 0; i < machine.threads.size(); ++i) {
    const Thread& one = machine.threads[i];
    if (one.state == Thread::kDone || std::count(places.begin(), places.end(), one.place)) continue;
    places.push_back(one.place);
    machine.error += (machine.error.empty() ? "" : "; ") + who(i) + " waits for ever at " + one.place.text();
  }
}

// Shared memory of the running thread's block, or of the `of_cluster`-th of its cluster.
inline unsigned char* dynamic_shared(int of_cluster) {
  const auto start = reinterpret_cast<uintptr_t>(machine.blocks[of_cluster].dynamic.data());
  return reinterpret_cast<unsigned char*>((start + 15) & ~uintptr_t{15});
}
inline unsigned char* dynamic_shared() { return dynamic_shared(self().of_cluster); }

// The same place in another block's shared memory.
template <typename T>
T* in_block(T* mine, int of_cluster) {
  return reinterpret_cast<T*>(reinterpret_cast<unsigned char*>(mine) - dynamic_shared() +
                              dynamic_shared(of_cluster));
}

// The `number`-th cluster; most are of one block.
inline void run_cluster(const Grid& grid, int number) {
  Machine& m = machine;
  const int of_block = grid.threads.x * grid.threads.y * grid.threads.z;
  const int count = of_block * grid.cluster;
  m.threads.assign(count, Thread{});
  m.meetings.assign(count / 32, {});
  m.blocks.assign(grid.cluster, {});
  for (Block& block : m.blocks) block.dynamic.assign(grid.shared + kGuard + 16, kPoison);
  m.at_cluster_barrier = 0;
  ++m.block_number;
  for (int i = 0; i < count; ++i) {
    const unsigned x = grid.threads.x, y = grid.threads.y, thread = i % of_block;
    const unsigned block = number * grid.cluster + i / of_block;
    m.threads[i].index = dim3(thread % x, thread / x % y, thread / (x * y));
    m.threads[i].block = dim3(block % grid.blocks.x, block / grid.blocks.x % grid.blocks.y,
                              block / (grid.blocks.x * grid.blocks.y));
    m.threads[i].of_cluster = i / of_block;
  }
  const std::vector<int> order = permutation(count);
  for (bool ran = true; ran;) {
    ran = false;
    for (int i : order) {
      if (m.threads[i].state != Thread::kReady) continue;
      ran = true;
      resume(i);
      if (!m.error.empty()) return;
    }
  }
  report_waiting();
}

inline void run(const Grid& grid, std::function<void()> body) {
  Machine& m = machine;
  const size_t of_block = size_t{grid.threads.x} * grid.threads.y * grid.threads.z;
  const size_t count = of_block * grid.cluster;
  if (of_block % 32 || !of_block || of_block > 1024) {
    throw std::runtime_error("a block must have whole warps");
  }
  if (grid.blocks.x % grid.cluster) throw std::runtime_error("a grid must have whole clusters");
  if (m.stack_count < count) {
    if (m.stacks) munmap(m.stacks, m.stack_count * kStack);
    void* stacks = mmap(nullptr, count * kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) throw std::bad_alloc();
    m.stacks = static_cast<unsigned char*>(stacks);
    m.stack_count = count;
  }
  m.body = std::move(body);
  m.error.clear();
  gridDim = grid.blocks;
  blockDim = grid.threads;
  struct sigaction action = {}, before_segv, before_bus;
  action.sa_handler = on_fault;
  sigaction(SIGSEGV, &action, &before_segv);
  sigaction(SIGBUS, &action, &before_bus);
  const int blocks = grid.blocks.x * grid.blocks.y * grid.blocks.z;
  if (sigsetjmp(m.fault, 1)) {
    m.error = who(m.current) + ": reads or writes outside of memory";
  } else {
    for (int i : permutation(blocks / grid.cluster)) {
      run_cluster(grid, i);
      for (unsigned block = 0; block < grid.cluster; ++block) {
        const unsigned char* end = dynamic_shared(block) + grid.shared;
        if (m.error.empty() && std::any_of(end, end + kGuard, [](auto b) { return b != kPoison; })) {
          m.error = who(block * of_block) + ": wrote behind its dynamic shared memory";
        }
      }
      if (!m.error.empty()) break;
    }
  }
  sigaction(SIGSEGV, &before_segv, nullptr);
  sigaction(SIGBUS, &before_bus, nullptr);
  m.body = nullptr;
  if (!m.error.empty()) throw std::runtime_error(m.error);
}

// How a test calls a function of tests/cuda, which returns null, or the error that `call` met.
#define BLAQ_TEST_EXPORT extern "C" __attribute__((visibility("default")))

template <typename Call>
const char* message_of(const Call& call) {
  static std::string text;
  try {
    call();
    return nullptr;
  } catch (const std::exception& error) {
    text = error.what();
    return text.c_str();
  }
}

}  // namespace emulate

using Stream = void*;

// Runs every block of `kernel`; std::runtime_error where the kernel breaks a rule.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, Stream, Arguments... arguments) {
  emulate::run(grid, [=] { kernel(arguments...); });
}

// As a launch that may begin before its predecessor has ended: here, like any other.
template <typename... Parameters, typename... Arguments>
void launch_after(void (*kernel)(Parameters...), const Grid& grid, Stream stream,
                  Arguments... arguments) {
  launch(kernel, grid, stream, arguments...);
}

template <typename... Parameters>
unsigned clusters_at_once(void (*)(Parameters...), const Grid& grid) {
  return emulate::machine.multiprocessors / grid.cluster;
}

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulate::dynamic_shared());
}

template <typename T>
T& shared() {
  alignas(16) static unsigned char memory[sizeof(T)];
  static uint64_t block = 0;
  if (emulate::machine.blocks.size() > 1) emulate::fail("shared<T>() is not for clusters");
  if (block != emulate::machine.block_number) {
    std::memset(memory, emulate::kPoison, sizeof(T));
    block = emulate::machine.block_number;
  }
  return *reinterpret_cast<T*>(memory);
}

}  // namespace blaq

#include "emulate_intrinsics.h"
