// Adversarial losses of discriminator and generator: loss, gradient and statistics in one pass over the logits.
// Here: the operators, their autograd, and the CPU's implementation; gan_loss_cuda.cu has the CUDA kernel.
//
// Every loss here is a weighted mean of phi(y), y = sign * logit, over one or two sets of logits:
//
//                   loss                                        hinge                  non-saturating
//   discriminator   0.5 * (mean phi(-real) + mean phi(+fake))   phi(y) = relu(1 + y)   phi(y) = softplus(y)
//   generator       mean phi(-fake)                             phi(y) = y             phi(y) = softplus(y)
//
// The discriminator's loss may contain the LeCam term (Tseng et al. 2021, arXiv 2104.03310)
//
//   lecam_weight * (mean relu(real - mean_fake)^2 + mean relu(mean_real - fake)^2)
//
// with moving averages mean_real and mean_fake of the mean logits. In terms of y both halves are
// relu(sign * mean of the other side - y)^2, so they join phi in the same pass.
//
// The derivative with respect to the logit is sign * weight / n * phi'(y). It costs nothing extra where phi
// is computed, so the forward pass writes it and the backward pass only multiplies it by the incoming scalar.
// The statistics (mean logit, share of logits with y < 0, "on the right side") ride along.
//
// Sums run in two stages over chunks of fixed length: within a chunk in vector lanes, then over chunks in
// order. Which thread takes which chunk has no influence, so the result has the same bits for any number of
// threads.

#include "common.h"

#include <ATen/Dispatch.h>
#include <ATen/TensorOperators.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "phi.h"
#ifdef ALIGNTOK_WITH_CUDA
#include "cuda_launch.h"
#endif

