// Where a weight lies among the thresholds of the last scale, in a byte: from it the second pass
// has the code at the new scale, unless a threshold has moved into the place itself.
//
// A place is a run of neighbouring bins of 1/256 octave, counted from the highest threshold down:
// each of the 16 bins around a threshold is a place of its own, and what lies between is one. A
// scale that moves by less than 2 % leaves only the weights unknown that share a bin with a
// threshold, some in a thousand, and these are looked at again. Any other scale is right as well:
// it leaves more unknown.
#pragma once

#include "cuda/book.h"

namespace blaq {

constexpr int kPlaceShift = 15;  // of a float's bits
constexpr int kPlaceBins = 2048, kAround = 8;
constexpr int kPlaces = 128;  // (2 · kAround + 1) · 7 thresholds, and one

struct PlaceMap {
  const Book& book;
  float scale;
  int base;  // bin of table entry 0, which has all below it too; the last has all above

  BLAQ_DEVICE PlaceMap(const Book& b, float s) : book(b), scale(s) {
    base = bin_of(b.count - 2) + kAround - (kPlaceBins - 1);
  }
  BLAQ_DEVICE int bin_of(int threshold) const {
    return static_cast<int>(float_bits(book.mid[threshold] * scale) >> kPlaceShift);
  }
  // Place of a table entry: ascending.
  BLAQ_DEVICE int place(int entry) const {
    int total = 0;
#pragma unroll
    for (int j = 0; j + 1 < kMaxLevels; ++j) {
      if (j + 1 >= book.count) break;
      total += min(max(base + entry - bin_of(j) + kAround + 1, 0), 2 * kAround + 1);
    }
    return total;
  }
  // The first entry of this place or a later one.
  BLAQ_DEVICE int first(int wanted) const {
    int below = -1, found = kPlaceBins;
    while (found - below > 1) {
      const int middle = (below + found) / 2;
      (place(middle) < wanted ? below : found) = middle;
    }
    return found;
  }
  BLAQ_DEVICE float edge(int entry) const {
    const int bin = max(base + entry, 0);
    return entry ? bits_float(static_cast<uint32_t>(bin) << kPlaceShift) : 0.0f;
  }
};

// Of a block: the place of every bin.
struct PlaceTable {
  uint8_t place[kPlaceBins];

  // A barrier follows.
  BLAQ_DEVICE void fill(const PlaceMap& map) {
    for (int i = threadIdx.x; i < kPlaceBins; i += blockDim.x) {
      place[i] = static_cast<uint8_t>(map.place(i));
    }
  }
  // Sign << 7 | place; a NaN is on the lowest level, without a sign.
  BLAQ_DEVICE uint2 of(const float (&w)[8], int base) const {
    uint32_t words[2] = {0, 0};
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const float magnitude = fmaxf(magnitude_of(w[k]), 0.0f);
      const int entry = static_cast<int>(float_bits(magnitude) >> kPlaceShift) - base;
      const uint32_t found = place[min(max(entry, 0), kPlaceBins - 1)];
      words[k / 4] |= (w[k] < 0.0f ? found | 0x80 : found) << 8 * (k % 4);
    }
    return make_uint2(words[0], words[1]);
  }
};

// Of a block: value and code at the new scale of every byte; NaN where the byte does not say.
struct PlaceValues {
  float value[2 * kPlaces];
  uint8_t code[2 * kPlaces];

  // One byte a thread, of at least 2 · kPlaces threads; a barrier follows.
  BLAQ_DEVICE void fill(const PlaceMap& map, const ScaledBook& now) {
    const int byte = threadIdx.x, place = byte % kPlaces;
    if (byte >= 2 * kPlaces) return;
    const int first = map.first(place), end = map.first(place + 1);
    const float low = map.edge(first), high = map.edge(end);
    bool known = true;
    for (int j = 0; j + 1 < now.book.count; ++j) {
      const float threshold = now.book.mid[j] * now.scale;
      known = known && (threshold <= low || (threshold >= high && end < kPlaceBins));
    }
    const int index = now.index(low);
    value[byte] = known ? now.value(index, byte >= kPlaces) : bits_float(0x7fc00000);
    code[byte] = static_cast<uint8_t>(now.code(index, byte >= kPlaces));
  }
};

}  // namespace blaq
