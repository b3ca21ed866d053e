// How the emulation runs a launch: blocks one after another, or cluster after cluster, threads as
// fibers; part of emulate.h.
#pragma once

namespace blaq {
namespace emulate {

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
  // A block goes on for as long as it can before the next one does: as far apart as they may be.
  const std::vector<int> order = permutation(of_block), blocks = permutation(grid.cluster);
  const auto run_on = [&](int block) {
    bool ran = false;
    for (int i : order) {
      if (m.threads[block * of_block + i].state != Thread::kReady) continue;
      ran = true;
      resume(block * of_block + i);
      if (!m.error.empty()) return false;
    }
    return ran;
  };
  for (bool ran = true; ran;) {
    ran = false;
    for (int block : blocks) {
      while (run_on(block)) ran = true;
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
