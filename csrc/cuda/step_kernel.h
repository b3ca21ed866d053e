// fused_trial and fused_step where a scale spans a long group: BLAQ (AAAI 2024), Eqs. 6 and 5, or
// 9, 10, 8 and 7, in two passes over memory whatever the number of levels.
//
// A group that fits one block is that block's from gradient to parameter: update, histogram, scale,
// and what it has just written again, out of the cache (take_groups). A longer one is cut into
// parts:
//   update_parts   update, histogram
//   fold_parts     of groups of many parts, a histogram for every run of them
//   settle_groups  the scale
//   write_parts    the parameters
// A launch sees what the one before has written, and no block waits for another: there is no order
// between blocks that the emulation, which runs one after another, could hide.
//
// Bytes of a float32 parameter: the trial reads 16, writes a byte (places.h) and reads it again,
// writes 4; the step reads 20, writes 12 and a byte, reads the byte, writes 4. With one level signs
// are all that the second pass reads, an eighth of a byte. What one block takes is read again from
// the cache: ω* of a trial, 4 bytes written, or the latent weights.
#pragma once

#include "cuda/step_call.h"

namespace blaq {

BLAQ_DEVICE uint32_t packed_codes(const ScaledBook& book, const float (&w)[8]) {
  uint32_t codes[8], packed = 0;
  book.codes(w, codes);
#pragma unroll
  for (int k = 0; k < 8; ++k) packed |= codes[k] << 4 * k;
  return packed;
}

// Eqs. 6, 8, 9, 10 for eight elements. Returns how many codes are new, where that is known without
// the scale. `places` and their base: null where the second pass has the weights themselves.
template <typename Type, bool kCommits, bool kBinary>
BLAQ_DEVICE int update(const Call& call, const Part& part, const StepScalars& s,
                       const ScaledBook& old, const Eight& at, const PlaceTable* places, int base,
                       float (&w)[8], float (&d)[8]) {
  const Row& row = *part.row;
  const bool blends = kCommits && row.trial_grad && s.backtrack < 1.0f;
  float g[8], trial[8], latent[8], m[8], v[8];
  load<Type>(row.grad, at, g);
  if (blends) load<Type>(row.trial_grad, at, trial);
  load<F32>(row.latent, at, latent);
  load<F32>(row.exp_avg, at, m);
  load<F32>(row.exp_avg_sq, at, v);
  const auto root = [](float x) { return sqrtf(x); };
  float moment[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    g[k] *= s.inverse_grad_scale;
    moment[k] = second_moment(v[k], g[k], s);
    d[k] = curvature_of(moment[k], s, root);
  }
  if (blends) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      trial[k] *= s.inverse_grad_scale;
      d[k] = blended(d[k], curvature_of(second_moment(v[k], trial[k], s), s, root), s);  // Eq. 10
      g[k] = blended(g[k], trial[k], s);                                                 // Eq. 9
      moment[k] = second_moment(v[k], g[k], s);
    }
  }
  int flips = 0;
  uint32_t negative = 0;
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    m[k] = first_moment(m[k], g[k], s);
    float target = target_of(latent[k], m[k], d[k], s);  // Eqs. 6 and 8
    if (kCommits && s.clip > 0.0f) {
      target = target > s.clip ? s.clip : target;
      target = target < -s.clip ? -s.clip : target;
    }
    const bool present = at.present >> k & 1;
    w[k] = present ? target : 0.0f;
    d[k] = present ? floored(d[k]) : 0.0f;
    if (kBinary) {
      flips += present && (latent[k] < 0.0f) != (target < 0.0f);
      negative |= static_cast<uint32_t>(target < 0.0f) << k;
    }
  }
  if (kCommits) {
    store<F32>(row.latent, at, w);
    store<F32>(row.exp_avg, at, m);
    store<F32>(row.exp_avg_sq, at, moment);
  }
  const int64_t eighth = (at.i - part.first) / 8;
  if (kBinary) {
    call.signs_of(part)[eighth] = static_cast<uint8_t>(negative);
  } else {
    if (kCommits && call.flips) call.codes_of(part)[eighth] = packed_codes(old, latent);
    if (places) {
      call.places_of(part)[eighth] = places->of(w, base);
    } else if (!kCommits) {
      store<F32>(call.w_of(part), at, w);
    }
  }
  return flips;
}

