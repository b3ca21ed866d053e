// Weights that a step passes over once: large ones, whose exact scale is most often still the last one.
#pragma once

#include <vector>

#include "cpu/step_runner.h"

namespace blaq {

// Whether a weight of n elements is one: in a smaller one bins alone are not precise enough.
bool takes_one_pass(const Solver& solver, int64_t n);

void run_once(const Runner& runner, const std::vector<const Weight*>& weights);

}  // namespace blaq
