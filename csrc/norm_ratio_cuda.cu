// min(|a| / (|b| + delta), limit) of two lists of tensors on CUDA in one launch; norm_ratio.cpp has the formula.
//
// The grid runs over pieces of equal length of all tensors of both lists. Squares and sums are fp64: a square of
// fp32 is exact there and cannot overflow.

#include <cmath>

#include "reduce.cuh"

namespace aligntok {
namespace {

// Vectors of 16 bytes that one thread adds: 64 KiB per block, so that the last block has few partial sums to add
// (25,000 for a whole decoder of 400 M fp32 parameters), and the few thousand weights of a last convolution take
// one block.
constexpr int kVectorsPerThread = 16;
constexpr int kUnrolled = 4;  // loads under way per thread

template <typename scalar_t>
constexpr int64_t kPiece = int64_t(kThreads) * kVectorsPerThread * Vector<scalar_t>::kSize;

template <typename scalar_t>
__device__ __forceinline__ double square(scalar_t element) {
  const double x = widened(element);
  return x * x;
}

// The tensor that a block belongs to: the last one whose first block is not behind it.
__device__ __forceinline__ int tensor_of(const NormRatio& ratio, int block) {
  int low = 0, high = ratio.tensors;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (ratio.first_block[middle] <= block ? low : high) = middle;
  }
  return low;
}

template <typename scalar_t>
__device__ __forceinline__ double sum_of_squares(const scalar_t* data, int64_t count) {
  using vector_t = Vector<scalar_t>;
  const int64_t vectors = is_aligned(data) ? count / vector_t::kSize : 0;
  double sum = 0;
#pragma unroll kUnrolled
  for (int64_t v = threadIdx.x; v < vectors; v += kThreads) {
    const vector_t elements = reinterpret_cast<const vector_t*>(data)[v];
#pragma unroll
    for (int j = 0; j < vector_t::kSize; ++j) {
      sum += square(elements.at[j]);
    }
  }
  for (int64_t i = vectors * vector_t::kSize + threadIdx.x; i < count; i += kThreads) {
    sum += square(data[i]);
  }
  return sum;
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) norm_ratio_kernel(const __grid_constant__ NormRatio ratio) {
  using acc_t = typename Arithmetic<scalar_t>::type;
  const int tensor = tensor_of(ratio, blockIdx.x);
  const int64_t start = (int(blockIdx.x) - ratio.first_block[tensor]) * kPiece<scalar_t>;
  const int64_t left = ratio.count[tensor] - start;
  const scalar_t* data = static_cast<const scalar_t*>(ratio.data[tensor]) + start;

  double of_block[1] = {sum_of_squares(data, left < kPiece<scalar_t> ? left : kPiece<scalar_t>)};
  block_sum(of_block);
  if (threadIdx.x == 0) {
    ratio.partial[blockIdx.x] = of_block[0];
  }
  if (!is_last_block(ratio.counter)) {
    return;
  }
  double numerator[1], denominator[1];
  const int border = ratio.first_block[ratio.numerators];
  sum_partials(ratio.partial, 0, border, numerator);
  sum_partials(ratio.partial, border, ratio.first_block[ratio.tensors], denominator);
  if (threadIdx.x == 0) {
    const double value = std::sqrt(numerator[0]) / (std::sqrt(denominator[0]) + ratio.delta);
    *static_cast<acc_t*>(ratio.result) = static_cast<acc_t>(value > ratio.limit ? ratio.limit : value);  // NaN stays
  }
}

}  // namespace

int64_t norm_ratio_blocks(int64_t count, Scalar scalar) {
  const int64_t size = scalar == Scalar::kDouble ? 8 : scalar == Scalar::kFloat ? 4 : 2;
  const int64_t length = int64_t(kThreads) * kVectorsPerThread * (16 / size);
  return (count + length - 1) / length;
}

cudaError_t launch_norm_ratio(const NormRatio& ratio, Scalar scalar, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(ratio.first_block[ratio.tensors]));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  switch (scalar) {
    case Scalar::kFloat:
      return cudaLaunchKernelEx(&config, norm_ratio_kernel<float>, ratio);
    case Scalar::kBFloat16:
      return cudaLaunchKernelEx(&config, norm_ratio_kernel<__nv_bfloat16>, ratio);
    case Scalar::kHalf:
      return cudaLaunchKernelEx(&config, norm_ratio_kernel<__half>, ratio);
    default:
      return cudaLaunchKernelEx(&config, norm_ratio_kernel<double>, ratio);
  }
}

}  // namespace aligntok
