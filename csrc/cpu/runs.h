// A range of a matrix in memory order, cut where a new row begins.
#pragma once

#include <algorithm>
#include <cstdint>

namespace blaq {

// body(row, first, last) for every row that the elements [begin, end) of a matrix with `width`
// columns touch. So threads share the work evenly whether the matrix has one row or many.
template <typename Body>
void for_each_run(int64_t begin, int64_t end, int64_t width, const Body& body) {
  while (begin < end) {
    const int64_t row = begin / width, first = begin % width;
    const int64_t last = std::min(width, first + end - begin);
    body(row, first, last);
    begin += last - first;
  }
}

}  // namespace blaq
