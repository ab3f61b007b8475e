// The choice of instruction set: by name, and by SMARTBIRD_CPU_ISA.
#include <cstdlib>
#include <stdexcept>

#include "testing.h"

namespace smartbird::testing {
namespace {

void test_dispatch(const Kernels& kernels) {
  CHECK(kernels_for("mmx") == nullptr);
  CHECK(kernels_for("") == nullptr);
  CHECK(kernels_for(kernels.isa) == &kernels);

  // A choice that failed is not remembered; one that succeeded is.
  setenv("SMARTBIRD_CPU_ISA", "mmx", 1);
  bool refused = false;
  try {
    active_kernels();
  } catch (const std::runtime_error&) {
    refused = true;
  }
  CHECK(refused);
  setenv("SMARTBIRD_CPU_ISA", kernels.isa, 1);
  CHECK(&active_kernels() == &kernels);
  setenv("SMARTBIRD_CPU_ISA", "mmx", 1);
  CHECK(&active_kernels() == &kernels);
}

}  // namespace
}  // namespace smartbird::testing

int main(int argc, char** argv) {
  return smartbird::testing::run_test(argc, argv, smartbird::testing::test_dispatch);
}
