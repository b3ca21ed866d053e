#include "cpu/capability.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

namespace blaq {
namespace {

#if defined(__x86_64__)
constexpr const char* kNames[] = {"scalar", "avx2", "avx512"};
#elif defined(__aarch64__)
constexpr const char* kNames[] = {"neon"};
#else
constexpr const char* kNames[] = {"scalar"};
#endif

Capability detect() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Capability::avx512 : avx2 ? Capability::avx2 : Capability::base;
#else
  return Capability::base;
#endif
}

std::atomic<Capability>& current() {
  static std::atomic<Capability> value{detect()};
  return value;
}

}  // namespace

Capability capability() { return current().load(std::memory_order_relaxed); }

std::string capability_name() { return kNames[static_cast<int>(capability())]; }

std::vector<std::string> capability_names() {
  return {kNames, kNames + static_cast<int>(detect()) + 1};
}

void set_capability(const std::string& name) {
  const auto names = capability_names();
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end()) {
    std::string list;
    for (const auto& n : names) list += (list.empty() ? "" : ", ") + n;
    throw std::invalid_argument("blaq.set_cpu_capability: name must be one of " + list + ", got '" +
                                name + "'");
  }
  current().store(static_cast<Capability>(found - names.begin()));
}

}  // namespace blaq
