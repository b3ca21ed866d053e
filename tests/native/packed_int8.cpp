// A packed weight times rows by the kernels of this processor, 8-bit ones and exact ones, against float64. Stands
// alone, for processors that are emulated: links repack.cpp beside it, csrc/cpu/packed_int8.cpp and
// capability.cpp, and no torch.
#include "cpu/packed_matmul.cpp"

#include <cstdio>

#include "cpu/packed_int8.h"

namespace blaq {
void repack(int bits, const uint8_t* planes, int64_t n, int64_t bytes, uint8_t* out);
}

namespace {

using namespace blaq;

uint32_t state = 1;
uint32_t random_bits() { return (state = state * 1664525u + 1013904223u) >> 8; }
float normal() {
  float sum = 0;
  for (int i = 0; i < 12; ++i) sum += random_bits() / 16777216.0f;
  return sum - 6;
}

int failures = 0;
void expect(bool good, const char* what, int bits, int64_t n, int64_t k, int64_t group, Accuracy accuracy) {
  if (good) return;
  std::printf("%s: bits %d, N %d, K %d, group %d, accuracy %d\n", what, bits, static_cast<int>(n),
              static_cast<int>(k), static_cast<int>(group), static_cast<int>(accuracy));
  ++failures;
}

void check(const std::vector<double>& book, int64_t n, int64_t k, int64_t group, Accuracy accuracy) {
  const int bits = 1 + std::bit_width(book.size() - 1), m = 7;
  const int64_t bytes = (k + 7) / 8, groups = group > 0 ? (k + group - 1) / group : 1;
  std::vector<uint8_t> planes(bits * n * bytes), repacked(repacked_bytes(bits, n, k) + 64);
  std::vector<float> scale(group == 0 ? 1 : n * groups), bias(n);
  for (float& s : scale) s = 0.5f + random_bits() / 16777216.0f;
  for (float& b : bias) b = normal();
  PackedMatrix weight{planes.data(), bits, n, k, n, {}, scale.data(), group};
  signed_levels(book, bits, weight.levels);
  weight.bias = bias.data();
  std::vector<double> dense(n * k);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      const int code = random_bits() >> 4 & ((1 << bits) - 1);
      for (int b = 0; b < bits; ++b) planes[(b * n + i) * bytes + j / 8] |= (code >> b & 1) << (j % 8);
      dense[i * k + j] = static_cast<double>(weight.levels[code]) *
                         scale[group == 0 ? 0 : group < 0 ? i : i * groups + j / group];
    }
  }
  uint8_t* words = repacked.data() + (64 - reinterpret_cast<uintptr_t>(repacked.data()) % 64) % 64;
  repack(bits, planes.data(), n, bytes, words);

  const int64_t stride = padded(k);
  std::vector<float> x(m * stride), y(m * n), alone(n);
  for (int r = 0; r < m; ++r) {
    for (int64_t j = 0; j < k; ++j) x[r * stride + j] = r == 5 ? 0 : normal();
  }
  const auto multiply = [&](int first, int count, float* out) {
    const Product product{x.data() + first * stride, stride, count, 0, n, out, n};
    accuracy == Accuracy::exact ? multiply_rows(weight, product) : multiply_int8(weight, words, accuracy, product);
  };
  const auto error = [&] {
    double wrong = 0, norm = 0;
    for (int r = 0; r < m; ++r) {
      for (int64_t i = 0; i < n; ++i) {
        double exact = bias[i];
        for (int64_t j = 0; j < k; ++j) exact += dense[i * k + j] * x[r * stride + j];
        wrong += (y[r * n + i] - exact) * (y[r * n + i] - exact), norm += exact * exact;
      }
    }
    return std::sqrt(wrong / norm);
  };
  multiply(0, m, y.data());
  const double budget = accuracy == Accuracy::exact ? 1e-6 : accuracy == Accuracy::high ? 4e-4 : 1e-2;
  expect(error() <= budget, "error above its budget", bits, n, k, group, accuracy);
  multiply(3, 1, alone.data());
  expect(std::equal(alone.begin(), alone.end(), y.begin() + 3 * n), "a row depends on its batch", bits, n, k,
         group, accuracy);
  x[2 * stride + k - 1] = NAN;
  const std::vector<float> before = y;
  multiply(0, m, y.data());
  for (int64_t i = 0; i < m * n; ++i) {
    if (i / n == 2) expect(std::isnan(y[i]), "NaN is lost", bits, n, k, group, accuracy);
    else expect(y[i] == before[i], "NaN spreads", bits, n, k, group, accuracy);
  }
}

}  // namespace

int main() {
  using blaq::Accuracy;
  const std::vector<std::vector<double>> books{
      {1}, {0, 1}, {0.5, 1}, {0.125, 0.25, 0.5, 1}, {0.25, 0.5, 0.75, 1},
      {1 / 128., 1 / 64., 1 / 32., 1 / 16., 0.125, 0.25, 0.5, 1}};
  int checks = 0;
  for (const auto& book : books) {
    for (const Accuracy accuracy : {Accuracy::exact, Accuracy::high, Accuracy::fast}) {
      for (const int64_t group : {0, -1, 96}) {
        for (const auto& [n, k] : {std::pair<int64_t, int64_t>{70, 1100}, {33, 512}}) {
          check(book, n, k, group, accuracy), ++checks;
        }
      }
    }
  }
  const blaq::Int8Kernels* kernels = blaq::int8_kernels();
  std::printf("%d checks of %s, %s: %d failures\n", checks, blaq::capability_name().c_str(),
              kernels ? kernels->name : "no 8-bit kernels", failures);
  return failures != 0;
}