namespace {

using namespace aligntok;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Logits per chunk: the first stage of the sum. 16 KiB of fp32, so a chunk stays in the first-level cache
// between its loops.
constexpr int64_t kChunk = 4096;

// `value` where the condition holds, else 0. As bit arithmetic: a chain of ?: on one condition becomes
// branches.
template <typename acc_t>
ALIGNTOK_INLINE acc_t kept_if(bool condition, acc_t value) {
  using bits_t = std::conditional_t<sizeof(acc_t) == 8, uint64_t, uint32_t>;
  return bits_as<acc_t>(bits_as<bits_t>(value) & (bits_t(0) - static_cast<bits_t>(condition)));
}

// exp(t) for t <= 0: t = n ln 2 + r with |r| <= ln(2) / 2, Taylor to r^7 (truncation 3e-8 of the value),
// times 2^n.
ALIGNTOK_INLINE float exp_of_negative(float t) {
  constexpr float kLowest = -87.0f;         // e^-87 is the last result that is a normal number
  constexpr float kRound = 12582912.0f;     // 1.5 * 2^23: adding it leaves round(x) in the low mantissa bits
  constexpr float kLn2High = 0.693359375f;  // ln 2 = high + low, high exact in 9 bits
  constexpr float kLn2Low = -2.12194440e-4f;
  t = t < kLowest ? kLowest : t;  // written so that NaN stays NaN
  const float shifted = t * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (t - n * kLn2High) - n * kLn2Low;
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const uint32_t exponent = (bits_as<uint32_t>(shifted) + 127u) << 23;
  return p * bits_as<float>(exponent);
}

ALIGNTOK_INLINE double exp_of_negative(double t) {
  return std::exp(t);
}

// log(1 + e) for 0 <= e <= 1 as 2 atanh(s), s = e / (2 + e) <= 1/3; the first term left out is s^15 / 15,
// 1.4e-8 of the value.
ALIGNTOK_INLINE float log1p_of_unit(float e) {
  const float s = e / (2.0f + e);
  const float q = s * s;
  float p = 1.0f / 13.0f;
  p = p * q + 1.0f / 11.0f;
  p = p * q + 1.0f / 9.0f;
  p = p * q + 1.0f / 7.0f;
  p = p * q + 1.0f / 5.0f;
  p = p * q + 1.0f / 3.0f;
  p = p * q + 1.0f;
  return 2.0f * s * p;
}

ALIGNTOK_INLINE double log1p_of_unit(double e) {
  return std::log1p(e);
}

template <Phi phi, typename acc_t>
ALIGNTOK_INLINE void value_and_slope(acc_t y, acc_t& value, acc_t& slope) {
  if constexpr (phi == Phi::kLinear) {
    value = y;
    slope = acc_t(1);
  } else if constexpr (phi == Phi::kHinge) {
    const acc_t margin = acc_t(1) + y;
    const bool active = !(margin <= acc_t(0));  // true for NaN, which must not vanish
    value = kept_if(active, margin);
    slope = kept_if(active, acc_t(1));
  } else {
    const bool negative = y < acc_t(0);
    const acc_t e = exp_of_negative(-std::abs(y));
    value = kept_if(!negative, y) + log1p_of_unit(e);
    slope = (kept_if(negative, e) + kept_if(!negative, acc_t(1))) / (acc_t(1) + e);
  }
}

struct Sums {
  double value = 0;
  double logit = 0;
  double right_side = 0;
};

// What a side's logits are multiplied with, see Side.
struct Coefficients {
  double sign;
  double scale;   // of the stored gradient
  double anchor;  // LeCam: sign * mean of the other side
  double factor;  // LeCam: its weight relative to phi's
};

// First stage. `gradient` receives sign * scale * slope, in the logits' own precision.
template <Phi phi, bool with_lecam, bool with_gradient, typename scalar_t>
ALIGNTOK_INLINE Sums
sum_chunk(const scalar_t* logits, scalar_t* gradient, int64_t n, const Coefficients& coefficients) {
  using acc_t = at::opmath_type<scalar_t>;
  const acc_t sign = static_cast<acc_t>(coefficients.sign);
  const acc_t scale = static_cast<acc_t>(coefficients.sign * coefficients.scale);
  const acc_t anchor = static_cast<acc_t>(coefficients.anchor);
  const acc_t factor = static_cast<acc_t>(coefficients.factor);
  acc_t value_sum = 0, logit_sum = 0, right_side = 0;
#pragma omp simd reduction(+ : value_sum, logit_sum, right_side)
  for (int64_t i = 0; i < n; ++i) {
    const acc_t x = widened(logits[i]);
    const acc_t y = sign * x;
    acc_t value, slope;
    value_and_slope<phi>(y, value, slope);
    if constexpr (with_lecam) {
      const acc_t difference = anchor - y;
      const acc_t excess = kept_if(!(difference <= acc_t(0)), difference);
      value += factor * excess * excess;
      slope -= acc_t(2) * factor * excess;
    }
    value_sum += value;
    logit_sum += x;
    right_side += kept_if(y < acc_t(0), acc_t(1));
    if constexpr (with_gradient) {
      gradient[i] = narrowed<scalar_t>(scale * slope);
    }
  }
  return {static_cast<double>(value_sum), static_cast<double>(logit_sum), static_cast<double>(right_side)};
}

// The same loop compiled for several instruction sets.
template <typename scalar_t>
using ChunkFunction = Sums (*)(const scalar_t*, scalar_t*, int64_t, const Coefficients&);

#define ALIGNTOK_CHUNK_FUNCTION(NAME, TARGET)                                                 \
  template <Phi phi, bool with_lecam, bool with_gradient, typename scalar_t>                  \
  TARGET Sums NAME(const scalar_t* x, scalar_t* gradient, int64_t n, const Coefficients& c) { \
    return sum_chunk<phi, with_lecam, with_gradient>(x, gradient, n, c);                      \
  }

ALIGNTOK_CHUNK_FUNCTION(sum_chunk_default, )
#if defined(__x86_64__)
ALIGNTOK_CHUNK_FUNCTION(sum_chunk_avx2, ALIGNTOK_AVX2)
ALIGNTOK_CHUNK_FUNCTION(sum_chunk_avx512, ALIGNTOK_AVX512)
#endif

template <Phi phi, bool with_lecam, bool with_gradient, typename scalar_t>
ChunkFunction<scalar_t> chunk_function() {
#if defined(__x86_64__)
  switch (capability()) {
    case Capability::kAvx512:
      return sum_chunk_avx512<phi, with_lecam, with_gradient, scalar_t>;
    case Capability::kAvx2:
      return sum_chunk_avx2<phi, with_lecam, with_gradient, scalar_t>;
    default:
      break;
  }
#endif
  return sum_chunk_default<phi, with_lecam, with_gradient, scalar_t>;
}

template <Phi phi, bool with_lecam, typename scalar_t>
ChunkFunction<scalar_t> chunk_function(bool with_gradient) {
  return with_gradient ? chunk_function<phi, with_lecam, true, scalar_t>()
                       : chunk_function<phi, with_lecam, false, scalar_t>();
}

template <typename scalar_t>
ChunkFunction<scalar_t> chunk_function(Phi phi, bool with_lecam, bool with_gradient) {
  switch (phi) {
    case Phi::kLinear:  // of the generator, which has no LeCam term
      return chunk_function<Phi::kLinear, false, scalar_t>(with_gradient);
    case Phi::kHinge:
      return with_lecam ? chunk_function<Phi::kHinge, true, scalar_t>(with_gradient)
                        : chunk_function<Phi::kHinge, false, scalar_t>(with_gradient);
    default:
      return with_lecam ? chunk_function<Phi::kSoftplus, true, scalar_t>(with_gradient)
                        : chunk_function<Phi::kSoftplus, false, scalar_t>(with_gradient);
  }
}

// One set of logits and its part in the loss.
struct Side {
  Tensor logits;    // contiguous
  Tensor gradient;  // contiguous, or without elements when nobody asks for it
  double sign;
  double weight;
};

// The moving averages [2] of real and fake mean logits, fp32, and the term's weight; absent where the weight is 0.
struct LeCam {
  Tensor means;
  double weight;
};

// fp16 cannot hold weight / n: 0.5 / 28800 is below its normal range, and a loss scale would come too late.
// Its gradient is kept unscaled and the backward pass applies the rest in fp32.
double stored_scale(const Tensor& logits, double weight) {
  return logits.scalar_type() == at::kHalf ? 1.0 : weight / static_cast<double>(logits.numel());
}

// Chunks that one thread takes at least, about 60 us of work at 0.3 (hinge) and 0.9 (softplus) ns per fp32 logit.
// For less, a second thread saves little, and on a machine with other work waiting for it can cost a
// scheduler's slice, a hundred times as much.
int64_t grain(Phi phi) {
  return phi == Phi::kSoftplus ? 16 : 48;
}

template <typename scalar_t>
std::vector<Sums> sum_sides(const std::vector<Side>& sides, Phi phi, const std::optional<LeCam>& lecam) {
  std::vector<int64_t> first_chunk{0};
  std::vector<ChunkFunction<scalar_t>> functions;
  std::vector<Coefficients> coefficients;
  for (const Side& side : sides) {
    const size_t other = 1 - coefficients.size();
    first_chunk.push_back(first_chunk.back() + at::divup(side.logits.numel(), kChunk));
    functions.push_back(chunk_function<scalar_t>(phi, lecam.has_value(), side.gradient.numel() > 0));
    coefficients.push_back(
        {side.sign, stored_scale(side.logits, side.weight),
         lecam ? side.sign * lecam->means.const_data_ptr<float>()[other] : 0.0,
         lecam ? lecam->weight / side.weight : 0.0});
  }
  std::vector<Sums> partial(first_chunk.back());
  at::parallel_for(0, first_chunk.back(), grain(phi), [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const size_t s = sides.size() > 1 && chunk >= first_chunk[1] ? 1 : 0;
      const Side& side = sides[s];
      const int64_t start = (chunk - first_chunk[s]) * kChunk;
      const int64_t n = std::min(kChunk, side.logits.numel() - start);
      scalar_t* gradient =
          side.gradient.numel() ? side.gradient.template mutable_data_ptr<scalar_t>() + start : nullptr;
      partial[chunk] = functions[s](
          side.logits.template const_data_ptr<scalar_t>() + start, gradient, n, coefficients[s]);
    }
  });
  std::vector<Sums> totals(sides.size());
  for (size_t s = 0; s < sides.size(); ++s) {
    for (int64_t chunk = first_chunk[s]; chunk < first_chunk[s + 1]; ++chunk) {
      totals[s].value += partial[chunk].value;
      totals[s].logit += partial[chunk].logit;
      totals[s].right_side += partial[chunk].right_side;
    }
  }
  return totals;
}

