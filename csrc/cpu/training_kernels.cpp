#include "cpu/training_kernels.h"

#include "cpu/float_types.h"

#include <bit>
#include <cstring>
#include <type_traits>

#define BLAQ_KERNEL_FILE "cpu/training_kernels_body.h"
#include "cpu/foreach_isa.h"

namespace blaq {

const TrainingKernels& training_kernels() { return BLAQ_VARIANT(kTable); }

}  // namespace blaq