BLAQ_DEVICE void count_flips(const Call& call, const Part& part, int mine) {
  const unsigned all = __reduce_add_sync(~0u, static_cast<unsigned>(mine));
  if (threadIdx.x % 32 == 0 && all)
    atomicAdd(call.flips + part.row->index, static_cast<unsigned long long>(all));
}

// The first pass over a part. The barrier before the first tile also ends what the collector
// begins.
template <typename Type, bool kCommits, bool kPlaced, bool kBinary>
BLAQ_DEVICE void first_pass(const Call& call, const Part& part, const Start& start,
                            Collector<kBinary>& collector, Shared<kBinary>& shared) {
  PlaceTable* places = nullptr;
  int base = 0;
  if constexpr (kPlaced && !kBinary) {
    const PlaceMap map(call.book, start.scale);
    places = &blaq::shared<PlaceTable>();
    places->fill(map);
    base = map.base;
  }
  if (threadIdx.x == 0) shared.scalars = scalars_of(call);
  __syncthreads();
  const StepScalars scalars = shared.scalars;
  const ScaledBook old{call.book, start.scale};
  int flips = 0;
  for (int64_t i = part.first; i < part.end; i += kTile) {
    const Eight at(part, i + 8 * threadIdx.x);
    float w[8], d[8];
    flips += update<Type, kCommits, kBinary>(call, part, scalars, old, at, places, base, w, d);
    collector.add(w, d);
  }
  if (kCommits && kBinary && call.flips) count_flips(call, part, flips);
}

// How many of eight codes of 4 bits are not 0; those of elements that are not there do not count.
BLAQ_DEVICE int changed_codes(uint32_t changed, uint32_t present) {
  changed |= changed >> 1;
  changed = (changed | changed >> 2) & 0x11111111;
#pragma unroll
  for (int k = 0; k < 8; ++k) changed &= ~(~present >> k << 4 * k & 1u << 4 * k);
  return __popc(changed);
}

// The second pass: parameters of a part, from signs or from weights, where a block has the whole
// group or there are no places. `restores` writes what the
// latent weights and the last scale stand for, after a trial that is not followed by a step.
template <typename Type, bool kCommits>
BLAQ_DEVICE void second_pass(const Call& call, const Part& part, float scale, bool restores) {
  const ScaledBook book{call.book, scale};
  const bool from_signs = call.binary() && !restores;
  const bool counts = kCommits && call.flips && !call.binary() && !restores;
  int flips = 0;
  for (int64_t i = part.first; i < part.end; i += kTile) {
    const Eight at(part, i + 8 * threadIdx.x);
    if (!at.present) continue;
    const int64_t eighth = (at.i - part.first) / 8;
    float w[8], y[8];
    if (from_signs) {
      const uint32_t negative = call.signs_of(part)[eighth];
#pragma unroll
      for (int k = 0; k < 8; ++k) w[k] = negative >> k & 1 ? -1.0f : 1.0f;
    } else {
      load<F32>(kCommits ? part.row->latent : call.w_of(part), at, w);
    }
    book.values(w, y);
    store<Type>(part.row->param, at, y);
    if (counts) {
      flips += changed_codes(call.codes_of(part)[eighth] ^ packed_codes(book, w), at.present);
    }
  }
  if (counts) count_flips(call, part, flips);
}

// ω* of one element, as `update` has it.
template <typename Type>
BLAQ_DEVICE float trial_weight(const Row& row, int64_t i, const StepScalars& s) {
  const auto at = [&](int64_t address) { return reinterpret_cast<const float*>(address)[i]; };
  const float g = Type::to_float(reinterpret_cast<const typename Type::Stored*>(row.grad)[i]) *
                  s.inverse_grad_scale;
  const float moment = second_moment(at(row.exp_avg_sq), g, s);
  const float d = curvature_of(moment, s, [](float x) { return sqrtf(x); });
  return target_of(at(row.latent), first_moment(at(row.exp_avg), g, s), d, s);
}