Phi discriminator_phi(std::string_view kind) {
  TORCH_CHECK_VALUE(
      kind == "hinge" || kind == "non_saturating", "gan_loss: kind must be hinge or non_saturating, got ",
      kind);
  return kind == "hinge" ? Phi::kHinge : Phi::kSoftplus;
}

Phi generator_phi(std::string_view kind) {
  const Phi phi = discriminator_phi(kind);
  return phi == Phi::kHinge ? Phi::kLinear : phi;
}

// Loss and statistics are fp32, or fp64 for fp64 logits.
at::TensorOptions result_options(const Tensor& logits) {
  return logits.options().dtype(logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

Tensor gradient_buffer(const Tensor& logits, bool wanted) {
  return wanted ? at::empty_like(logits, logits.options(), at::MemoryFormat::Contiguous)
                : at::empty({0}, logits.options());
}

#ifdef ALIGNTOK_WITH_CUDA
void run_cuda(
    const std::vector<Side>& sides, Phi phi, const std::optional<LeCam>& lecam, const Tensor& loss,
    const Tensor& stats) {
  const c10::cuda::CUDAGuard guard(loss.device());
  GanLoss arguments{};
  int64_t blocks = 0;
  for (const Side& side : sides) {
    GanSide& to = arguments.sides[arguments.side_count++];
    to.logits = side.logits.const_data_ptr();
    to.gradient = side.gradient.numel() ? side.gradient.mutable_data_ptr() : nullptr;
    to.count = side.logits.numel();
    to.blocks = gan_loss_blocks(to.count);
    to.sign = side.sign;
    to.weight = side.weight;
    to.gradient_scale = stored_scale(side.logits, side.weight);
    blocks += to.blocks;
  }
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Tensor partial = at::empty({blocks, 3}, loss.options().dtype(at::kDouble));
  const Tensor counter = counter_of(stream);
  arguments.lecam_means = lecam ? lecam->means.const_data_ptr<float>() : nullptr;
  arguments.lecam_weight = lecam ? lecam->weight : 0.0;
  arguments.partial = partial.mutable_data_ptr<double>();
  arguments.counter = address_of(counter);
  arguments.loss = loss.mutable_data_ptr();
  arguments.stats = stats.mutable_data_ptr();
  C10_CUDA_CHECK(launch_gan_loss(arguments, phi, scalar_of(sides[0].logits), stream.stream()));
}
#endif

// Fills `loss` and `stats` ([mean per side..., right-side share per side...]).
void run(
    const std::vector<Side>& sides, Phi phi, const std::optional<LeCam>& lecam, const Tensor& loss,
    const Tensor& stats) {
#ifdef ALIGNTOK_WITH_CUDA
  if (loss.is_cuda()) {
    return run_cuda(sides, phi, lecam, loss, stats);
  }
#endif
  std::vector<Sums> totals;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, sides[0].logits.scalar_type(), "aligntok::gan_loss",
      [&] { totals = sum_sides<scalar_t>(sides, phi, lecam); });
  AT_DISPATCH_FLOATING_TYPES(loss.scalar_type(), "aligntok::gan_loss result", [&] {
    double total = 0;
    scalar_t* stat = stats.mutable_data_ptr<scalar_t>();
    for (size_t s = 0; s < sides.size(); ++s) {
      const double n = static_cast<double>(sides[s].logits.numel());
      total += sides[s].weight * (totals[s].value / n);
      stat[s] = static_cast<scalar_t>(totals[s].logit / n);
      stat[s + sides.size()] = static_cast<scalar_t>(totals[s].right_side / n);
    }
    *loss.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(total);
  });
}

using DiscriminatorResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using GeneratorResult = std::tuple<Tensor, Tensor, Tensor>;

DiscriminatorResult discriminator_empty(
    const Tensor& real, const Tensor& fake, bool real_gradient, bool fake_gradient) {
  const auto options = result_options(real);
  return {
      at::empty({}, options), at::empty({4}, options), gradient_buffer(real, real_gradient),
      gradient_buffer(fake, fake_gradient)};
}

using OptionalTensor = std::optional<Tensor>;

DiscriminatorResult discriminator_meta(
    const Tensor& real, const Tensor& fake, c10::string_view, bool real_gradient, bool fake_gradient,
    const OptionalTensor&, double) {
  return discriminator_empty(real, fake, real_gradient, fake_gradient);
}

std::optional<LeCam> checked_lecam(const Tensor& real, const OptionalTensor& means, double weight) {
  if (weight == 0.0) {
    return std::nullopt;
  }
  TORCH_CHECK_VALUE(
      weight > 0.0 && means.has_value(), "gan_loss: the LeCam term takes a positive weight and the means");
  TORCH_CHECK_VALUE(
      means->scalar_type() == at::kFloat && means->numel() == 2 && means->device() == real.device(),
      "gan_loss: the LeCam means are two fp32 numbers on the logits' device");
  return LeCam{means->contiguous(), weight};
}

DiscriminatorResult discriminator(
    const Tensor& real, const Tensor& fake, c10::string_view kind, bool real_gradient, bool fake_gradient,
    const OptionalTensor& lecam_means, double lecam_weight) {
  TORCH_CHECK_VALUE(
      real.scalar_type() == fake.scalar_type() && real.device() == fake.device(),
      "gan_loss: real and fake logits differ in dtype or device");
  TORCH_CHECK_VALUE(real.numel() > 0 && fake.numel() > 0, "gan_loss: the mean of no logits is not defined");
  const Phi phi = discriminator_phi(kind);
  const auto lecam = checked_lecam(real, lecam_means, lecam_weight);
  auto result = discriminator_empty(real, fake, real_gradient, fake_gradient);
  auto& [loss, stats, d_real, d_fake] = result;
  run({{real.contiguous(), d_real, -1.0, 0.5}, {fake.contiguous(), d_fake, 1.0, 0.5}}, phi, lecam, loss, stats);
  return result;
}

GeneratorResult generator_meta(const Tensor& fake, c10::string_view, bool gradient) {
  const auto options = result_options(fake);
  return {at::empty({}, options), at::empty({2}, options), gradient_buffer(fake, gradient)};
}

GeneratorResult generator(const Tensor& fake, c10::string_view kind, bool gradient) {
  TORCH_CHECK_VALUE(fake.numel() > 0, "gan_loss: the mean of no logits is not defined");
  auto result = generator_meta(fake, kind, gradient);
  auto& [loss, stats, d_fake] = result;
  run({{fake.contiguous(), d_fake, -1.0, 1.0}}, generator_phi(kind), std::nullopt, loss, stats);
  return result;
}

DiscriminatorResult call_discriminator(
    const Tensor& real, const Tensor& fake, c10::string_view kind, bool real_gradient, bool fake_gradient,
    const OptionalTensor& lecam_means, double lecam_weight) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("aligntok::gan_discriminator_loss_and_gradient", "")
                             .typed<decltype(discriminator)>();
  return op.call(real, fake, kind, real_gradient, fake_gradient, lecam_means, lecam_weight);
}

