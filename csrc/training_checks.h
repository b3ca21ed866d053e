// Argument rules that the training ops share, beside the general ones of checks.h.
#pragma once

#include "checks.h"

namespace blaq {

inline void check_solver(const char* op, const std::vector<double>& levels, int64_t group_size,
                         int64_t max_iter, const std::string& method) {
  check_levels(op, levels);
  check_group_size(op, group_size);
  BLAQ_REQUIRE(max_iter >= 1, op, "max_iter", "be at least 1", max_iter);
  BLAQ_REQUIRE(method == "alternating" || method == "exact", op, "method",
               "be 'alternating' or 'exact'", "'" + method + "'");
}

}  // namespace blaq