// The second pass over a part of several levels, from places at the scale `old`.
template <typename Type, bool kCommits>
BLAQ_DEVICE void place_pass(const Call& call, const Part& part, float old, float scale) {
  auto& found = shared<PlaceValues>();
  auto& scalars = shared<StepScalars>();
  const ScaledBook book{call.book, scale};
  found.fill(PlaceMap(call.book, old), book);
  if (!kCommits && threadIdx.x == 0) scalars = scalars_of(call);
  __syncthreads();
  const bool counts = kCommits && call.flips;
  int flips = 0;
  for (int64_t i = part.first; i < part.end; i += kTile) {
    const Eight at(part, i + 8 * threadIdx.x);
    if (!at.present) continue;
    const int64_t eighth = (at.i - part.first) / 8;
    const uint2 places = call.places_of(part)[eighth];
    float y[8];
    uint32_t codes = 0;
    bool all = true;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const uint32_t byte = (k < 4 ? places.x : places.y) >> 8 * (k % 4) & 0xff;
      y[k] = found.value[byte];
      if (counts) codes |= static_cast<uint32_t>(found.code[byte]) << 4 * k;
      all = all && y[k] == y[k];
    }
    if (__builtin_expect(!all, 0)) {
      uint32_t unknown = 0;
#pragma unroll
      for (int k = 0; k < 8; ++k) unknown |= static_cast<uint32_t>(y[k] != y[k]) << k;
#pragma unroll 1
      for (unknown &= at.present; unknown; unknown &= unknown - 1) {
        const int which = __ffs(static_cast<int>(unknown)) - 1;
        const int64_t element = at.i + which;
        const float w = kCommits ? reinterpret_cast<const float*>(part.row->latent)[element]
                                 : trial_weight<Type>(*part.row, element, scalars);
        const int index = book.index(w);
        const float value = book.value(index, w < 0.0f);
#pragma unroll
        for (int k = 0; k < 8; ++k) y[k] = k == which ? value : y[k];
        codes = (codes & ~(15u << 4 * which)) | book.code(index, w < 0.0f) << 4 * which;
      }
    }
    store<Type>(part.row->param, at, y);
    if (counts) flips += changed_codes(call.codes_of(part)[eighth] ^ codes, at.present);
  }
  if (counts) count_flips(call, part, flips);
}

template <typename Type, bool kCommits, bool kBinary>
__global__ void __launch_bounds__(kThreads, 2) take_groups(const Call call) {
  auto& memory = shared<Shared<kBinary>>();
  const Part part = Part::of(call.table, call.row_of_part, call.part, blockIdx.x);
  if (call.skips()) {
    if (kCommits) second_pass<Type, true>(call, part, scales_of(*part.row)[part.scale], true);
    return;
  }
  const Start start(call, *part.row, part.group, part.scale);
  Collector<kBinary> collector(call, start, memory);
  first_pass<Type, kCommits, false>(call, part, start, collector, memory);
  const Sums all = block_sum(collector.sums, memory.of_warps);  // behind it the bins are whole
  const double value = collector.point.value();
  const float scale = settled(call, start, all, memory, [&](int bin) -> Sums {
    if constexpr (kBinary)
      return {};
    else
      return {static_cast<double>(memory.memory.bins.total(0, bin)) * value,
              static_cast<double>(memory.memory.bins.total(1, bin)) * value};
  });
  if (kCommits && threadIdx.x == 0) scales_of(*part.row)[part.scale] = scale;
  second_pass<Type, kCommits>(call, part, scale, false);
}