GeneratorResult call_generator(const Tensor& fake, c10::string_view kind, bool gradient) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("aligntok::gan_generator_loss_and_gradient", "")
                             .typed<decltype(generator)>();
  return op.call(fake, kind, gradient);
}

// Autograd. The saved gradient is that of the loss; the chain rule multiplies it by one scalar.

bool is_exactly_one(const Tensor& scalar) {
  // Only a plain CPU tensor can be looked at: under tracing the value does not exist yet.
  if (!scalar.device().is_cpu() || at::isTensorSubclassLike(scalar) || scalar.numel() != 1) {
    return false;
  }
  return scalar.scalar_type() == at::kFloat
             ? *scalar.const_data_ptr<float>() == 1.0f
             : scalar.scalar_type() == at::kDouble && *scalar.const_data_ptr<double>() == 1.0;
}

// gradient * upstream, where fp16 gradients still lack their factor weight / n.
Tensor scaled(const Tensor& gradient, const Tensor& upstream, double weight) {
  if (gradient.scalar_type() == at::kHalf) {
    return gradient * (upstream * weight / gradient.sym_numel());
  }
  return !at::GradMode::is_enabled() && is_exactly_one(upstream) ? gradient : gradient * upstream;
}

// phi' is constant almost everywhere for the hinge, so its second derivative is the zero that this graph
// gives; softplus and the LeCam term have a real one that the saved gradient knows nothing of.
void refuse_second_derivative(const std::string& kind, bool lecam) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      (kind == "hinge" && !lecam) || !at::GradMode::is_enabled(),
      "gan_loss: the C++ implementation has no second derivative of '", kind, lecam ? "' with LeCam" : "'",
      "; use implementation=\"reference\" where create_graph=True is needed");
}

