// A convolution with a packed weight in 8-bit arithmetic: AVX-512 with VBMI and VNNI only.
//
// What an input pixel's channels are for the weights - tables or 8-bit integers, as packed_int8.h
// has them - is made once for each pixel and serves every tap of the kernel and every output. A
// thread keeps it for the lines of input that its place in the output needs, so no matrix of
// patches is ever made. Each pixel has units of its own, one for at most 256 channels: a result
// depends on the pixels under the kernel alone, and a pixel in the padding adds nothing.
#pragma once

#include "cpu/conv.h"
#include "cpu/packed_int8.h"

namespace blaq {

// Registers for 16 outputs and 32 channels of a tap. A 2-bit weight is a sum of two 1-bit ones.
inline int64_t conv_words(int bits) { return bits <= 2 ? bits : 4; }

// The weight in the order that convolve_int8 reads: [groups][tiles of 16 outputs][taps][words][64
// bytes].
struct ConvRepacked {
  int64_t groups, tiles, taps, words;  // words: of all channels of a group

  ConvRepacked(int bits, int64_t n, int64_t in_features, int64_t taps_, int64_t groups_)
      : groups(groups_),
        tiles((n / groups_ + 15) / 16),
        taps(taps_),
        words(padded(in_features / taps_) / 32 * conv_words(bits)) {}
  std::vector<int64_t> shape() const { return {groups, tiles, taps, words, 64}; }
  int64_t tile_bytes() const { return taps * words * 64; }
};

// Whether `convolve_int8` can, and is faster than others.
bool has_conv_int8(const PackedMatrix& weight, Accuracy accuracy, const Conv& conv);

void convolve_int8(const PackedMatrix& weight, const uint8_t* repacked, Accuracy accuracy,
                   const Conv& conv, bool relu, const ConvTensors& tensors);

}  // namespace blaq
