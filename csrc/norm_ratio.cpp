// min(|a| / (|b| + delta), limit) with the L2 norms of two lists of tensors, each taken as one long vector: the
// operator and the CPU's implementation; norm_ratio_cuda.cu has the CUDA kernel.
//
// Squares and sums are fp64. Sums run in two stages over pieces of fixed length, so the result has the same bits for
// any number of threads.

#include "common.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#ifdef ALIGNTOK_WITH_CUDA
#include "cuda_launch.h"
#endif

namespace {

using at::Tensor;

// Elements per piece: 16 KiB of fp32.
constexpr int64_t kPiece = 4096;

template <typename scalar_t>
struct SumOfSquares {
  ALIGNTOK_INLINE static void run(const scalar_t* data, int64_t count, double* result) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) {
      const double x = aligntok::widened(data[i]);
      sum += x * x;
    }
    *result = sum;
  }
};

template <typename scalar_t>
double sum_of_squares(const Tensor& tensor) {
  const int64_t count = tensor.numel(), pieces = at::divup(count, kPiece);
  const scalar_t* data = tensor.const_data_ptr<scalar_t>();
  std::vector<double> partial(pieces);
  at::parallel_for(0, pieces, aligntok::kGrain / kPiece, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      aligntok::run_fastest<SumOfSquares<scalar_t>>(
          data + p * kPiece, std::min(kPiece, count - p * kPiece), &partial[p]);
    }
  });
  double sum = 0;
  for (const double part : partial) {
    sum += part;
  }
  return sum;
}

double norm(const std::vector<Tensor>& tensors) {
  double sum = 0;
  for (const Tensor& tensor : tensors) {
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, tensor.scalar_type(), "aligntok::norm_ratio",
        [&] { sum += sum_of_squares<scalar_t>(tensor); });
  }
  return std::sqrt(sum);
}

// The same elements in some order without gaps; tensors without elements left out.
std::vector<Tensor> dense(at::TensorList tensors, const Tensor& first) {
  std::vector<Tensor> found;
  for (const Tensor& tensor : tensors) {
    TORCH_CHECK_VALUE(
        tensor.scalar_type() == first.scalar_type() && tensor.device() == first.device(),
        "norm_ratio: the tensors differ in dtype or device");
    if (tensor.numel() > 0) {
      found.push_back(tensor.is_non_overlapping_and_dense() ? tensor : tensor.contiguous());
    }
  }
  return found;
}

#ifdef ALIGNTOK_WITH_CUDA
void run_cuda(
    const std::vector<Tensor>& numerators, const std::vector<Tensor>& denominators, double delta, double limit,
    aligntok::Scalar scalar, const Tensor& result) {
  const c10::cuda::CUDAGuard guard(result.device());
  aligntok::NormRatio arguments{};
  TORCH_CHECK_VALUE(
      numerators.size() + denominators.size() <= aligntok::kMaxTensors, "norm_ratio: on CUDA at most ",
      aligntok::kMaxTensors, " tensors, got ", numerators.size() + denominators.size());
  for (const auto* list : {&numerators, &denominators}) {
    for (const Tensor& tensor : *list) {
      const int t = arguments.tensors++;
      arguments.data[t] = tensor.const_data_ptr();
      arguments.count[t] = tensor.numel();
      arguments.first_block[t + 1] =
          arguments.first_block[t] + static_cast<int>(aligntok::norm_ratio_blocks(tensor.numel(), scalar));
    }
  }
  const int blocks = arguments.first_block[arguments.tensors];
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Tensor partial = at::empty({blocks}, result.options().dtype(at::kDouble));
  const Tensor counter = aligntok::counter_of(stream);
  arguments.numerators = static_cast<int>(numerators.size());
  arguments.delta = delta;
  arguments.limit = limit;
  arguments.partial = partial.mutable_data_ptr<double>();
  arguments.counter = aligntok::address_of(counter);
  arguments.result = result.mutable_data_ptr();
  C10_CUDA_CHECK(aligntok::launch_norm_ratio(arguments, scalar, stream.stream()));
}
#endif

Tensor norm_ratio_meta(at::TensorList numerators, at::TensorList, double, double) {
  TORCH_CHECK_VALUE(!numerators.empty(), "norm_ratio: each list takes at least one tensor");
  const Tensor& first = numerators[0];
  return at::empty({}, first.options().dtype(first.scalar_type() == at::kDouble ? at::kDouble : at::kFloat));
}

Tensor norm_ratio(at::TensorList numerators, at::TensorList denominators, double delta, double limit) {
  const Tensor result = norm_ratio_meta(numerators, denominators, delta, limit);
  const auto above = dense(numerators, numerators[0]), below = dense(denominators, numerators[0]);
#ifdef ALIGNTOK_WITH_CUDA
  if (result.is_cuda() && above.size() + below.size() > 0) {
    run_cuda(above, below, delta, limit, aligntok::scalar_of(numerators[0]), result);
    return result;
  }
#endif
  const double value = norm(above) / (norm(below) + delta);
  result.fill_(value > limit ? limit : value);  // NaN stays
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(aligntok, m) {
  m.def(
      "norm_ratio(Tensor[] numerators, Tensor[] denominators, float delta, float limit) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(aligntok, CPU, m) {
  m.impl("norm_ratio", norm_ratio);
}

#ifdef ALIGNTOK_WITH_CUDA
TORCH_LIBRARY_IMPL(aligntok, CUDA, m) {
  m.impl("norm_ratio", norm_ratio);
}
#endif

TORCH_LIBRARY_IMPL(aligntok, Meta, m) {
  m.impl("norm_ratio", norm_ratio_meta);
}