struct DiscriminatorLoss : public torch::autograd::Function<DiscriminatorLoss> {
  static variable_list forward(
      AutogradContext* ctx, const Tensor& real, const Tensor& fake, std::string kind,
      const OptionalTensor& lecam_means, double lecam_weight) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [loss, stats, d_real, d_fake] = call_discriminator(
        real, fake, kind, real.requires_grad(), fake.requires_grad(), lecam_means, lecam_weight);
    ctx->save_for_backward({d_real, d_fake});
    ctx->saved_data["lecam"] = lecam_weight != 0.0;
    ctx->saved_data["kind"] = std::move(kind);
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({stats});
    return {loss, stats};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    refuse_second_derivative(ctx->saved_data["kind"].toStringRef(), ctx->saved_data["lecam"].toBool());
    const auto saved = ctx->get_saved_variables();
    variable_list result(5);
    for (size_t s = 0; s < 2; ++s) {
      if (upstream[0].defined() && ctx->needs_input_grad(s)) {
        result[s] = scaled(saved[s], upstream[0], 0.5);
      }
    }
    return result;
  }
};

struct GeneratorLoss : public torch::autograd::Function<GeneratorLoss> {
  static variable_list forward(AutogradContext* ctx, const Tensor& fake, std::string kind) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [loss, stats, d_fake] = call_generator(fake, kind, true);
    ctx->save_for_backward({d_fake});
    ctx->saved_data["kind"] = std::move(kind);
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({stats});
    return {loss, stats};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    refuse_second_derivative(ctx->saved_data["kind"].toStringRef(), false);
    variable_list result(2);
    if (upstream[0].defined()) {
      result[0] = scaled(ctx->get_saved_variables()[0], upstream[0], 1.0);
    }
    return result;
  }
};

