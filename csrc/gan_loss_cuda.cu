// Adversarial losses of discriminator and generator on CUDA: loss, gradient, statistics and the LeCam term in
// one launch and one pass over the logits. gan_loss.cpp has the formulas.
//
// A discriminator's real and fake logits share the grid: the first blocks take the real ones. Per-element
// arithmetic and the sum of one thread (four fp32 logits up to half a million per side) are fp32, or fp64 for fp64
// logits; from there on sums are fp64.

#include <algorithm>
#include <cmath>

#include "reduce.cuh"

namespace aligntok {
namespace {

// Blocks per side at most. Two sides then fill an H100 once (132 multiprocessors with up to eight blocks); more logits
// make longer loops instead. The number depends on nothing but the number of logits, so every GPU adds in one order.
constexpr int64_t kMaxBlocks = 512;
constexpr int64_t kLogitsPerBlock = kThreads * 4;  // one 16-byte load per thread for fp32 logits

template <Phi phi, typename acc_t>
__device__ __forceinline__ void value_and_slope(acc_t y, acc_t& value, acc_t& slope) {
  if constexpr (phi == Phi::kLinear) {
    value = y;
    slope = acc_t(1);
  } else if constexpr (phi == Phi::kHinge) {
    const acc_t margin = acc_t(1) + y;
    const bool active = !(margin <= acc_t(0));  // true for NaN, which must not vanish
    value = active ? margin : acc_t(0);
    slope = active ? acc_t(1) : acc_t(0);
  } else {
    const bool negative = y < acc_t(0);
    const acc_t e = std::exp(negative ? y : -y);
    value = (negative ? acc_t(0) : y) + std::log1p(e);
    slope = (negative ? e : acc_t(1)) / (acc_t(1) + e);
  }
}

// One side of the loss in the precision of its arithmetic, and the sums of one thread.
template <Phi phi, typename scalar_t>
struct ThreadSums {
  using acc_t = typename Arithmetic<scalar_t>::type;
  acc_t sign, scale;
  bool lecam;
  acc_t anchor, factor;  // LeCam: sign * moving average of the other side's mean, weight relative to phi's
  acc_t value = 0, logit = 0, right_side = 0;

  // Adds one logit; returns its gradient.
  __device__ __forceinline__ scalar_t add(scalar_t element) {
    const acc_t x = widened(element);
    const acc_t y = sign * x;
    acc_t v, slope;
    value_and_slope<phi>(y, v, slope);
    if (lecam) {
      const acc_t excess = anchor - y;
      if (!(excess <= acc_t(0))) {
        v += factor * excess * excess;
        slope -= acc_t(2) * factor * excess;
      }
    }
    value += v;
    logit += x;
    right_side += y < acc_t(0) ? acc_t(1) : acc_t(0);
    return narrowed<scalar_t>(scale * slope);
  }
};

template <Phi phi, typename scalar_t>
__global__ void __launch_bounds__(kThreads) gan_loss_kernel(const __grid_constant__ GanLoss loss) {
  using acc_t = typename Arithmetic<scalar_t>::type;
  const int64_t first_blocks = loss.sides[0].blocks;
  const int s = blockIdx.x >= first_blocks ? 1 : 0;
  const GanSide& side = loss.sides[s];
  const scalar_t* logits = static_cast<const scalar_t*>(side.logits);
  scalar_t* gradient = static_cast<scalar_t*>(side.gradient);

  ThreadSums<phi, scalar_t> sums;
  sums.sign = static_cast<acc_t>(side.sign);
  sums.scale = static_cast<acc_t>(side.sign * side.gradient_scale);
  sums.lecam = loss.lecam_means != nullptr;
  sums.anchor = sums.lecam ? sums.sign * static_cast<acc_t>(loss.lecam_means[1 - s]) : acc_t(0);
  sums.factor = static_cast<acc_t>(loss.lecam_weight / side.weight);

  const int64_t thread = (blockIdx.x - s * first_blocks) * kThreads + threadIdx.x;
  const int64_t threads = side.blocks * kThreads;
  using vector_t = Vector<scalar_t>;
  const int64_t vectors = is_aligned(logits) && is_aligned(gradient) ? side.count / vector_t::kSize : 0;
  for (int64_t v = thread; v < vectors; v += threads) {
    vector_t elements = reinterpret_cast<const vector_t*>(logits)[v];
#pragma unroll
    for (int j = 0; j < vector_t::kSize; ++j) {
      elements.at[j] = sums.add(elements.at[j]);
    }
    if (gradient != nullptr) {
      reinterpret_cast<vector_t*>(gradient)[v] = elements;
    }
  }
  for (int64_t i = vectors * vector_t::kSize + thread; i < side.count; i += threads) {
    const scalar_t slope = sums.add(logits[i]);
    if (gradient != nullptr) {
      gradient[i] = slope;
    }
  }

  double of_block[3] = {sums.value, sums.logit, sums.right_side};
  block_sum(of_block);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 3; ++i) {
      loss.partial[int64_t(blockIdx.x) * 3 + i] = of_block[i];
    }
  }
  if (!is_last_block(loss.counter)) {
    return;
  }
  double total = 0;
  for (int k = 0; k < loss.side_count; ++k) {
    double sum[3];
    sum_partials(loss.partial, k * first_blocks, k * first_blocks + loss.sides[k].blocks, sum);
    const double n = static_cast<double>(loss.sides[k].count);
    total += loss.sides[k].weight * (sum[0] / n);
    if (threadIdx.x == 0) {
      static_cast<acc_t*>(loss.stats)[k] = static_cast<acc_t>(sum[1] / n);
      static_cast<acc_t*>(loss.stats)[k + loss.side_count] = static_cast<acc_t>(sum[2] / n);
    }
  }
  if (threadIdx.x == 0) {
    *static_cast<acc_t*>(loss.loss) = static_cast<acc_t>(total);
  }
}

template <Phi phi>
cudaError_t launch(const GanLoss& loss, Scalar scalar, const cudaLaunchConfig_t& config) {
  switch (scalar) {
    case Scalar::kFloat:
      return cudaLaunchKernelEx(&config, gan_loss_kernel<phi, float>, loss);
    case Scalar::kBFloat16:
      return cudaLaunchKernelEx(&config, gan_loss_kernel<phi, __nv_bfloat16>, loss);
    case Scalar::kHalf:
      return cudaLaunchKernelEx(&config, gan_loss_kernel<phi, __half>, loss);
    default:
      return cudaLaunchKernelEx(&config, gan_loss_kernel<phi, double>, loss);
  }
}

}  // namespace

int64_t gan_loss_blocks(int64_t count) {
  return std::min(kMaxBlocks, (count + kLogitsPerBlock - 1) / kLogitsPerBlock);
}

cudaError_t launch_gan_loss(const GanLoss& loss, Phi phi, Scalar scalar, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(loss.sides[0].blocks + (loss.side_count > 1 ? loss.sides[1].blocks : 0)));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  switch (phi) {
    case Phi::kLinear:
      return launch<Phi::kLinear>(loss, scalar, config);
    case Phi::kHinge:
      return launch<Phi::kHinge>(loss, scalar, config);
    default:
      return launch<Phi::kSoftplus>(loss, scalar, config);
  }
}

}  // namespace aligntok
