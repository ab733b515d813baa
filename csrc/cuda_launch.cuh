// What every launch needs on the host.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"

// Missing where torch is a CPU build: then the extension still loads, and says so when it is asked to use a GPU.
#pragma weak aoti_torch_get_current_cuda_stream

namespace metaadamw {
namespace {

cudaStream_t current_stream(int64_t device) {
  METAADAMW_CHECK(&aoti_torch_get_current_cuda_stream != nullptr,
                  "the extension was built with a torch that has no CUDA: build it again");
  void* stream = nullptr;
  METAADAMW_CHECK(aoti_torch_get_current_cuda_stream(static_cast<int32_t>(device), &stream) == 0,
                  "torch knows no current stream of cuda:", device);
  return static_cast<cudaStream_t>(stream);
}

void check_cuda(cudaError_t error, const char* what) {
  METAADAMW_CHECK(error != cudaErrorNoKernelImageForDevice && error != cudaErrorUnsupportedPtxVersion, what,
                  ": the extension was built for the GPU architectures " METAADAMW_CUDA
                  ", this GPU has another; build it again with TORCH_CUDA_ARCH_LIST set to that");
  METAADAMW_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

}  // namespace
}  // namespace metaadamw
