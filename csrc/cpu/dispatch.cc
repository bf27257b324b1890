// Finds the libraries of cpu/sweep.cc beside this one and opens the one that is
// asked for.
#include "cpu/dispatch.h"

#include <dlfcn.h>

#include <atomic>
#include <stdexcept>

namespace wdops::cpu {
namespace {

struct Isa {
  const char* name;
  bool (*supported)();
};

// Best first. __builtin_cpu_supports also asks whether the operating system
// saves the registers.
constexpr Isa kIsas[] = {
#ifdef __x86_64__
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") &&
              __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl");
     }},
    {"avx2",
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
     }},
#endif
    {"baseline", [] { return true; }},
};

std::atomic<const Kernels*> active{nullptr};

std::string Folder() {
  Dl_info info;
  dladdr(reinterpret_cast<void*>(&UseIsa), &info);
  const std::string path = info.dli_fname;
  return path.substr(0, path.rfind('/') + 1);
}

std::string Join(const std::vector<std::string>& names) {
  std::string list;
  for (const std::string& name : names) {
    list += (list.empty() ? "" : ", ") + name;
  }
  return list;
}

}  // namespace

std::vector<std::string> AvailableIsas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) {
    if (isa.supported()) names.push_back(isa.name);
  }
  return names;
}

void UseIsa(const std::string& name) {
  const std::vector<std::string> available = AvailableIsas();
  bool known = false;
  for (const std::string& isa : available) known |= isa == name;
  if (!known) {
    throw std::invalid_argument(
        "instruction set '" + name +
        "' is not one that this processor runs: " + Join(available));
  }
  const std::string path = Folder() + "libwdops_cpu_" + name + ".so";
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  void* kernels = library ? dlsym(library, "wdops_cpu_kernels") : nullptr;
  if (!kernels) throw std::invalid_argument(dlerror());
  active = reinterpret_cast<const Kernels* (*)()>(kernels)();
}

const Kernels* ActiveKernels() { return active; }

}  // namespace wdops::cpu
