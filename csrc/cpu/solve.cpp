// torch.ops.blaq.solve: codes and scale of every group of a weight.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "cpu/scale_search.h"
#include "training_checks.h"

namespace blaq {
namespace {

void check_finite(const char* name, const Tensor& x) {
  const float* values = x.const_data_ptr<float>();
  const int64_t n = x.numel();
  std::vector<char> bad(blocks_of(n));
  for_each_block(n, [&](int64_t block, int64_t begin, int64_t end) {
    float sum = 0;  // 0 · x is 0 for a finite x, NaN otherwise
    for (int64_t i = begin; i < end; ++i) sum += 0.0f * values[i];
    bad[block] = sum != 0.0f;
  });
  for (size_t block = 0; block < bad.size(); ++block) {
    if (!bad[block]) continue;
    int64_t i = static_cast<int64_t>(block) * kBlock;
    while (std::isfinite(values[i])) ++i;
    BLAQ_REQUIRE(false, "solve", name, "be finite", list_text(std::vector<float>{values[i]}));
  }
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
  check_finite("latent", latent);
  check_finite("curvature", curvature);

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
    scales[g] = solve_scale(group, solver, init ? init[g] : 0.0f, nullptr);
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
