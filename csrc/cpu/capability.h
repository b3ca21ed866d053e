// Which variant of the CPU kernels runs: the best that this processor has, or the one asked for.
#pragma once

#include <string>
#include <vector>

namespace blaq {

// `base` is what the compiler assumes of every processor of the architecture: SSE2 on x86-64, NEON on
// aarch64. Users know it as "scalar" and "neon".
enum class Capability { base, avx2, avx512 };

// The variant that kernels use now.
Capability capability();
std::string capability_name();

// Names that set_capability takes on this processor, ascending.
std::vector<std::string> capability_names();

// For tests and measurements; throws std::invalid_argument for a name not in capability_names().
void set_capability(const std::string& name);

}  // namespace blaq
