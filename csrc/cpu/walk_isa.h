// Which instruction set the CPU walks run with.

#pragma once

namespace blockdrop::walk {

enum class Isa { kPortable, kAvx2, kAvx512 };

// The best of this processor and this build, or the one that BLOCKDROP_CPU_ISA names.
Isa choose_isa();

}  // namespace blockdrop::walk
