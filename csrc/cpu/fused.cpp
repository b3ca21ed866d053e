// torch.ops.blaq.fused_trial and fused_step: arguments and their rules. Boxed by hand, because a list of
// stable tensors costs more than the step of a small model; step.cpp does the work.
#include <Python.h>

#include <algorithm>
#include <array>

#include "cpu/step.h"
#include "tensor_list.h"
#include "training_checks.h"

namespace blaq {
namespace {

using torch::stable::detail::to;

// Arguments from the dispatcher's stack, in the schema's order; each is taken over once.
class Arguments {
 public:
  explicit Arguments(StableIValue* stack) : next_(stack) {}
  template <typename T>
  T take() {
    return to<T>(*next_++);
  }
  StableIValue raw() { return *next_++; }

 private:
  StableIValue* next_;
};

double scalar(const char* op, const char* name, const Tensor& x) {
  check_dtype(op, name, x, {ScalarType::Float, ScalarType::Double});
  BLAQ_REQUIRE(x.dim() == 0, op, name, "be a 0-dim tensor", list_text(x.sizes()));
  return x.scalar_type() == ScalarType::Double ? *x.const_data_ptr<double>() : *x.const_data_ptr<float>();
}

double one_element(const char* op, const char* name, const std::optional<Tensor>& x, double otherwise) {
  if (!x) return otherwise;
  check_dtype(op, name, *x, {ScalarType::Float});
  BLAQ_REQUIRE(x->numel() == 1, op, name, "have one element", x->numel());
  return *x->const_data_ptr<float>();
}

// Lets go of lists under one acquisition of Python's lock. Each tensor whose last owner is then a Python
// object would else take the lock for itself: of 1200 tensors, half of the call's time.
class ReleaseTogether {
 public:
  explicit ReleaseTogether(std::vector<TensorList*> lists) : lists_(std::move(lists)) {}
  ~ReleaseTogether() {
    if (!Py_IsInitialized()) return;
    const PyGILState_STATE state = PyGILState_Ensure();
    for (TensorList* list : lists_) list->clear();
    PyGILState_Release(state);
  }

 private:
  std::vector<TensorList*> lists_;
};

// The part of both schemas that follows the lists.
struct Tail {
  Tensor lr, step;
  std::optional<Tensor> backtrack;
  double beta1, beta2, eps, weight_decay, clip;
  std::vector<double> levels;
  int64_t group_size, max_iter;
  std::string method;
  std::optional<Tensor> grad_scale, found_inf;

  Tail(Arguments& arguments, bool has_backtrack)
      : lr(arguments.take<Tensor>()), step(arguments.take<Tensor>()) {
    if (has_backtrack) backtrack = arguments.take<Tensor>();
    beta1 = arguments.take<double>();
    beta2 = arguments.take<double>();
    eps = arguments.take<double>();
    weight_decay = arguments.take<double>();
    clip = arguments.take<double>();
    levels = arguments.take<std::vector<double>>();
    group_size = arguments.take<int64_t>();
    max_iter = arguments.take<int64_t>();
    method = arguments.take<std::string>();
    grad_scale = arguments.take<std::optional<Tensor>>();
    found_inf = arguments.take<std::optional<Tensor>>();
  }

  void check_scalars(const char* op) const {
    scalar(op, "lr", lr);
    scalar(op, "step", step);
    BLAQ_REQUIRE(beta1 >= 0 && beta1 < 1, op, "beta1", "be in [0, 1)", beta1);
    BLAQ_REQUIRE(beta2 >= 0 && beta2 < 1, op, "beta2", "be in [0, 1)", beta2);
    BLAQ_REQUIRE(eps >= 0, op, "eps", "be at least 0", eps);
    BLAQ_REQUIRE(weight_decay >= 0, op, "weight_decay", "be at least 0", weight_decay);
    BLAQ_REQUIRE(clip >= 0, op, "clip", "be at least 0 (0 is off)", clip);
  }

