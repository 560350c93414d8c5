// What Python asks of the extension beside its operators: how it was built, and the kernels it runs on this processor.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <vector>

#include "cpu/kernels.h"

#ifndef AUTOQ_CUDA_ARCHITECTURES
#define AUTOQ_CUDA_ARCHITECTURES ""
#endif

namespace py = pybind11;

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

// What dicts hold, all of it or what is under some names, and whether they still hold the very same objects. Python
// would fetch every object from memory to count its references. Whoever makes it keeps the dicts and their values: the
// garbage collector must see those references (autoq/nn/held.py).
class Contents {
  public:
    // Appends the values to the list.
    Contents(const py::list& dicts, const std::optional<std::vector<py::str>>& names, py::list values)
        : names_(names.value_or(std::vector<py::str>())), whole_(!names) {
        for (const py::handle each : dicts) {
            dicts_.push_back(py::cast<py::dict>(each).ptr());
            if (whole_) sizes_.push_back(PyDict_Size(each.ptr()));
        }
        visit([&](PyObject* value) {
            values_.push_back(value);
            if (value) values.append(py::handle(value));
            return true;
        });
    }

    bool are_current() const {
        for (size_t i = 0; i < dicts_.size(); ++i) {
            if (whole_ && PyDict_Size(dicts_[i]) != sizes_[i]) return false;
            fetch_table_of(dicts_[i]);
        }
        auto value = values_.begin();
        return visit([&](PyObject* found) { return found == *value++; });
    }

  private:
    // Asks for what PyDict_Next and the like are about to read, of all dicts before any is looked into: otherwise each
    // would wait for the memory by itself.
    static void fetch_table_of(PyObject* dict) {
        constexpr int kLine = 64, kLines = 3;  // as long as the table of a few entries
        if (PyDict_Size(dict) == 0) return;
        const auto* tables = reinterpret_cast<const PyDictObject*>(dict);
        const char* keys = reinterpret_cast<const char*>(tables->ma_keys);
        for (int line = 0; line < kLines; ++line) __builtin_prefetch(keys + line * kLine);
        __builtin_prefetch(tables->ma_values);  // null in most dicts, which fetches nothing
    }

    // Shows `see` one value after the other, null for a name that is not there, as long as that returns true.
    template <class See>
    bool visit(const See& see) const {
        for (PyObject* dict : dicts_) {
            PyObject *key, *value;
            Py_ssize_t position = 0;
            while (whole_ && PyDict_Next(dict, &position, &key, &value)) {
                if (!see(value)) return false;
            }
            for (const py::str& name : names_) {
                if (!see(PyDict_GetItemWithError(dict, name.ptr()))) return false;
            }
        }
        return true;
    }

    std::vector<PyObject*> dicts_;
    std::vector<py::str> names_;
    bool whole_;
    std::vector<Py_ssize_t> sizes_;
    std::vector<PyObject*> values_;
};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    m.doc() = "autoq's native kernels. Importing this module registers the implementations of torch.ops.autoq.";
    m.def("build_info", &build_info, "The compiler, and the CUDA architectures, empty without CUDA kernels.");
    m.def("cpu_features", &cpu_features, "Which instruction sets this processor has.");
    m.def("cpu_capabilities", &autoq::cpu::capabilities, "The kernels that this processor can run, slowest first.");
    m.def("cpu_capability", &autoq::cpu::capability, "The kernels in use.");
    m.def("set_cpu_capability", &autoq::cpu::set_capability, py::arg("name"),
          "Chooses the kernels by name, for the whole process. Raises ValueError if the processor cannot run them.");
    py::class_<Contents>(m, "Contents")
        .def(py::init<const py::list&, const std::optional<std::vector<py::str>>&, py::list>(), py::arg("dicts"),
             py::arg("names"), py::arg("values"))
        .def("are_current", &Contents::are_current);
}
