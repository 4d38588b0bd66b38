// The Python module `blockdrop_fast._C`. Importing it registers the kernels of this library with
// the dispatcher (each kernel file does that itself); the module's one function says how they
// were built. The macros come from setup.py.

#include <pybind11/pybind11.h>
#include <torch/version.h>

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["flags"] = BLOCKDROP_FLAGS;
  info["torch"] = TORCH_VERSION;
  info["isa_variants"] = py::str(BLOCKDROP_ISA_VARIANTS).attr("split")();
#ifdef BLOCKDROP_WITH_CUDA
  info["cuda"] = BLOCKDROP_CUDA_VERSION;
  info["cuda_archs"] = py::str(BLOCKDROP_CUDA_ARCHS).attr("split")();
#else
  info["cuda"] = py::none();
  info["cuda_archs"] = py::list();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels of blockdrop_fast.";
  module.def("build_info", &build_info,
             "How this library was built: compiler, flags, torch, isa_variants, cuda, cuda_archs.");
}
