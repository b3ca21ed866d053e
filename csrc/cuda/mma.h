// Tensor-core products of one warp, and ldmatrix; part of device.h.
//
// Fragments as the PTX ISA lays them out ("Matrix Fragments for mma.…"), with g = lane / 4 and t =
// lane % 4: a row of A or D is g or g + 8, a column of B or D is g (B) or 2t, 2t + 1 (D), and the
// lane's share of the inner dimension is t's in the first register and again half of it further on.
//   D[i]: row g + i / 2 * 8, column 2t + i % 2
//   A[i]: row g + i % 2 * 8, inner elements of word t + i / 2 * 4   (a word: 2 × 16, 4 × 8, 32 × 1 bits)
//   B[i]: column g,          inner elements of word t + i * 4
#pragma once

namespace blaq {

#if !defined(__CUDACC__)
namespace emulate {

// D += A · B, A [16, 8 words], B [8 columns, 8 words]; dot(a, b) sums the products of two words.
template <typename T, typename Sum, typename Dot>
void mma_16x8(T (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Place& place,
              const Dot& dot) {
  struct In {
    T d[4];
    uint32_t a[4], b[2];
  } in;
  struct Out {
    T d[4];
  };
  std::copy_n(d, 4, in.d), std::copy_n(a, 4, in.a), std::copy_n(b, 2, in.b);
  const Out out = meet<Out>(~0u, place, in, [&](auto in, auto out, uint32_t) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4, column = lane % 4 * 2 + i % 2, half = i / 2;
        Sum sum = in[lane]->d[i];
        for (int word = 0; word < 8; ++word) {
          sum += dot(in[row * 4 + word % 4]->a[half + word / 4 * 2],
                     in[column * 4 + word % 4]->b[word / 4]);
        }
        out[lane]->d[i] = static_cast<T>(sum);
      }
    }
  });
  std::copy_n(out.d, 4, d);
}

template <typename Type>
double dot_halves(uint32_t a, uint32_t b) {
  double sum = 0;
  for (int i = 0; i < 32; i += 16) {
    sum += static_cast<double>(Type::to_float(a >> i)) * Type::to_float(b >> i);
  }
  return sum;
}

template <typename A, typename B>
int dot_bytes(uint32_t a, uint32_t b) {
  int sum = 0;
  for (int i = 0; i < 32; i += 8) sum += static_cast<A>(a >> i) * static_cast<B>(b >> i);
  return sum;
}

}  // namespace emulate
#endif

#define BLAQ_MMA_OPERANDS(c)                                            \
  : c(d[0]), c(d[1]), c(d[2]), c(d[3])                                  \
  : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])
#define BLAQ_MMA_REGISTERS " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"

// A [16, 16] · B [16, 8], 16-bit floats, sums in fp32. The emulation sums in double and rounds
// once.
template <typename Type>
BLAQ_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  if constexpr (Type::kOne == 0x3c00) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32" BLAQ_MMA_REGISTERS
                 BLAQ_MMA_OPERANDS("+f"));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" BLAQ_MMA_REGISTERS
                 BLAQ_MMA_OPERANDS("+f"));
  }
#else
  emulate::mma_16x8<float, double>(d, a, b, {"mma_m16n8k16", __FILE__, __LINE__},
                                   emulate::dot_halves<Type>);
#endif
}

// A [16, 32] · B [32, 8], 16-bit floats, sums in fp32, where of every four k of a row A has two: a
// register of A is two neighbours of what a row has, B[i] has k = 8i + 2t and k + 1, and `chosen`
// says which k: two bits for each that a row has, ascending in every four. With kLanes 0 the words
// of the quad's lanes 0 and 1 count, with 1 those of 2 and 3: the even lane's is about k below 16,
// row g in its lower half and g + 8 in the upper, the odd lane's about the other k. (The order of
// metadata is that of CUTLASS's reorder_meta; the PTX ISA has it in a figure.)
template <typename Type, int kLanes>
BLAQ_DEVICE void mma_m16n8k32_sparse(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                     uint32_t chosen) {
#if defined(__CUDACC__)
#define BLAQ_MMA_SPARSE(type)                                                                    \
  asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." type "." type       \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, " \
               "%12, %13;"                                                                       \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]),    \
                 "r"(b[3]), "r"(chosen), "n"(kLanes))
  if constexpr (Type::kOne == 0x3c00) {
    BLAQ_MMA_SPARSE("f16");
  } else {
    BLAQ_MMA_SPARSE("bf16");
  }
