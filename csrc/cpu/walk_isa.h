// Which instruction set the CPU walk runs with.

#pragma once

#include "cpu/walk.h"

namespace blockdrop::walk {

// The best instruction set of this processor, or the one that BLOCKDROP_CPU_ISA names.
const Kernels& choose_kernels();

}  // namespace blockdrop::walk
