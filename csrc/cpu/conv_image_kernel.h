// What packed_conv2d does around its products; see foreach_isa.h.
#include "cpu/lanes.h"

#include "cpu/convert_kernel.h"

#include "cpu/conv_tensors_kernel.h"

#include "cpu/depthwise_kernel.h"
