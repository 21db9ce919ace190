// What the CUDA launchers need of PyTorch: the element type, and a counter for the current stream.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <map>
#include <mutex>
#include <utility>

#include "cuda_kernels.h"

namespace aligntok {

inline Scalar scalar_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Scalar::kFloat;
    case at::kBFloat16:
      return Scalar::kBFloat16;
    case at::kHalf:
      return Scalar::kHalf;
    default:
      TORCH_INTERNAL_ASSERT(tensor.scalar_type() == at::kDouble);
      return Scalar::kDouble;
  }
}

// A counter that is 0 when the next kernel of the stream starts. Kernels leave it at 0, and kernels of one stream
// run one after the other, so each stream keeps one for ever. A CUDA graph may run beside the stream that it was
// captured on: each captured launch gets a counter of its own, which a node of the graph sets to 0.
inline at::Tensor counter_of(c10::cuda::CUDAStream stream) {
  const auto fresh = [&] { return at::zeros({1}, at::TensorOptions(stream.device()).dtype(at::kInt)); };
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  C10_CUDA_CHECK(cudaStreamIsCapturing(stream.stream(), &capture));
  if (capture != cudaStreamCaptureStatusNone) {
    return fresh();
  }
  static std::mutex mutex;
  // Never destroyed: at exit the CUDA context may be gone before static objects are.
  static auto& counters = *new std::map<std::pair<c10::DeviceIndex, cudaStream_t>, at::Tensor>();
  const std::lock_guard<std::mutex> lock(mutex);
  at::Tensor& counter = counters[{stream.device_index(), stream.stream()}];
  if (!counter.defined()) {
    counter = fresh();
  }
  return counter;
}

inline unsigned* address_of(const at::Tensor& counter) {
  return reinterpret_cast<unsigned*>(counter.mutable_data_ptr<int>());
}

}  // namespace aligntok
