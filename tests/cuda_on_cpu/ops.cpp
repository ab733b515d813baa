// csrc/cuda.cu with its ops registered for CPU tensors, in the namespace that the compiler is told (__init__.py).
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "cuda_on_cpu.h"

namespace emulated {
struct DeviceGuard {
  explicit DeviceGuard(int64_t) {}
};
}  // namespace emulated
HIDDEN_NAMESPACE_BEGIN(torch, stable, accelerator)
using EmulatedGuard = emulated::DeviceGuard;
HIDDEN_NAMESPACE_END(torch, stable, accelerator)

#define CUDA CPU
#define DeviceGuard EmulatedGuard
#include "cuda.cu"