  Stage stage(const char* op, double a) const {
    return {StepScalars(scalar(op, "lr", lr), scalar(op, "step", step), beta1, beta2, eps, weight_decay,
                        clip, a, one_element(op, "grad_scale", grad_scale, 1.0)),
            Solver{Codebook(levels), method == "exact", max_iter}, group_size};
  }
};

void check_layout(const char* op, const TensorList& list, size_t i) {
  const ListedTensor& x = list[i];
  BLAQ_REQUIRE(x.is_contiguous(), op, list.name(i), "be contiguous", "strides " + list_text(x.strides()));
}

void check_listed_dtype(const char* op, const TensorList& list, size_t i, ScalarType dtype) {
  BLAQ_REQUIRE(list[i].dtype == dtype, op, list.name(i), "be " + dtype_name(dtype),
               dtype_name(list[i].dtype));
}

void check_listed(const char* op, const TensorList& list, size_t i, const ListedTensor& param,
                  ScalarType dtype) {
  const ListedTensor& x = list[i];
  check_listed_dtype(op, list, i, dtype);
  BLAQ_REQUIRE(x.same_shape(param), op, list.name(i),
               "have the shape of params[" + text(i) + "] " + list_text(param.shape()),
               list_text(x.shape()));
  check_layout(op, list, i);
}

MatrixShape matrix_shape(const ListedTensor& x) {
  if (x.dim < 2) return {1, x.numel};
  int64_t k = 1;
  for (int64_t i = 1; i < x.dim; ++i) k *= x.sizes[i];
  return {x.sizes[0], k};
}

int64_t scales_of(MatrixShape weight, int64_t group_size) {
  return group_size == 0 ? 1 : weight.n * groups_per_row(weight.k, group_size);
}

void check_listed_scale(const char* op, const TensorList& scales, size_t i, MatrixShape weight,
                        int64_t group_size) {
  const ListedTensor& x = scales[i];
  check_listed_dtype(op, scales, i, ScalarType::Float);
  const int64_t groups = groups_per_row(weight.k, group_size);
  const bool ok = group_size == 0 ? x.dim == 1 && x.sizes[0] == 1
                                  : x.dim == 2 && x.sizes[0] == weight.n && x.sizes[1] == groups;
  BLAQ_REQUIRE(ok, op, scales.name(i),
               "have shape " + (group_size == 0 ? std::string("[1]")
                                                : list_text(std::vector<int64_t>{weight.n, groups})),
               list_text(x.shape()));
  check_layout(op, scales, i);
}

// A state of every weight: a tensor for each, or one tensor of all, in which each begins at a multiple of
// kFlatAlignment elements (blaq_kernels/flat.py).
bool is_flat(const TensorList& list, const TensorList& params) {
  return list.size() == 1 && params.size() > 1;
}

class States {
 public:
  States(const TensorList& list, const TensorList& params) : list_(list), flat_(is_flat(list, params)) {}

  const TensorList& list() const { return list_; }
  bool flat() const { return flat_; }

  // The next weight's, of `count` elements.
  float* next(int64_t count) {
    if (!flat_) return static_cast<float*>(list_[taken_++].data);
    float* here = static_cast<float*>(list_[0].data) + taken_;
    taken_ += (count + kFlatAlignment - 1) / kFlatAlignment * kFlatAlignment;
    return here;
  }

  // After the last weight: whether a flat tensor is what was taken from it.
  void check(const char* op) const {
    if (!flat_) return;
    const ListedTensor& x = list_[0];
    check_listed_dtype(op, list_, 0, ScalarType::Float);
    BLAQ_REQUIRE(x.dim == 1 && x.sizes[0] == taken_, op, list_.name(0),
                 "have shape [" + text(taken_) + "] for all params", list_text(x.shape()));
    check_layout(op, list_, 0);
  }

