// The weighted histogram of |w| that one block fills: where a magnitude goes, and sums in fixed
// point.
//
// Bins ascend with |w|: a window of kOctaves octaves in bins of 1/64 octave, and beyond it, where a
// scale that moved too far is still found roughly, bins of a whole octave. Each has Σd and Σd ·
// (place of |w| in the bin), from which Σd|w| follows without a loss: |w| is linear in its bits
// within an octave.
//
// Fixed point, so that the order of additions is no matter, in words of 32 bits, for which alone
// shared memory has an atomic addition; what a word overflows by is counted in a second one, so a
// sum has 64 bits. Its unit, 2^-31 of a power of two that no d of the block has reached so far: the
// first tile of 2048 weights says which, three octaves above its largest d. Where a later tile
// passes it, the unit is raised in the same way, and the sums are rounded to it; tiles come in one
// order, so the units are always the same. The largest d so far being more than 2^-4 of that power,
// a d loses at most half a unit, 2^-28 of the largest, and not always to one side: a weight that is
// one of a million equals still has 6 digits beside a single one that weighs a million times as
// much.
#pragma once

#include "codebook.h"
#include "cuda/device.h"

namespace blaq {

constexpr int kThreads = 256;  // of every block that fills or reads a histogram
constexpr int kBinShift = 17;  // of a float's bits: 64 bins an octave
constexpr int kOctaves = 16,
              kOctavesAbove = 4;  // of the window, and those above the expected scale
constexpr int kFine = kOctaves << (23 - kBinShift);
constexpr int kBins = 256 - kOctaves + kFine;
constexpr int kMargin = 3;  // octaves
constexpr double kShrink =
    0x1p-40;  // of d in what leaves a block: it may be 2^120, and a sum must stay a float

// Where the window begins, as an exponent of a float's bits.
BLAQ_DEVICE int window_of(float scale) {
  const int octave =
      static_cast<int>(float_bits(scale) >> 23 & 0xff) + kOctavesAbove + 1 - kOctaves;
  return octave < 0 ? 0 : octave > 255 - kOctaves ? 255 - kOctaves : octave;
}

// Place of |x|: its bin, and how far into it in units of 2^-32.
struct BinPlace {
  int bin;
  uint32_t within;
};

BLAQ_DEVICE BinPlace place_of(float x, int window) {
  const uint32_t bits = float_bits(x) & 0x7fffffff;
  const uint32_t fine = (bits >> kBinShift) - (window << (23 - kBinShift));
  if (fine < kFine) return {static_cast<int>(fine) + window, bits << (32 - kBinShift)};
  const int octave = static_cast<int>(bits >> 23);
  return {octave < window ? octave : octave + kFine - kOctaves, bits << 9};
}

// The least magnitude of a bin; kBins is what no magnitude reaches.
BLAQ_DEVICE float edge_of(int bin, int window) {
  if (bin >= window && bin < window + kFine) {
    return bits_float((window << 23) + (static_cast<uint32_t>(bin - window) << kBinShift));
  }
  return bits_float(static_cast<uint32_t>(bin < window ? bin : bin - kFine + kOctaves) << 23);
}

struct Bins {
  uint32_t low[2][kBins], high[2][kBins];

  BLAQ_DEVICE void clear() {
    for (int i = threadIdx.x; i < kBins; i += blockDim.x) {
      for (int s = 0; s < 2; ++s) low[s][i] = high[s][i] = 0;
    }
  }
  // Eight weights of a thread. `unit` is that of FixedPoint. Additions are all on their way before
  // the first is looked at: each takes some sixty cycles to say what it has added to.
  BLAQ_DEVICE void add(const float (&w)[8], const float (&d)[8], int window, float unit) {
    BinPlace at[8];
    bool far = false;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const uint32_t bits = float_bits(w[k]) & 0x7fffffff;
      const uint32_t fine = (bits >> kBinShift) - (window << (23 - kBinShift));
      at[k] = {static_cast<int>(fine) + window, bits << (32 - kBinShift)};
      far |= fine >= kFine;
    }
    if (__builtin_expect(far, 0)) {
#pragma unroll
      for (int k = 0; k < 8; ++k) at[k] = place_of(w[k], window);
    }
    uint32_t value[2][8], before[2][8], carries = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      value[0][k] = __float2uint_rn(d[k] * unit);
      before[0][k] = atomicAdd(&low[0][at[k].bin], value[0][k]);
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      value[1][k] = __umulhi(value[0][k], at[k].within);
      before[1][k] = atomicAdd(&low[1][at[k].bin], value[1][k]);
    }
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        carries |= static_cast<uint32_t>(before[s][k] + value[s][k] < before[s][k]) << (8 * s + k);
      }
    }
    if (carries == 0) return;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        if (carries >> (8 * s + k) & 1) atomicAdd(&high[s][at[k].bin], 1u);
      }
    }
  }
  BLAQ_DEVICE uint64_t total(int sum, int bin) const {
    return static_cast<uint64_t>(high[sum][bin]) << 32 | low[sum][bin];
  }
  BLAQ_DEVICE void coarsen(int octaves) {
    for (int i = threadIdx.x; i < kBins; i += blockDim.x) {
      for (int s = 0; s < 2; ++s) {
        uint64_t value = total(s, i);
        value = octaves < 64 ? (value + (uint64_t{1} << (octaves - 1))) >> octaves : 0;
        low[s][i] = static_cast<uint32_t>(value), high[s][i] = static_cast<uint32_t>(value >> 32);
      }
    }
  }
};

// The unit of a block's bins, the same in all its threads: every d so far is below 2^(top - 127).
struct FixedPoint {
  int top = 0;

  BLAQ_DEVICE float unit() const { return bits_float(static_cast<uint32_t>(285 - top) << 23); }
  // What one of a total counts for, times kShrink.
  BLAQ_DEVICE float value() const {
    return top ? bits_float(static_cast<uint32_t>(top - 71) << 23) : 0.0f;
  }
  // Every thread of the block brings the largest d of the tile that it is about to add.
  BLAQ_DEVICE void make_room(float largest, Bins& bins, uint32_t* largest_of_warps) {
    const uint32_t bits = float_bits(largest);
    if (!__syncthreads_or(bits >= static_cast<uint32_t>(top) << 23)) return;
    const uint32_t most = __reduce_max_sync(~0u, bits);
    if (threadIdx.x % 32 == 0) largest_of_warps[threadIdx.x / 32] = most;
    __syncthreads();
    uint32_t all = float_bits(kCurvatureFloor);
    for (unsigned i = 0; i < blockDim.x / 32; ++i) all = max(all, largest_of_warps[i]);
    const int raised = static_cast<int>(all >> 23) + 1 + kMargin;
    if (top) bins.coarsen(raised - top);
    top = raised;
    __syncthreads();
  }
};

}  // namespace blaq
