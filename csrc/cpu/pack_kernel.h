// Codes of one row to bit planes, eight codes to a byte of each plane; see foreach_isa.h.

// Byte i of `codes` gives bit i of the result: bit `plane` of that code.
inline uint8_t gather_bits(uint64_t codes, int plane) {
  return static_cast<uint8_t>((((codes >> plane) & 0x0101010101010101u) * 0x0102040810204080u) >>
                              56);
}

// Writes ceil(count / 8) bytes to every plane, `plane_stride` bytes apart; the OR of all codes.
inline uint8_t pack_row(const uint8_t* codes, int64_t count, int bits, uint8_t* out,
                        int64_t plane_stride) {
  uint64_t seen = 0;
  int64_t i = 0;
#if BLAQ_ISA_AVX512
  __m512i any = _mm512_setzero_si512();
  for (; i + 64 <= count; i += 64) {
    const __m512i block = _mm512_loadu_si512(codes + i);
    any = _mm512_or_si512(any, block);
    for (int b = 0; b < bits; ++b) {
      const uint64_t plane =
          _mm512_test_epi8_mask(block, _mm512_set1_epi8(static_cast<char>(1 << b)));
      std::memcpy(out + b * plane_stride + i / 8, &plane, 8);
    }
  }
  alignas(64) uint64_t words[8];
  _mm512_store_si512(words, any);
  for (uint64_t word : words) seen |= word;
#elif BLAQ_ISA_AVX2
  __m256i any = _mm256_setzero_si256();
  for (; i + 32 <= count; i += 32) {
    const __m256i block = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
    any = _mm256_or_si256(any, block);
    for (int b = 0; b < bits; ++b) {
      const int plane = _mm256_movemask_epi8(_mm256_sll_epi16(block, _mm_cvtsi32_si128(7 - b)));
      std::memcpy(out + b * plane_stride + i / 8, &plane, 4);
    }
  }
  alignas(32) uint64_t words[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(words), any);
  for (uint64_t word : words) seen |= word;
#endif
  for (; i < count; i += 8) {
    uint64_t block = 0;
    std::memcpy(&block, codes + i, count - i < 8 ? count - i : 8);
    seen |= block;
    for (int b = 0; b < bits; ++b) out[b * plane_stride + i / 8] = gather_bits(block, b);
  }
  for (int half = 32; half >= 8; half /= 2) seen |= seen >> half;
  return static_cast<uint8_t>(seen);
}