#undef BLAQ_MMA_SPARSE
#else
  struct In {
    float d[4];
    uint32_t a[4], b[4], chosen;
  } in;
  struct Out {
    float d[4];
  };
  std::copy_n(d, 4, in.d), std::copy_n(a, 4, in.a), std::copy_n(b, 4, in.b), in.chosen = chosen;
  const Out out = emulate::meet<Out>(~0u, {"mma_m16n8k32_sparse", __FILE__, __LINE__}, in,
                                     [](auto in, auto out, uint32_t) {
    const auto half_of = [](uint32_t two, int high) {
      return static_cast<double>(Type::to_float(static_cast<uint16_t>(two >> 16 * high)));
    };
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int g = lane / 4, low = i / 2, column = lane % 4 * 2 + i % 2;  // low: row g + 8
        double sum = in[lane]->d[i];
        for (int n = 0, last = 0; n < 16; ++n) {
          const uint32_t choices = in[4 * g + 2 * kLanes + n / 8]->chosen >> 16 * low;
          const int choice = choices >> n % 8 * 2 & 3, k = n / 2 * 4 + choice;
          if (n % 2 && choice <= last) emulate::fail("mma_m16n8k32_sparse: choices must ascend");
          last = choice;
          sum += half_of(in[4 * g + n % 8 / 2]->a[low + n / 8 * 2], n % 2) *
                 half_of(in[4 * column + k % 8 / 2]->b[k / 8], k % 2);
        }
        out[lane]->d[i] = static_cast<float>(sum);
      }
    }
  });
  std::copy_n(out.d, 4, d);
#endif
}

// A [16, 32] · B [32, 8], bytes, sums in int32; A signed or not, B signed.
template <bool signed_a>
BLAQ_DEVICE void mma_m16n8k32_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  if constexpr (signed_a) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32" BLAQ_MMA_REGISTERS
                 BLAQ_MMA_OPERANDS("+r"));
  } else {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32" BLAQ_MMA_REGISTERS
                 BLAQ_MMA_OPERANDS("+r"));
  }
#else
  using A = std::conditional_t<signed_a, int8_t, uint8_t>;
  emulate::mma_16x8<int, int>(d, a, b, {"mma_m16n8k32", __FILE__, __LINE__},
                              emulate::dot_bytes<A, int8_t>);
#endif
}

// A [16, 256 bits] · B [256 bits, 8]: D += popcount(a & b). One instruction on sm_80 to sm_90;
// later architectures make it of eight int8 products.
BLAQ_DEVICE void mma_m16n8k256_and(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  asm volatile("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc" BLAQ_MMA_REGISTERS
               BLAQ_MMA_OPERANDS("+r"));
#else
  emulate::mma_16x8<int, int>(d, a, b, {"mma_m16n8k256.and", __FILE__, __LINE__},
                              [](uint32_t x, uint32_t y) { return std::popcount(x & y); });
#endif
}

// D += popcount(a ^ b). One instruction on sm_80 to sm_89 only.
BLAQ_DEVICE void mma_m16n8k256_xor(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  asm volatile("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.xor.popc" BLAQ_MMA_REGISTERS
               BLAQ_MMA_OPERANDS("+r"));
#else
  emulate::mma_16x8<int, int>(d, a, b, {"mma_m16n8k256.xor", __FILE__, __LINE__},
                              [](uint32_t x, uint32_t y) { return std::popcount(x ^ y); });
#endif
}

