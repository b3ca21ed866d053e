// Dtypes of inputs and outputs, as kernels read and write them.
#pragma once

#include "device.h"

namespace blaq {

struct Fp32 {
  using Word = float;
  using Sum = float;
  static BLAQ_DEVICE float read(float x) { return x; }
  static BLAQ_DEVICE float write(float x) { return x; }
};
struct Fp64 {
  using Word = double;
  using Sum = double;
  static BLAQ_DEVICE double read(double x) { return x; }
  static BLAQ_DEVICE double write(double x) { return x; }
};
template <typename Half>
struct Narrow {
  using Word = uint16_t;
  using Sum = float;
  static BLAQ_DEVICE float read(uint16_t x) { return Half::to_float(x); }
  static BLAQ_DEVICE uint16_t write(float x) { return Half::from_float(x); }
};

}  // namespace blaq
