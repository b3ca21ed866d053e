// See tap_splitter.h and foreach_isa.h.

// Bit by bit, with rows as lanes.
inline void split_bits(const uint8_t* row, int64_t stride, int64_t taps, TapWords* words) {
  std::fill_n(words, taps, TapWords{});
  for (int64_t at = 0, channel = 0, tap = 0; at < 64 * taps; at += 32) {
    uint32_t bits[16];
    for (int lane = 0; lane < 16; ++lane) std::memcpy(&bits[lane], row + lane * stride + at / 8, 4);
    for (int i = 0; i < 32; ++i) {
      uint32_t* to = words[tap].half[channel / 32];
      for (int lane = 0; lane < 16; ++lane) to[lane] |= (bits[lane] >> i & 1) << channel % 32;
      if (++tap == taps) tap = 0, ++channel;
    }
  }
}

#if BLAQ_ISA_AVX512
#define BLAQ_BYTE_MOVES [[gnu::target("avx512vbmi,gfni")]]

struct alignas(64) Bytes {
  uint8_t at[64];
};

template <typename From>
constexpr Bytes bytes_from(From from) {
  Bytes bytes{};
  for (int to = 0; to < 64; ++to) bytes.at[to] = static_cast<uint8_t>(from(to));
  return bytes;
}

constexpr Bytes kAscending = bytes_from([](int to) { return to; });

// Byte i of 8 rows, the last first, from the first of two words of rows 0 to 3 and of rows 4 to 7.
constexpr Bytes kRowBytes = bytes_from([](int to) { return (7 - to % 8) * 16 + to / 8; });

// 32 channels of 16 rows from 8 rows and 8 more, whose words are bytes of rows, those of the last channels first.
template <int HALF>
constexpr Bytes kChannels =
    bytes_from([](int to) { return to / 32 * 64 + 8 * (7 - 4 * HALF - to % 4) + to / 4 % 8; });

inline __m512i load_bytes(const void* from) { return _mm512_loadu_si512(from); }

// Bit j of byte 8i + m of the result is bit m of byte 8i + 7 - j.
BLAQ_BYTE_MOVES inline __m512i transpose_bits(__m512i x) {
  return _mm512_gf2p8affine_epi64_epi8(_mm512_set1_epi64(0x8040201008040201), x, 0);
}

// 64 positions of 8 rows, and 64 more.
BLAQ_BYTE_MOVES inline void load_positions(const uint8_t* row, int64_t stride, __m512i& first, __m512i& second) {
  const auto word = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i * stride)); };
  __m512i part[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    part[i] = _mm512_castsi128_si512(word(4 * i));
    part[i] = _mm512_mask_broadcast_i32x4(part[i], 0x00f0, word(4 * i + 1));
    part[i] = _mm512_mask_broadcast_i32x4(part[i], 0x0f00, word(4 * i + 2));
    part[i] = _mm512_mask_broadcast_i32x4(part[i], 0xf000, word(4 * i + 3));
  }
  const __m512i from = load_bytes(kRowBytes.at), next = _mm512_add_epi8(from, _mm512_set1_epi8(8));
  first = transpose_bits(_mm512_permutex2var_epi8(part[0], from, part[1]));
  second = transpose_bits(_mm512_permutex2var_epi8(part[0], next, part[1]));
}

BLAQ_BYTE_MOVES inline void store_channels(__m512i low, __m512i high, TapWords* words) {
  _mm512_store_si512(words->half[0], _mm512_permutex2var_epi8(low, load_bytes(kChannels<0>.at), high));
  _mm512_store_si512(words->half[1], _mm512_permutex2var_epi8(low, load_bytes(kChannels<1>.at), high));
}

BLAQ_BYTE_MOVES inline void split_bytes(const uint8_t* row, int64_t stride, int64_t taps, int64_t turn,
                                        const uint64_t* lanes, const uint8_t* order, TapWords* positions,
                                        TapWords* words) {
  const auto at = [&](int64_t i, int half) { return load_bytes(positions[i].half[half]); };
  __m512i turned = load_bytes(kAscending.at);
  for (int64_t i = 0, next = turn; i < taps; ++i) {
    if (i == next) {
      turned = _mm512_add_epi8(turned, _mm512_set1_epi8(1));
      next += turn;
    }
    const bool last = i + 1 == taps;  // nothing is read past the row
    for (int half = 0; half < 2; ++half) {
      __m512i first, second;
      load_positions(row + half * 8 * stride + (i - last) * 8, stride, first, second);
      _mm512_store_si512(positions[i].half[half], _mm512_permutexvar_epi8(turned, last ? second : first));
    }
  }
  for (int64_t tap = 0; tap < taps; ++tap, lanes += taps, order += 64) {
    __m512i low = at(0, 0), high = at(0, 1);
    for (int64_t i = 1; i < taps; ++i) {
      low = _mm512_mask_mov_epi8(low, lanes[i], at(i, 0));
      high = _mm512_mask_mov_epi8(high, lanes[i], at(i, 1));
    }
    const __m512i from = load_bytes(order);
    low = transpose_bits(_mm512_permutexvar_epi8(from, low));
    high = transpose_bits(_mm512_permutexvar_epi8(from, high));
    store_channels(low, high, words + tap);
  }
}

// Lanes that go on by 2^bit registers: see below.
template <int TAPS>
constexpr uint64_t lanes_that_go(int bit) {
  uint64_t lanes = 0;
  for (int lane = 0; lane < 64; ++lane) {
    lanes |= uint64_t{((TAPS - lane % TAPS) % TAPS >> bit & 1) != 0} << lane;
  }
  return lanes;
}

// The same for an odd number of taps known before, in registers: lane l of register i has tap i + l, so tap t's lane
// comes from register t - l, the distance bit by bit.
template <int TAPS>
BLAQ_BYTE_MOVES inline void split_bytes_of(const uint8_t* row, int64_t stride, const uint8_t* order, TapWords* words) {
  constexpr uint64_t lanes[] = {lanes_that_go<TAPS>(0), lanes_that_go<TAPS>(1), lanes_that_go<TAPS>(2),
                                lanes_that_go<TAPS>(3)};
  static_assert(TAPS % 2 == 1 && TAPS < 16);
  for (int half = 0; half < 2; ++half, row += 8 * stride) {
    __m512i x[TAPS], y[TAPS], unused;
#pragma GCC unroll 16
    for (int i = 0; i + 1 < TAPS; i += 2) {
      load_positions(row + i * 8, stride, x[i * 64 % TAPS], x[(i + 1) * 64 % TAPS]);
    }
    load_positions(row + (TAPS - 2) * 8, stride, unused, x[(TAPS - 1) * 64 % TAPS]);
#pragma GCC unroll 4
    for (int bit = 0; bit < 4; ++bit) {
#pragma GCC unroll 16
      for (int i = 0; i < TAPS; ++i) y[i] = _mm512_mask_mov_epi8(x[i], lanes[bit], x[(i + (1 << bit)) % TAPS]);
#pragma GCC unroll 16
      for (int i = 0; i < TAPS; ++i) x[i] = y[i];
    }
#pragma GCC unroll 16
    for (int tap = 0; tap < TAPS; ++tap) {
      const __m512i bytes = transpose_bits(_mm512_permutexvar_epi8(load_bytes(order + tap * 64), x[tap]));
      if (half == 0) {
        _mm512_store_si512(words[tap].half[0], bytes);
      } else {
        store_channels(load_bytes(words[tap].half[0]), bytes, words + tap);
      }
    }
  }
}

#undef BLAQ_BYTE_MOVES
#endif