// A [8, 128 bits] · B [128 bits, 8]: lane's word t of row g of A and of column g of B; D[i]: row g,
// column 2t + i.
template <bool exclusive>
BLAQ_DEVICE void mma_m8n8k128(int (&d)[2], uint32_t a, uint32_t b) {
#if defined(__CUDACC__)
  if constexpr (exclusive) {
    asm volatile("mma.sync.aligned.m8n8k128.row.col.s32.b1.b1.s32.xor.popc {%0, %1}, {%2}, {%3}, "
                 "{%0, %1};" : "+r"(d[0]), "+r"(d[1]) : "r"(a), "r"(b));
  } else {
    asm volatile("mma.sync.aligned.m8n8k128.row.col.s32.b1.b1.s32.and.popc {%0, %1}, {%2}, {%3}, "
                 "{%0, %1};" : "+r"(d[0]), "+r"(d[1]) : "r"(a), "r"(b));
  }
#else
  struct In {
    int d[2];
    uint32_t a, b;
  };
  struct Out {
    int d[2];
  };
  const Out out = emulate::meet<Out>(
      ~0u, {"mma_m8n8k128", __FILE__, __LINE__}, In{{d[0], d[1]}, a, b},
      [](auto in, auto out, uint32_t) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 2; ++i) {
        int sum = in[lane]->d[i];
        for (int t = 0; t < 4; ++t) {
          const uint32_t x = in[lane / 4 * 4 + t]->a, y = in[(lane % 4 * 2 + i) * 4 + t]->b;
          sum += std::popcount(exclusive ? x ^ y : x & y);
        }
        out[lane]->d[i] = sum;
      }
    }
  });
  d[0] = out.d[0], d[1] = out.d[1];
#endif
}

// `count` 8 × 8 matrices of 16 bits from shared memory: lane 8i + r has the address of matrix i's
// row r (16 bytes), and gets word t of row g of every matrix; transposed: rows 2t and 2t + 1 of
// column g.
template <int count, bool transposed = false>
BLAQ_DEVICE void ldmatrix(uint32_t (&d)[count], const void* row) {
  static_assert(count == 1 || count == 2 || count == 4);
#if defined(__CUDACC__)
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
#define BLAQ_LDMATRIX(shape, registers, ...)                                             \
  if constexpr (transposed) {                                                            \
    asm volatile("ldmatrix.sync.aligned.m8n8." shape ".trans.shared.b16 " registers ";"  \
                 : __VA_ARGS__ : "r"(address) : "memory");                               \
  } else {                                                                               \
    asm volatile("ldmatrix.sync.aligned.m8n8." shape ".shared.b16 " registers ";"        \
                 : __VA_ARGS__ : "r"(address) : "memory");                               \
  }
  if constexpr (count == 1) {
    BLAQ_LDMATRIX("x1", "{%0}, [%1]", "=r"(d[0]))
  } else if constexpr (count == 2) {
    BLAQ_LDMATRIX("x2", "{%0, %1}, [%2]", "=r"(d[0]), "=r"(d[1]))
  } else {
    BLAQ_LDMATRIX("x4", "{%0, %1, %2, %3}, [%4]", "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]))
  }
#undef BLAQ_LDMATRIX
#else
  if (emulate::lane() < 8 * count) emulate::check_aligned(row, 16, "ldmatrix");
  struct Out {
    uint32_t d[count];
  };
  const Out out = emulate::meet<Out>(~0u, {"ldmatrix", __FILE__, __LINE__}, row,
                                     [](auto in, auto out, uint32_t) {
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < count; ++i) {
        auto element = [&](int r, int c) -> uint32_t {
          return static_cast<const uint16_t*>(*in[8 * i + r])[c];
        };
        out[lane]->d[i] = transposed ? element(2 * t, g) | element(2 * t + 1, g) << 16
                                     : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
      }
    }
  });
  std::copy_n(out.d, count, d);
#endif
}

}  // namespace blaq
