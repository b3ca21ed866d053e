// torch.ops.blaq.solve: codes and scale of every group of a weight.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "cpu/scale_search.h"
#include "training_checks.h"

namespace blaq {
namespace {

// The largest magnitude of a tensor, whose values must all be finite.
float check_finite(const char* name, const Tensor& x) {
  const auto& kernels = training_kernels();
  const float* values = x.const_data_ptr<float>();
  std::vector<float> most(blocks_of(x.numel()));
  for_each_block(x.numel(), [&](int64_t block, int64_t begin, int64_t end) {
    most[block] = kernels.max_abs(values + begin, end - begin);
  });
  float largest = 0;
  for (size_t block = 0; block < most.size(); ++block) {
    if (!std::isfinite(most[block])) {
      const float* bad = values + block * kBlock;
      while (std::isfinite(*bad)) ++bad;
      BLAQ_REQUIRE(false, "solve", name, "be finite", list_text(std::vector<float>{*bad}));
    }
    largest = std::max(largest, most[block]);
  }
  return largest;
}

std::tuple<Tensor, Tensor> solve(const Tensor& latent, const Tensor& curvature,
                                 const std::optional<Tensor>& init_scale, std::vector<double> levels,
                                 int64_t group_size, int64_t max_iter, std::string method) {
  const char* op = "solve";
  check_dtype(op, "latent", latent, {ScalarType::Float});
  check_contiguous(op, "latent", latent);
  check_like(op, "curvature", curvature, "latent", latent, {ScalarType::Float});
  check_solver(op, levels, group_size, max_iter, method);
  const MatrixShape shape = matrix_shape(latent);
  if (init_scale) check_scale(op, "init_scale", *init_scale, shape, group_size, {ScalarType::Float});
  const float heaviest = std::max(1.0f, check_finite("latent", latent));
  const float steepest = check_finite("curvature", curvature);
  BLAQ_REQUIRE(static_cast<double>(heaviest) * steepest < 0x1p120, op, "curvature",
               "stay below 2^120 / max(1, |latent|)", steepest);

  Tensor codes = torch::stable::new_empty(latent, latent.sizes(), ScalarType::Byte);
  const int64_t row_groups = groups_per_row(shape.k, group_size);
  Tensor scale = group_size == 0 ? torch::stable::new_empty(latent, {1})
                                 : torch::stable::new_empty(latent, {shape.n, row_groups});
  const int64_t groups = group_size == 0 ? 1 : shape.n * row_groups;
  const int64_t row = group_size == 0 ? latent.numel() : shape.k;
  const int64_t length = group_size > 0 ? group_size : row;

  const Solver solver{Codebook(levels), method == "exact", max_iter};
  const auto& kernels = training_kernels();
  const float* w = latent.const_data_ptr<float>();
  const float* d = curvature.const_data_ptr<float>();
  const float* init = init_scale ? init_scale->const_data_ptr<float>() : nullptr;
  float* scales = scale.mutable_data_ptr<float>();
  uint8_t* out = codes.mutable_data_ptr<uint8_t>();
  const auto run = [&](int64_t g) {
    const int64_t within = g % row_groups * length, begin = g / row_groups * row + within;
    const Group group{w + begin, d + begin, std::min(length, row - within)};
    scales[g] = solve_scale(group, solver, init ? init[g] : 0.0f);
    for_each_block(group.n, [&](int64_t, int64_t first, int64_t last) {
      kernels.codes(group.w + first, last - first, solver.book, scales[g], out + begin + first);
    });
  };
  if (groups == 1) {
    run(0);
  } else {
    const int64_t grain = std::max<int64_t>(1, kBlock / std::max<int64_t>(1, length));
    torch::stable::parallel_for(0, groups, grain, [&](int64_t first, int64_t last) {
      for (int64_t g = first; g < last; ++g) run(g);
    });
  }
  return {codes, scale};
}

}  // namespace
}  // namespace blaq

STABLE_TORCH_LIBRARY_IMPL(blaq, CPU, m) { m.impl("solve", TORCH_BOX(&blaq::solve)); }
