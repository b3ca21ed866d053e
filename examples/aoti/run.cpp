// Runs a compiled packed model on a file of floats:  run MODEL.pt2 INPUT OUTPUT BATCH FEATURES...
// libblaq_ops.so, with which this is linked, registers the ops of torch.ops.blaq as it loads.
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <chrono>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <vector>

int main(int argc, char** argv) {
  if (argc < 5) {
    std::cerr << "usage: run MODEL.pt2 INPUT OUTPUT BATCH FEATURES...\n";
    return 2;
  }
  std::vector<int64_t> shape;
  for (int i = 4; i < argc; ++i) shape.push_back(std::atoll(argv[i]));
  at::Tensor input = at::empty(shape);
  std::ifstream file(argv[2], std::ios::binary);
  file.read(static_cast<char*>(input.data_ptr()), input.nbytes());
  if (file.gcount() != static_cast<std::streamsize>(input.nbytes())) {
    std::cerr << argv[2] << " must hold " << input.numel() << " floats\n";
    return 1;
  }

  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  at::Tensor output = model.run({input})[0].contiguous();
  std::ofstream(argv[3], std::ios::binary)
      .write(static_cast<const char*>(output.data_ptr()), output.nbytes());

  constexpr int kCalls = 20;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < kCalls; ++i) model.run({input});
  const std::chrono::duration<double, std::micro> passed = std::chrono::steady_clock::now() - start;
  std::cout << "output " << output.sizes() << ", " << passed.count() / kCalls << " us a call\n";
}
