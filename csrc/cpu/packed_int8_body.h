// The 8-bit arithmetic of one variant; see foreach_isa.h.
#include "cpu/lanes.h"

#if BLAQ_ISA_AVX512
BLAQ_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx2,fma,f16c")
#include "cpu/packed_int8_kernel.h"
#include "cpu/packed_int16_kernel.h"
#include "cpu/packed_int8_driver.h"
static const Int8Kernels kInt8{"AVX-512 VNNI", multiply_packed};
BLAQ_END_TARGET
#elif BLAQ_ISA_AVX2
#include "cpu/packed_int8_bytes.h"
#include "cpu/packed_int8_driver.h"
static const Int8Kernels kInt8{"AVX2", multiply_packed};
#elif defined(__aarch64__)
#include "cpu/packed_int8_bytes.h"
#include "cpu/packed_int8_driver.h"
static const Int8Kernels kInt8{"NEON", multiply_packed};
#endif
