// blaq_kernels._C: importing it registers the CPU kernels of torch.ops.blaq, each at the foot of its
// own file in csrc/cpu. The functions here serve `blaq env` and the tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/capability.h"
#include "cpu/packed_int8.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of torch.ops.blaq";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = __VERSION__;
        return info;
      },
      "How this library was built: its compiler.");
  m.def("cpu_capability", &blaq::capability_name, "Name of the CPU kernels' variant in use.");
  m.def("cpu_capabilities", &blaq::capability_names,
        "Names of the variants that this processor can run, ascending.");
  m.def(
      "int8_kernels",
      [] {
        const blaq::Int8Kernels* kernels = blaq::int8_kernels();
        return std::string(kernels ? kernels->name : "");
      },
      "What packed layers compute with in 8-bit integers from a repacked weight; empty: nothing.");
  m.def("set_cpu_capability", &blaq::set_capability, py::arg("name"),
        "Choose a variant; ValueError for one that this processor cannot run.");
}
