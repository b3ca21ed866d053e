// The ops of packed inference for a program without Python. In Python blaq_kernels/schemas.py defines them;
// these are its words, which a test compares.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(blaq, m) {
  m.def("unpack(Tensor qweight, Tensor scale, float[] levels, int group_size, int in_features, "
        "ScalarType dtype) -> Tensor");
  m.def("repack(Tensor qweight) -> Tensor");
  m.def("packed_linear(Tensor input, Tensor qweight, Tensor scale, Tensor? bias, float[] levels, "
        "int group_size, Tensor? repacked=None, str accuracy='high') -> Tensor");
  m.def("packed_conv2d(Tensor input, Tensor qweight, Tensor scale, Tensor? bias, float[] levels, "
        "int group_size, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, "
        "int groups, Tensor? repacked=None, str accuracy='high', bool relu=False) -> Tensor");
  m.def("unrepack(Tensor repacked, int bits, int n, int in_features) -> Tensor");
  m.def("conv_repack(Tensor qweight, int in_features, int taps, int groups) -> Tensor");
  m.def("binary_repack(Tensor qweight, int in_features, int taps, int groups) -> Tensor");
  m.def("binary_linear(Tensor input, Tensor qweight, Tensor scale, Tensor? bias, int group_size, "
        "Tensor? repacked=None) -> Tensor");
  m.def("binary_conv2d(Tensor input, Tensor qweight, Tensor scale, Tensor? bias, int group_size, "
        "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups, "
        "Tensor? repacked=None) -> Tensor");
}
