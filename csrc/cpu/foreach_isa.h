// Compiles the file that BLAQ_KERNEL_FILE names once for every variant, in the namespaces blaq::base,
// blaq::avx2 and blaq::avx512; BLAQ_VARIANT(function) is the one that capability() asks for.
//
//   #define BLAQ_KERNEL_FILE "cpu/pack_kernel.h"
//   #include "cpu/foreach_isa.h"
//   ... BLAQ_VARIANT(pack_rows)(codes, ...);
//
// A kernel file has no include guard and includes at most other kernel files: what it needs is
// included before. Inside it
// BLAQ_ISA_AVX2 or BLAQ_ISA_AVX512 is 1 where those instructions may be used (AVX-512: F, BW, DQ, VL).
// Plain loops of 16 lanes vectorise in each variant; without contraction all give the same bits.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/capability.h"

#define BLAQ_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define BLAQ_BEGIN_TARGET(isa) \
  BLAQ_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define BLAQ_END_TARGET BLAQ_PRAGMA(clang attribute pop)
#else
#define BLAQ_BEGIN_TARGET(isa) BLAQ_PRAGMA(GCC push_options) BLAQ_PRAGMA(GCC target(isa))
#define BLAQ_END_TARGET BLAQ_PRAGMA(GCC pop_options)
#endif

#define BLAQ_ISA_AVX2 0
#define BLAQ_ISA_AVX512 0
namespace blaq::base {
#include BLAQ_KERNEL_FILE
}

#if defined(__x86_64__)
#undef BLAQ_ISA_AVX2
#define BLAQ_ISA_AVX2 1
BLAQ_BEGIN_TARGET("avx2,fma,f16c")
namespace blaq::avx2 {
#include BLAQ_KERNEL_FILE
}
BLAQ_END_TARGET

#undef BLAQ_ISA_AVX512
#define BLAQ_ISA_AVX512 1
#if defined(__clang__)
BLAQ_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#else
BLAQ_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
namespace blaq::avx512 {
#include BLAQ_KERNEL_FILE
}
BLAQ_END_TARGET

// Variadic, for a template's arguments may hold commas.
#define BLAQ_VARIANT(...)                                                           \
  (::blaq::capability() == ::blaq::Capability::avx512 ? ::blaq::avx512::__VA_ARGS__ \
   : ::blaq::capability() == ::blaq::Capability::avx2 ? ::blaq::avx2::__VA_ARGS__   \
                                                      : ::blaq::base::__VA_ARGS__)
#else
#define BLAQ_VARIANT(...) (::blaq::base::__VA_ARGS__)
#endif
