// Memory of a thread that outlives a call.
#pragma once

#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace blaq {

// Memory between the two passes; kept by the thread, so that a step does not fault pages in anew. A
// thread has three: one for groups, and two that large weights take in turn.
class Scratch {
 public:
  explicit Scratch(int64_t bytes, int which = 0) : kept_(kept()[which]) {
    if (bytes > kept_.capacity) {
      kept_.capacity = 0;
      kept_.buffer.reset(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
      if (!kept_.buffer) throw std::bad_alloc();
      kept_.capacity = bytes;
    }
    next_ = kept_.buffer.get();
  }
  ~Scratch() {
    if (kept_.capacity > kKept) kept_.buffer.reset(), kept_.capacity = 0;
  }
  Scratch(const Scratch&) = delete;
  template <typename T>
  T* take(int64_t n) {
    T* here = reinterpret_cast<T*>(next_);
    next_ += bytes_of<T>(n);
    return here;
  }
  template <typename T>
  static int64_t bytes_of(int64_t n) {
    return (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

 private:
  static constexpr int64_t kKept = 64 << 20;  // bytes a thread keeps between calls

  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  struct Buffer {
    std::unique_ptr<char, Free> buffer;
    int64_t capacity = 0;
  };
  static std::array<Buffer, 3>& kept() {
    thread_local std::array<Buffer, 3> buffers;
    return buffers;
  }
  Buffer& kept_;
  char* next_;
};

}  // namespace blaq
