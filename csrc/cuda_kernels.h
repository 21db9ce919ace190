// Launchers of the CUDA kernels, without PyTorch's headers: nvcc reads plain C++ and takes seconds, and the
// same sources can be compiled for a CPU (tests/kernels/cuda_on_host.h).
//
// Both kernels write one value and add in a fixed order: threads over elements, lanes of a warp, warps of a
// block, and last the blocks, which the block that finishes last adds. Nothing waits for the host.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "phi.h"

namespace aligntok {

enum class Scalar { kFloat, kBFloat16, kHalf, kDouble };

// Threads per block. With the 32 to 40 registers per thread that nvcc 13.0 gives the kernels for fp32, bf16 and fp16,
// six to eight blocks fit a multiprocessor; the kernels wait for memory and not for arithmetic.
constexpr int kThreads = 256;

struct GanSide {
  const void* logits;     // [count]
  void* gradient;         // [count], or null when nobody asks for it
  int64_t count;
  int64_t blocks;         // that share these logits: gan_loss_blocks(count)
  double sign;            // y = sign * logit
  double weight;          // of the mean of phi in the loss
  double gradient_scale;  // gradient = sign * gradient_scale * slope
};

struct GanLoss {
  GanSide sides[2];
  int side_count;            // 1 or 2
  const float* lecam_means;  // [2]: moving averages of the mean logits of real and fake images, or null
  double lecam_weight;
  double* partial;           // [blocks of all sides, 3], uninitialised
  unsigned* counter;         // 0 before and after; used by one launch at a time
  void* loss;                // [], fp32 (fp64 for fp64 logits)
  void* stats;               // [2 * side_count], like loss
};

int64_t gan_loss_blocks(int64_t count);

cudaError_t launch_gan_loss(const GanLoss& loss, Phi phi, Scalar scalar, cudaStream_t stream);

// Kernel parameters end at 4 KiB on every CUDA version and card; a pointer, a length and a block number each.
constexpr int kMaxTensors = 128;

struct NormRatio {
  const void* data[kMaxTensors];  // numerators first; every one contiguous and not empty
  int64_t count[kMaxTensors];
  int first_block[kMaxTensors + 1];  // of each tensor; the last entry is the number of blocks
  int tensors;
  int numerators;
  double delta;
  double limit;
  double* partial;    // [blocks], uninitialised
  unsigned* counter;  // as above
  void* result;       // [], fp32 (fp64 for fp64 tensors)
};

int64_t norm_ratio_blocks(int64_t count, Scalar scalar);

cudaError_t launch_norm_ratio(const NormRatio& ratio, Scalar scalar, cudaStream_t stream);

}  // namespace aligntok
