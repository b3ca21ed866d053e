// The way in from Python, for nvcc's build and for the emulation's: a call's fields by name, so
// that blaq_kernels/cuda/ need not know their order.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/solve_kernel.h"

namespace blaq {

// op: 0 trial, 1 step, 2 solve. dtype: 0 float32, 1 bfloat16, 2 float16. Addresses, or 0 for none.
// clang-format off
#define BLAQ_CALL_INTEGERS(X)                                                                    \
  X(op) X(dtype) X(whole) X(table) X(row_of_part) X(row_of_group) X(runs) X(parts)               \
  X(groups) X(run_count) X(part) X(run) X(lr) X(step) X(backtrack) X(grad_scale) X(found_inf)    \
  X(doubles) X(max_iter) X(exact) X(flips) X(sums) X(bins) X(scales) X(w) X(places) X(marks)     \
  X(start) X(codes) X(curvature) X(mean) X(levels)
// clang-format on
#define BLAQ_CALL_NUMBERS(X) \
  X(beta1) X(beta2) X(log_beta1) X(log_beta2) X(eps) X(weight_decay) X(clip)

#define BLAQ_NAME(name) #name " "
#define BLAQ_FIELD(name) name,
struct CallInteger {
  enum { BLAQ_CALL_INTEGERS(BLAQ_FIELD) count };
};
struct CallNumber {
  enum { BLAQ_CALL_NUMBERS(BLAQ_FIELD) count };
};
inline const char* call_integers() { return BLAQ_CALL_INTEGERS(BLAQ_NAME); }
inline const char* call_numbers() { return BLAQ_CALL_NUMBERS(BLAQ_NAME); }
inline const char* table_columns() {
  return "param grad trial_grad latent exp_avg exp_avg_sq scale length per_row row first_group "
         "first_part parts index aligned";
}
#undef BLAQ_NAME
#undef BLAQ_FIELD

template <typename Type, bool kCommits>
void run_levels(const Call& call, bool whole, Stream stream) {
  call.book.count == 1 ? run_stage<Type, kCommits, true>(call, whole, stream)
                       : run_stage<Type, kCommits, false>(call, whole, stream);
}

template <typename Type>
void run_op(int64_t op, const Call& call, bool whole, Stream stream) {
  op == 0 ? run_levels<Type, false>(call, whole, stream)
          : run_levels<Type, true>(call, whole, stream);
}

// `numbers` are followed by the levels. Rules are checked before, in Python.
inline void run_call(const int64_t* integers, const double* numbers, Stream stream) {
  using I = CallInteger;
  using N = CallNumber;
  const auto pointer = [&]<typename T>(T*& field, int i) {
    field = reinterpret_cast<T*>(integers[i]);
  };
  Call call = {};
  pointer(call.table, I::table), pointer(call.row_of_part, I::row_of_part);
  pointer(call.row_of_group, I::row_of_group), pointer(call.runs, I::runs);
  call.parts = integers[I::parts], call.groups = integers[I::groups];
  call.run_count = integers[I::run_count], call.part = integers[I::part],
  call.run = integers[I::run];
  pointer(call.lr, I::lr), pointer(call.step, I::step), pointer(call.backtrack, I::backtrack);
  pointer(call.grad_scale, I::grad_scale), pointer(call.found_inf, I::found_inf);
  call.doubles = integers[I::doubles];
  call.beta1 = numbers[N::beta1], call.beta2 = numbers[N::beta2];
  call.log_beta1 = numbers[N::log_beta1], call.log_beta2 = numbers[N::log_beta2];
  call.eps = numbers[N::eps], call.weight_decay = numbers[N::weight_decay],
  call.clip = numbers[N::clip];
  call.book = Book::of(numbers + N::count, static_cast<int>(integers[I::levels]));
  call.max_iter = integers[I::max_iter], call.exact = integers[I::exact];
  pointer(call.flips, I::flips), pointer(call.sums, I::sums), pointer(call.bins, I::bins);
  pointer(call.scales, I::scales), pointer(call.w, I::w), pointer(call.places, I::places),
      call.marks = reinterpret_cast<void*>(integers[I::marks]);
  pointer(call.start, I::start);
  call.codes = integers[I::codes];
  if (integers[I::op] == 2) {
    const Given given = {reinterpret_cast<const float*>(integers[I::curvature])};
    return run_solve(call, given, reinterpret_cast<float*>(integers[I::mean]), stream);
  }
  const bool whole = integers[I::whole] != 0;
  switch (integers[I::dtype]) {
    case 0:
      return run_op<F32>(integers[I::op], call, whole, stream);
    case 1:
      return run_op<B16>(integers[I::op], call, whole, stream);
    default:
      return run_op<F16>(integers[I::op], call, whole, stream);
  }
}

}  // namespace blaq