 private:
  static constexpr int64_t kFlatAlignment = 16;
  const TensorList& list_;
  const bool flat_;
  int64_t taken_ = 0;  // tensors, or elements of the flat one
};

// A stretch of memory; `tag` orders equal starts and says whether the op writes it.
struct Span {
  uintptr_t begin, end;
  uint32_t list, index;
  bool operator==(const Span&) const = default;
};

int64_t bytes_of(const ListedTensor& x) {
  return x.numel * (x.dtype == ScalarType::Float || x.dtype == ScalarType::Int ? 4
                    : x.dtype == ScalarType::Double || x.dtype == ScalarType::Long ? 8 : 2);
}

// No written tensor may share memory with another tensor of the call. Whether spans overlap depends on
// the spans alone, so the answer for the last calls is remembered: a training loop passes the same ones.
void check_overlap(const char* op, const std::vector<const TensorList*>& lists, uint32_t written) {
  thread_local std::vector<Span> spans;
  spans.clear();
  for (uint32_t l = 0; l < lists.size(); ++l) {
    for (uint32_t i = 0; i < lists[l]->size(); ++i) {
      const ListedTensor& x = (*lists[l])[i];
      const auto begin = reinterpret_cast<uintptr_t>(x.data);
      if (x.numel) spans.push_back({begin, begin + bytes_of(x), l, i});
    }
  }
  thread_local std::vector<Span> known[2];
  thread_local uint32_t known_written[2], turn = 0;
  for (int k = 0; k < 2; ++k) {
    if (known_written[k] == written && known[k] == spans) return;
  }
  std::vector<Span> sorted = spans;
  std::sort(sorted.begin(), sorted.end(), [](const Span& x, const Span& y) { return x.begin < y.begin; });
  const Span* reach = nullptr;
  for (const Span& span : sorted) {
    if (reach && span.begin < reach->end) {
      BLAQ_REQUIRE(span.list >= written && reach->list >= written, op, lists[span.list]->name(span.index),
                   "not overlap another tensor of the call", lists[reach->list]->name(reach->index));
    }
    if (!reach || span.end > reach->end) reach = &span;
  }
  known[turn].swap(spans);
  known_written[turn] = written;
  turn ^= 1;
}

// Rules of both ops, then the weights. `lists` begins with params, and the first `written` are written.
std::vector<Weight> weights_of(const char* op, const std::vector<const TensorList*>& lists,
                               uint32_t written, const TensorList& params, const TensorList& grads,
                               const TensorList* trial_grads, const TensorList& latents,
                               const TensorList& exp_avgs, const TensorList& exp_avg_sqs,
                               const TensorList& scales, const Tail& tail) {
  States latent(latents, params), exp_avg(exp_avgs, params), exp_avg_sq(exp_avg_sqs, params),
      scale(scales, params);
  const std::array states{&latent, &exp_avg, &exp_avg_sq};  // in the shape of their weight
  for (const TensorList* list : lists) {
    const bool is_state = list != &grads && list != trial_grads;
    BLAQ_REQUIRE(list->size() == params.size() || (is_state && is_flat(*list, params)), op, list->name(),
                 "have as many tensors as params (" + text(params.size()) + ")", list->size());
  }
  std::vector<Weight> weights;
  weights.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const ListedTensor& param = params[i];
    BLAQ_REQUIRE(is_one_of(param.dtype, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}), op,
                 params.name(i), "be float32 or bfloat16 or float16", dtype_name(param.dtype));
    check_layout(op, params, i);
    check_listed(op, grads, i, param, param.dtype);
    if (trial_grads) check_listed(op, *trial_grads, i, param, param.dtype);
    for (const States* state : states) {
      if (!state->flat()) check_listed(op, state->list(), i, param, ScalarType::Float);
    }
    const MatrixShape shape = matrix_shape(param);
    if (!scale.flat()) check_listed_scale(op, scales, i, shape, tail.group_size);
    const Dtype dtype = param.dtype == ScalarType::Float      ? Dtype::f32
                        : param.dtype == ScalarType::BFloat16 ? Dtype::bf16
                                                              : Dtype::f16;
    const int64_t n = param.numel, scale_count = scales_of(shape, tail.group_size);
    weights.push_back({param.data, grads[i].data, trial_grads ? (*trial_grads)[i].data : nullptr,
                       latent.next(n), exp_avg.next(n), exp_avg_sq.next(n), scale.next(scale_count),
                       nullptr, shape.n, shape.k, dtype});
  }
  for (const States* state : states) state->check(op);
  scale.check(op);
  one_element(op, "grad_scale", tail.grad_scale, 1);
  one_element(op, "found_inf", tail.found_inf, 0);
  if (params.size()) check_overlap(op, lists, written);
  return weights;
}