std::tuple<Tensor, Tensor> discriminator_no_grad(
    const Tensor& real, const Tensor& fake, c10::string_view kind, const OptionalTensor& lecam_means,
    double lecam_weight) {
  auto [loss, stats, d_real, d_fake] =
      call_discriminator(real, fake, kind, false, false, lecam_means, lecam_weight);
  return {loss, stats};
}

std::tuple<Tensor, Tensor> generator_no_grad(const Tensor& fake, c10::string_view kind) {
  auto [loss, stats, d_fake] = call_generator(fake, kind, false);
  return {loss, stats};
}

std::tuple<Tensor, Tensor> discriminator_autograd(
    const Tensor& real, const Tensor& fake, c10::string_view kind, const OptionalTensor& lecam_means,
    double lecam_weight) {
  if (!at::GradMode::is_enabled() || !(real.requires_grad() || fake.requires_grad())) {
    at::AutoDispatchBelowADInplaceOrView below;
    return discriminator_no_grad(real, fake, kind, lecam_means, lecam_weight);
  }
  auto result = DiscriminatorLoss::apply(real, fake, std::string(kind), lecam_means, lecam_weight);
  return {result[0], result[1]};
}

std::tuple<Tensor, Tensor> generator_autograd(const Tensor& fake, c10::string_view kind) {
  if (!at::GradMode::is_enabled() || !fake.requires_grad()) {
    at::AutoDispatchBelowADInplaceOrView below;
    return generator_no_grad(fake, kind);
  }
  auto result = GeneratorLoss::apply(fake, std::string(kind));
  return {result[0], result[1]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(aligntok, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "gan_discriminator_loss("
      "Tensor real, Tensor fake, str kind, Tensor? lecam_means=None, float lecam_weight=0.0)"
      " -> (Tensor loss, Tensor stats)",
      tags);
  m.def("gan_generator_loss(Tensor fake, str kind) -> (Tensor loss, Tensor stats)", tags);
  m.def(
      "gan_discriminator_loss_and_gradient("
      "Tensor real, Tensor fake, str kind, bool real_gradient, bool fake_gradient,"
      " Tensor? lecam_means=None, float lecam_weight=0.0)"
      " -> (Tensor loss, Tensor stats, Tensor d_real, Tensor d_fake)",
      tags);
  m.def(
      "gan_generator_loss_and_gradient(Tensor fake, str kind, bool gradient)"
      " -> (Tensor loss, Tensor stats, Tensor d_fake)",
      tags);
}

TORCH_LIBRARY_IMPL(aligntok, CPU, m) {
  m.impl("gan_discriminator_loss_and_gradient", discriminator);
  m.impl("gan_generator_loss_and_gradient", generator);
}

#ifdef ALIGNTOK_WITH_CUDA
TORCH_LIBRARY_IMPL(aligntok, CUDA, m) {
  m.impl("gan_discriminator_loss_and_gradient", discriminator);
  m.impl("gan_generator_loss_and_gradient", generator);
}
#endif

TORCH_LIBRARY_IMPL(aligntok, Meta, m) {
  m.impl("gan_discriminator_loss_and_gradient", discriminator_meta);
  m.impl("gan_generator_loss_and_gradient", generator_meta);
}

TORCH_LIBRARY_IMPL(aligntok, CompositeExplicitAutograd, m) {
  m.impl("gan_discriminator_loss", discriminator_no_grad);
  m.impl("gan_generator_loss", generator_no_grad);
}

TORCH_LIBRARY_IMPL(aligntok, Autograd, m) {
  m.impl("gan_discriminator_loss", discriminator_autograd);
  m.impl("gan_generator_loss", generator_autograd);
}
