// torch.ops.blaq.packed_linear on a CUDA device with accuracy 'fast': many rows of inputs, rounded
// to 8 bits, times the weight's levels as integers, decoded while they are multiplied.
#include <algorithm>
#include <array>
#include <cstring>

#include "codebook.h"
#include "cpu/level_table.h"
#include "int8_linear_kernel.h"
#include "int8_warpgroup_kernel.h"
#include "op.h"

namespace blaq {
namespace {

// Levels as integers, by code: what they are multiples of; of powers of two all but 128 are exact,
// which is 127.
float set_levels(const std::vector<double>& levels, int bits, LevelBytes& bytes) {
  std::array<float, 16> table{};
  signed_levels(levels, bits, table.data());
  const LevelTable integers(table.data(), bits);
  std::array<int8_t, 16> of_code;
  for (int code = 0; code < 16; ++code) {
    of_code[code] = static_cast<int8_t>(integers.level[code] - 128);
  }
  std::memcpy(bytes.word, of_code.data(), sizeof bytes.word);
  return integers.unit;
}

template <int bits>
void multiply(const Int8Product& call, Stream stream) {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) == 9) {
    launch_by_warpgroups<bits>(call, stream);
  } else {
    launch_by_warps<bits>(call, stream);
  }
}

template <typename Type>
void round_to(const Tensor& x, int64_t m, Tensor& chunks, Stream stream) {
  round_rows<Type>(static_cast<const typename Type::Word*>(x.const_data_ptr()), m, x.sizes().back(),
                   static_cast<RowChunk*>(chunks.mutable_data_ptr()), stream);
}

Tensor linear(const Tensor& input, const Tensor& qweight, const Tensor& scale,
              const std::optional<Tensor>& bias, std::vector<double> levels, int64_t group_size,
              const std::optional<Tensor>&, std::string) {
  const OnDevice device(input);
  const Stream stream = device.stream();
  const int bits = static_cast<int>(qweight.size(0));
  const int64_t n = qweight.size(1), row_bytes = qweight.size(2), k = input.sizes().back();
  std::vector<int64_t> shape = input.sizes().vec();
  shape.back() = n;
  Tensor output = torch::stable::new_empty(input, shape);
  if (output.numel() == 0) return output;
  const int64_t m = output.numel() / n;
  STD_TORCH_CHECK((group_size <= 0 || group_size % kChunkInputs == 0) && k > 0,
                  "blaq_cuda.packed_int8: called for what it does not cover");

  const auto bytes = [&](int64_t count) {
    return torch::stable::new_empty(input, {count}, ScalarType::Byte);
  };
  const Tensor x = torch::stable::contiguous(input);
  Tensor chunks = bytes(row_tiles_of(m) * chunks_of(k) * static_cast<int64_t>(sizeof(RowChunk)));
  const auto number = input.scalar_type() == ScalarType::Half       ? Number::fp16
                      : input.scalar_type() == ScalarType::BFloat16 ? Number::bf16
                                                                    : Number::fp32;
  const auto round = number == Number::fp16   ? round_to<Narrow<Fp16>>
                     : number == Number::bf16 ? round_to<Narrow<Bf16>>
                                              : round_to<Fp32>;
  round(x, m, chunks, stream);

  const auto* planes = qweight.const_data_ptr<uint8_t>();
  std::optional<Tensor> padded;
  if (!is_padded(planes, row_bytes)) {
    padded = bytes(bits * n * padded_row_bytes_of(row_bytes));
    pad_planes(planes, bits * n, row_bytes, padded->mutable_data_ptr(), stream);
    planes = padded->const_data_ptr<uint8_t>();
  }
  Int8Product call = {};
  call.rows = static_cast<const RowChunk*>(chunks.const_data_ptr());
  call.planes = {planes, n, padded_row_bytes_of(row_bytes)};
  call.scale = scale.const_data_ptr<float>();
  call.bias = bias ? bias->const_data_ptr() : nullptr;
  call.out = output.mutable_data_ptr();
  call.m = m;
  call.chunks = static_cast<int>(chunks_of(k));
  call.scale_stride = group_size == 0 ? 0 : static_cast<int>(scale.size(1));
  if (group_size > 0) {  // longer than a row: all the same
    call.group_chunks = static_cast<int>(std::min<int64_t>(group_size / kChunkInputs, 1 << 24));
  }
  call.level_unit = set_levels(levels, bits, call.levels);
  call.number = number;
  if (bits == 1) multiply<1>(call, stream);
  if (bits == 2) multiply<2>(call, stream);
  if (bits == 3) multiply<3>(call, stream);
  if (bits == 4) multiply<4>(call, stream);
  return output;
}

}  // namespace
}  // namespace blaq

STABLE_TORCH_LIBRARY_IMPL(blaq_cuda, CUDA, m) { m.impl("packed_int8", TORCH_BOX(&blaq::linear)); }
