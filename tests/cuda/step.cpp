// solve, fused_trial and fused_step in emulation: what csrc/cuda/step.cu gives Python, for tensors
// of the CPU.
#include "cuda/step_entry.h"

BLAQ_TEST_EXPORT const char* call_integers() { return blaq::call_integers(); }
BLAQ_TEST_EXPORT const char* call_numbers() { return blaq::call_numbers(); }
BLAQ_TEST_EXPORT const char* table_columns() { return blaq::table_columns(); }

BLAQ_TEST_EXPORT const char* run_call(const int64_t* integers, const double* numbers,
                                      uint32_t order) {
  blaq::emulate::machine.order = order;
  return blaq::emulate::message_of([&] { blaq::run_call(integers, numbers, nullptr); });
}

BLAQ_TEST_EXPORT const char* places(const float* x, int64_t n, int64_t window, int32_t* bins,
                                    uint32_t* within) {
  for (int64_t i = 0; i < n; ++i) {
    const blaq::BinPlace place = blaq::place_of(x[i], static_cast<int>(window));
    bins[i] = place.bin, within[i] = place.within;
  }
  return nullptr;
}

BLAQ_TEST_EXPORT const char* edges(int64_t window, float* out) {
  for (int bin = 0; bin < blaq::kBins; ++bin) {
    out[bin] = blaq::edge_of(bin, static_cast<int>(window));
  }
  return nullptr;
}

// Totals of every bin in float64, [2, kBins], of whole tiles.
__global__ void fill_bins(const float* w, const float* d, int64_t n, int window, double* out) {
  auto& memory = blaq::shared<blaq::Shared<false>>();
  blaq::Bins& bins = memory.memory.bins;
  blaq::FixedPoint point;
  bins.clear();
  __syncthreads();
  for (int64_t i = 8 * threadIdx.x; i < n; i += blaq::kTile) {
    float eight_w[8], eight_d[8], largest = 0;
    for (int k = 0; k < 8; ++k) {
      eight_w[k] = w[i + k], eight_d[k] = d[i + k];
      largest = std::max(largest, d[i + k]);
    }
    point.make_room(largest, bins, memory.largest);
    bins.add(eight_w, eight_d, window, point.unit());
  }
  __syncthreads();
  for (int i = threadIdx.x; i < blaq::kBins; i += blaq::kThreads) {
    for (int s = 0; s < 2; ++s) {
      out[s * blaq::kBins + i] = bins.total(s, i) * double{point.value()} / blaq::kShrink;
    }
  }
}
BLAQ_TEST_EXPORT const char* histogram(const float* w, const float* d, int64_t n, int64_t window,
                                       double* out, int64_t order) {
  blaq::emulate::machine.order = static_cast<uint32_t>(order);
  return blaq::emulate::message_of([&] {
    blaq::launch(fill_bins, blaq::blocks(1), nullptr, w, d, n, static_cast<int>(window), out);
  });
}

// Of part `number`: group of the list and of the weight, begin, end, first, whether it leads.
BLAQ_TEST_EXPORT const char* part(const int64_t* row, int64_t part, int64_t number, int64_t* out) {
  const std::vector<int32_t> rows(number + 1);
  const auto* table = reinterpret_cast<const blaq::Row*>(row);
  const blaq::Part p = blaq::Part::of(table, rows.data(), part, number);
  const int64_t found[] = {p.group, p.scale, p.begin, p.end, p.first, p.leads};
  std::copy(found, found + 6, out);
  return nullptr;
}

// Of whole tiles of weights at the scale `old`: their values at `now`, NaN where the place does not
// say, and codes.
__global__ void place_weights(const blaq::Book* book, float old, float now, const float* w,
                              int64_t n, float* values, uint8_t* codes) {
  auto& table = blaq::shared<blaq::PlaceTable>();
  auto& found = blaq::shared<blaq::PlaceValues>();
  const blaq::PlaceMap map(*book, old);
  table.fill(map);
  found.fill(map, blaq::ScaledBook{*book, now});
  __syncthreads();
  for (int64_t i = 8 * threadIdx.x; i < n; i += blaq::kTile) {
    float eight[8];
    for (int k = 0; k < 8; ++k) eight[k] = w[i + k];
    const uint2 places = table.of(eight, map.base);
    for (int k = 0; k < 8; ++k) {
      const uint32_t byte = (k < 4 ? places.x : places.y) >> 8 * (k % 4) & 0xff;
      values[i + k] = found.value[byte], codes[i + k] = found.code[byte];
    }
  }
}
BLAQ_TEST_EXPORT const char* place(const double* levels, int64_t count, double old, double now,
                                   const float* w, int64_t n, float* values, uint8_t* codes) {
  const blaq::Book book = blaq::Book::of(levels, static_cast<int>(count));
  return blaq::emulate::message_of([&] {
    blaq::launch(place_weights, blaq::blocks(1), nullptr, &book, static_cast<float>(old),
                 static_cast<float>(now), w, n, values, codes);
  });
}
