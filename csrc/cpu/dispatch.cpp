#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace smartbird {

const Kernels* kernels_for(const char* name) {
  if (std::strcmp(name, "scalar") == 0) return &scalar::kernels;
#ifdef SMARTBIRD_X86
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  if (std::strcmp(name, "avx2") == 0 && has_avx2) return &avx2::kernels;
  if (std::strcmp(name, "avx512") == 0 && has_avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return &avx512::kernels;
#endif
  return nullptr;
}

namespace {

const Kernels& choose_kernels() {
  if (const char* forced = std::getenv("SMARTBIRD_CPU_ISA"); forced != nullptr && *forced != '\0') {
    if (const Kernels* kernels = kernels_for(forced)) return *kernels;
    throw std::runtime_error(
        std::string("SMARTBIRD_CPU_ISA is \"") + forced +
        "\", which is not one of scalar, avx2, avx512 or cannot run on this processor");
  }
  for (const char* name : {"avx512", "avx2"})
    if (const Kernels* kernels = kernels_for(name)) return *kernels;
  return scalar::kernels;
}

}  // namespace

const Kernels& active_kernels() {
  static const Kernels& kernels = choose_kernels();
  return kernels;
}

}  // namespace smartbird
