// wdops._native: the tables, the choice of an instruction set, and the kernels
// on NumPy arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/dispatch.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace wdops {
namespace {

std::vector<std::string> List(const Names& names) {
  return {names.begin(), names.end()};
}

// The elements of an array that a kernel may sweep as it is.
void* Elements(const py::array& array, const std::string& name, DType dtype,
               py::ssize_t n, bool written) {
  const auto given = py::str(array.dtype()).cast<std::string>();
  if (given != kDTypeNames[dtype]) {
    throw py::value_error(name + " has dtype " + given + ", but param has " +
                          kDTypeNames[dtype]);
  }
  if (array.size() != n) {
    throw py::value_error(name + " has " + std::to_string(array.size()) +
                          " elements, but param has " + std::to_string(n));
  }
  const bool aligned = py::cast<bool>(array.attr("flags").attr("aligned"));
  if (!(array.flags() & py::array::c_style) || !aligned) {
    throw py::value_error(name + " must be contiguous and aligned");
  }
  if (written && !array.writeable()) {
    throw py::value_error(name + " must be writeable");
  }
  return const_cast<void*>(array.data());
}

void Apply(const std::string& rule_name, const py::array& param,
           const std::vector<py::array>& slots, const py::array& grad,
           const std::vector<double>& hyper) {
  const RuleInfo* rule = nullptr;
  for (const RuleInfo& r : kRules) {
    if (rule_name == r.name) rule = &r;
  }
  if (!rule) throw py::value_error("unknown rule '" + rule_name + "'");
  const auto given = py::str(param.dtype()).cast<std::string>();
  int dtype = 0;
  while (dtype < kDTypeCount && given != kDTypeNames[dtype]) ++dtype;
  if (dtype == kDTypeCount) {
    throw py::value_error("param has dtype " + given +
                          ", but must have float32, float64, bfloat16 or "
                          "float16");
  }
  if (static_cast<int>(slots.size()) != rule->slots.size) {
    throw py::value_error(rule_name + " has " +
                          std::to_string(rule->slots.size) + " slots, not " +
                          std::to_string(slots.size()));
  }
  const std::vector<std::string> names = HyperNames(*rule);
  if (hyper.size() != names.size()) {
    throw py::value_error(rule_name + " has " + std::to_string(names.size()) +
                          " hyperparameters, not " +
                          std::to_string(hyper.size()));
  }
  const std::string error = HyperError(names, hyper.data());
  if (!error.empty()) throw py::value_error(error);

  const auto n = param.size();
  std::vector<const char*> begins;
  const auto elements = [&](const py::array& array, const std::string& name,
                            bool written) {
    void* data = Elements(array, name, static_cast<DType>(dtype), n, written);
    // Two views of one buffer would be swept as if they were apart.
    for (const char* begin : begins) {
      const auto distance = static_cast<const char*>(data) - begin;
      if (std::abs(distance) < n * kDTypeBytes[dtype]) {
        throw py::value_error(name + " shares memory with another array");
      }
    }
    begins.push_back(static_cast<const char*>(data));
    return data;
  };
  void* param_data = elements(param, "param", true);
  std::vector<void*> slot_data;
  for (size_t k = 0; k < slots.size(); ++k) {
    slot_data.push_back(elements(slots[k], rule->slots[k], true));
  }
  const void* grad_data = elements(grad, "grad", false);

  AnyStep step;
  rule->make_step[dtype](hyper.data(), &step);
  const cpu::Sweep sweep = cpu::ActiveKernels()->sweep[rule - kRules][dtype];
  py::gil_scoped_release release;
  sweep(&step, n, param_data, grad_data, slot_data.data());
}

PYBIND11_MODULE(_native, m) {
  py::list rules;
  for (const RuleInfo& rule : kRules) {
    rules.append(py::dict("name"_a = rule.name, "op"_a = rule.op,
                          "slots"_a = List(rule.slots),
                          "hypers"_a = HyperNames(rule)));
  }
  m.attr("rules") = rules;
  py::dict minima;
  for (const Minimum& minimum : kMinima) {
    minima[minimum.hyper] = minimum.value;
  }
  m.attr("minima") = minima;
  m.def("available_isas", &cpu::AvailableIsas);
  m.def("use_isa", &cpu::UseIsa);
  m.def("active_isa", [] { return cpu::ActiveKernels()->isa; });
  m.def("apply", &Apply);
}

}  // namespace
}  // namespace wdops
