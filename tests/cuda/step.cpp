// solve, fused_trial and fused_step in emulation: what csrc/cuda/step.cu gives Python, for tensors
// of the CPU.
#include "cuda/step_entry.h"

BLAQ_TEST_EXPORT const char* call_integers() { return blaq::call_integers(); }
BLAQ_TEST_EXPORT const char* call_numbers() { return blaq::call_numbers(); }
BLAQ_TEST_EXPORT const char* table_columns() { return blaq::table_columns(); }

BLAQ_TEST_EXPORT const char* run_call(const int64_t* integers, const double* numbers,
                                      uint32_t order) {
  blaq::emulate::machine.order = order;
  return blaq::emulate::message_of([&] { blaq::run_call(integers, numbers); });
}