void fused_trial(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = "fused_trial";
  Arguments arguments(stack);
  TensorList params("params", arguments.raw()), grads("grads", arguments.raw()),
      latents("latents", arguments.raw()), exp_avgs("exp_avgs", arguments.raw()),
      exp_avg_sqs("exp_avg_sqs", arguments.raw()), scales("scales", arguments.raw());
  const ReleaseTogether release({&params, &grads, &latents, &exp_avgs, &exp_avg_sqs, &scales});
  const Tail tail(arguments, false);
  tail.check_scalars(op);
  check_solver(op, tail.levels, tail.group_size, tail.max_iter, tail.method);
  const auto weights =
      weights_of(op, {&params, &grads, &latents, &exp_avgs, &exp_avg_sqs, &scales}, 1, params, grads,
                 nullptr, latents, exp_avgs, exp_avg_sqs, scales, tail);
  if (one_element(op, "found_inf", tail.found_inf, 0) != 0) return;
  run_trial(weights, tail.stage(op, 1.0));
}

void fused_step(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = "fused_step";
  Arguments arguments(stack);
  TensorList params("params", arguments.raw()), grads("grads", arguments.raw()),
      trial_grads("trial_grads", arguments.raw()), latents("latents", arguments.raw()),
      exp_avgs("exp_avgs", arguments.raw()), exp_avg_sqs("exp_avg_sqs", arguments.raw()),
      scales("scales", arguments.raw());
  const ReleaseTogether release({&params, &grads, &trial_grads, &latents, &exp_avgs, &exp_avg_sqs, &scales});
  const Tail tail(arguments, true);
  const auto flips = arguments.take<std::optional<Tensor>>();
  tail.check_scalars(op);
  const double a = scalar(op, "backtrack", *tail.backtrack);
  BLAQ_REQUIRE(a > 0 && a <= 1, op, "backtrack", "be in (0, 1]", a);
  BLAQ_REQUIRE(trial_grads.size() > 0 || a == 1 || params.size() == 0, op, "trial_grads",
               "be given where backtrack < 1", "none");
  check_solver(op, tail.levels, tail.group_size, tail.max_iter, tail.method);
  std::vector<const TensorList*> lists{&params, &latents, &exp_avgs, &exp_avg_sqs, &scales, &grads};
  if (trial_grads.size()) lists.push_back(&trial_grads);
  auto weights = weights_of(op, lists, 5, params, grads, trial_grads.size() ? &trial_grads : nullptr,
                            latents, exp_avgs, exp_avg_sqs, scales, tail);
  if (flips) {
    check_dtype(op, "flips", *flips, {ScalarType::Long});
    const auto count = static_cast<int64_t>(params.size());
    BLAQ_REQUIRE(has_shape(*flips, {count}), op, "flips", "have shape [" + text(count) + "]",
                 list_text(flips->sizes()));
    check_contiguous(op, "flips", *flips);
    int64_t* counts = flips->mutable_data_ptr<int64_t>();
    for (size_t i = 0; i < weights.size(); ++i) weights[i].flips = counts + i;
  }
  if (a == 1) {  // LAQ, bit for bit, whatever the trial said
    for (Weight& weight : weights) weight.trial_grad = nullptr;
  }
  const Stage stage = tail.stage(op, a);
  one_element(op, "found_inf", tail.found_inf, 0) != 0 ? run_restore(weights, stage)
                                                       : run_step(weights, stage);
}

}  // namespace
}  // namespace blaq

STABLE_TORCH_LIBRARY_IMPL(blaq, CPU, m) {
  m.impl("fused_trial", &blaq::fused_trial);
  m.impl("fused_step", &blaq::fused_step);
}
