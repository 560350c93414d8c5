// What Python asks of the extension beside its operators: how it was built, and the kernels it runs on this processor.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>

#include "cpu/kernels.h"

#ifndef AUTOQ_CUDA_ARCHITECTURES
#define AUTOQ_CUDA_ARCHITECTURES ""
#endif

namespace {

std::map<std::string, std::string> build_info() {
    return {
        {"compiler", __VERSION__},
        {"cuda_architectures", AUTOQ_CUDA_ARCHITECTURES},  // empty without CUDA kernels
    };
}

std::map<std::string, bool> cpu_features() {
    std::map<std::string, bool> found;
    for (const auto& [name, present] : autoq::cpu::features()) found[name] = present;
    return found;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    m.doc() = "autoq's native kernels. Importing this module registers the implementations of torch.ops.autoq.";
    m.def("build_info", &build_info, "The compiler, and the CUDA architectures, empty without CUDA kernels.");
    m.def("cpu_features", &cpu_features, "Which instruction sets this processor has.");
    m.def("cpu_capabilities", &autoq::cpu::capabilities, "The kernels that this processor can run, slowest first.");
    m.def("cpu_capability", &autoq::cpu::capability, "The kernels in use.");
    m.def("set_cpu_capability", &autoq::cpu::set_capability, pybind11::arg("name"),
          "Chooses the kernels by name, for the whole process. Raises ValueError if the processor cannot run them.");
}