template <typename Type, bool kCommits, bool kBinary>
__global__ void __launch_bounds__(kThreads, 2) update_parts(const Call call) {
  if (call.skips()) return;
  auto& memory = shared<Shared<kBinary>>();
  const Part part = Part::of(call.table, call.row_of_part, call.part, blockIdx.x);
  const Start start(call, *part.row, part.group, part.scale);
  Collector<kBinary> collector(call, start, memory);
  first_pass<Type, kCommits, true>(call, part, start, collector, memory);
  leave(call, part, collector, memory);
}

// One histogram for a run of parts, in the place of the first.
__global__ void __launch_bounds__(kThreads) fold_parts(const Call call) {
  if (call.skips()) return;
  float2* bins = call.bins + int64_t{call.runs[2 * blockIdx.x]} * kBins;
  const int parts = call.runs[2 * blockIdx.x + 1];
  for (int i = threadIdx.x; i < kBins; i += kThreads) {
    Sums sums = {0, 0};
#pragma unroll 8
    for (int p = 0; p < parts; ++p)
      sums = sums + Sums{bins[p * kBins + i].x, bins[p * kBins + i].y};
    bins[i] = make_float2(static_cast<float>(sums.first), static_cast<float>(sums.second));
  }
}

template <bool kBinary, bool kCommits>
__global__ void __launch_bounds__(kThreads, 1) settle_groups(const Call call) {
  if (call.skips()) return;
  auto& memory = shared<Shared<kBinary>>();
  const int64_t group = blockIdx.x;
  const Row& row = call.table[call.row_of_group[group]];
  const int64_t own = group - row.first_group, first = row.first_part + own * row.parts;
  const Start start(call, row, group, own);
  Sums mine = {0, 0};
  for (int64_t p = threadIdx.x; p < row.parts; p += kThreads) mine = mine + call.sums[first + p];
  const Sums all = block_sum(mine, memory.of_warps);
  const int64_t stride = row.parts > call.run ? call.run : 1;
  const float scale = settled(call, start, all, memory, [&](int bin) {
    Sums sums = {0, 0};
#pragma unroll 4
    for (int64_t p = 0; p < row.parts; p += stride) {
      const float2 one = call.bins[(first + p) * kBins + bin];
      sums = sums + Sums{one.x, one.y};
    }
    return sums;
  });
  if (threadIdx.x == 0) {
    call.scales[group] = kCommits ? start.scale : scale;  // the last, for places, and the new one
    if (kCommits) scales_of(row)[own] = scale;
  }
}

// From the last part to the first: the cache still holds the end of what the first pass wrote.
template <typename Type, bool kCommits>
__global__ void __launch_bounds__(kThreads) write_parts(const Call call) {
  const bool skips = call.skips();
  if (skips && !kCommits) return;
  const Part part = Part::of(call.table, call.row_of_part, call.part, gridDim.x - 1 - blockIdx.x);
  const float of_row = scales_of(*part.row)[part.scale];
  if (call.binary() || skips) {
    second_pass<Type, kCommits>(call, part, kCommits ? of_row : call.scales[part.group], skips);
  } else if (kCommits) {
    place_pass<Type, true>(call, part, call.scales[part.group], of_row);
  } else {
    place_pass<Type, false>(call, part, of_row > 0.0f ? of_row : 0.0f, call.scales[part.group]);
  }
}

inline Grid blocks(int64_t count) { return {dim3(static_cast<unsigned>(count)), dim3(kThreads)}; }

template <bool kBinary, bool kCommits>
void settle(const Call& call, Stream stream) {
  if (!kBinary && call.run_count) launch(fold_parts, blocks(call.run_count), stream, call);
  launch(settle_groups<kBinary, kCommits>, blocks(call.groups), stream, call);
}

// A list of weights of one type: `whole` where every group is one part.
template <typename Type, bool kCommits, bool kBinary>
void run_stage(const Call& call, bool whole, Stream stream) {
  if (whole) return launch(take_groups<Type, kCommits, kBinary>, blocks(call.parts), stream, call);
  launch(update_parts<Type, kCommits, kBinary>, blocks(call.parts), stream, call);
  settle<kBinary, kCommits>(call, stream);
  launch(write_parts<Type, kCommits>, blocks(call.parts), stream, call);
}

}  // namespace blaq
