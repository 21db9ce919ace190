// One layer of LPIPS on the CPU for features fx, fy [B, C, H, W] in channels-last memory, forward and backward.
//
//   u        = f / (|f| + epsilon)                           |f|: norm over the channels of a pixel
//   distance = mean over pixels of sum_c head_c (ux_c - uy_c)^2                                      [B]
//   dfx      = (g - (fx / |fx|) sum_c g_c ux_c) / (|fx| + epsilon),  g = 2 head (ux - uy) ddistance / (H W)
//
// f / |f| counts as 0 for the zero vector. dfy is dfx with the maps exchanged.
//
// A pixel is a row of C numbers, which stays in the first-level cache while it is read for the norms and then
// for the sum. Forward reads both maps once, backward reads them once more and writes what is wanted; norms are
// computed again. Pixels are added up in chunks and chunks in double, both in fixed order: the same bits for
// any number of threads.

#include "common.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

namespace {

using namespace aligntok;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr float kEpsilon = 1e-10f;  // as in kernels/lpips_distance.py
constexpr int64_t kPixels = 64;     // of a chunk

// fp64 is for the reference.
#define ALIGNTOK_DISPATCH(TYPE, NAME, ...)                                  \
  AT_DISPATCH_SWITCH(                                                        \
      TYPE, NAME, AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__)                  \
      AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__) AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__))

template <typename scalar_t>
ALIGNTOK_INLINE void norms_of(const scalar_t* x, const scalar_t* y, int64_t channels, float& nx, float& ny) {
  float sx = 0, sy = 0;
#pragma omp simd reduction(+ : sx, sy)
  for (int64_t c = 0; c < channels; ++c) {
    const float vx = widened(x[c]), vy = widened(y[c]);
    sx += vx * vx;
    sy += vy * vy;
  }
  nx = std::sqrt(sx);
  ny = std::sqrt(sy);
}

// x * ix - y * iy, given iy / ix: exactly 0 for equal maps, also where the compiler fuses multiplication and
// subtraction.
ALIGNTOK_INLINE float difference(float x, float y, float ix, float ratio) {
  return (x - y * ratio) * ix;
}

// *sum = the distances of some pixels, added up.
template <typename scalar_t>
struct Forward {
  ALIGNTOK_INLINE static void run(
      const scalar_t* x, const scalar_t* y, const float* head, int64_t pixels, int64_t channels, double* sum) {
    float total = 0;
    for (int64_t pixel = 0; pixel < pixels; ++pixel, x += channels, y += channels) {
      float nx, ny, distance = 0;
      norms_of(x, y, channels, nx, ny);
      const float ix = 1 / (nx + kEpsilon), iy = 1 / (ny + kEpsilon), ratio = iy / ix;
#pragma omp simd reduction(+ : distance)
      for (int64_t c = 0; c < channels; ++c) {
        const float d = difference(widened(x[c]), widened(y[c]), ix, ratio);
        distance += head[c] * d * d;
      }
      total += distance;
    }
    *sum = total;
  }
};

// dx, and dy unless it is null; `scale` is 2 ddistance / (H W).
template <typename scalar_t>
struct Backward {
  ALIGNTOK_INLINE static void run(
      const scalar_t* x, const scalar_t* y, const float* head, float scale, scalar_t* dx, scalar_t* dy,
      int64_t pixels, int64_t channels) {
    for (int64_t pixel = 0; pixel < pixels; ++pixel, x += channels, y += channels, dx += channels) {
      float nx, ny, along_x = 0, along_y = 0;
      norms_of(x, y, channels, nx, ny);
      const float ix = 1 / (nx + kEpsilon), iy = 1 / (ny + kEpsilon), ratio = iy / ix;
#pragma omp simd reduction(+ : along_x, along_y)
      for (int64_t c = 0; c < channels; ++c) {
        const float vx = widened(x[c]), vy = widened(y[c]);
        const float g = scale * head[c] * difference(vx, vy, ix, ratio);
        along_x += g * (vx * ix);
        along_y += g * (vy * iy);
      }
      write(x, y, head, scale, ix, iy, ix * direction(nx, along_x), dx, channels);
      if (dy != nullptr) {
        write(y, x, head, scale, iy, ix, iy * direction(ny, -along_y), dy, channels);
        dy += channels;
      }
    }
  }

 private:
  // What f / |f| is multiplied with f by, times the component of g along u.
  ALIGNTOK_INLINE static float direction(float norm, float along) {
    return norm > 0 ? along / norm : 0.0f;
  }

  ALIGNTOK_INLINE static void write(
      const scalar_t* f, const scalar_t* other, const float* head, float scale, float i, float i_other, float tilt,
      scalar_t* gradient, int64_t channels) {
    const float ratio = i_other / i;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const float value = widened(f[c]);
      const float g = scale * head[c] * difference(value, widened(other[c]), i, ratio);
      gradient[c] = narrowed<scalar_t>(g * i - value * tilt);
    }
  }
};

// f where the channels of a pixel lie side by side.
Tensor channels_last(const Tensor& f) {
  return f.contiguous(at::MemoryFormat::ChannelsLast);
}

void check(const Tensor& fx, const Tensor& fy, const Tensor& head) {
  TORCH_CHECK_VALUE(
      fx.dim() == 4 && fx.numel() > 0 && fx.sizes().equals(fy.sizes()) && fx.scalar_type() == fy.scalar_type(),
      "lpips_distance: fx and fy must be [B, C, H, W] without a zero, of one shape and dtype, got ", fx.sizes(),
      " and ", fy.sizes());
  TORCH_CHECK_VALUE(
      head.dim() == 1 && head.size(0) == fx.size(1), "lpips_distance: head must be [", fx.size(1), "], got ",
      head.sizes());
}

Tensor forward_meta(const Tensor& fx, const Tensor&, const Tensor&) {
  return at::empty_symint({fx.sym_size(0)}, fx.options().dtype(at::kFloat));
}

Tensor forward_cpu(const Tensor& fx, const Tensor& fy, const Tensor& head) {
  check(fx, fy, head);
  const Tensor x = channels_last(fx), y = channels_last(fy), weights = head.to(at::kFloat).contiguous();
  const Tensor distance = forward_meta(fx, fy, head);
  const int64_t channels = x.size(1), pixels = x.size(2) * x.size(3), chunks = at::divup(pixels, kPixels);
  std::vector<double> sums(x.size(0) * chunks);
  constexpr auto name = "aligntok::lpips_distance";
  ALIGNTOK_DISPATCH(x.scalar_type(), name, [&] {
    const scalar_t *px = x.const_data_ptr<scalar_t>(), *py = y.const_data_ptr<scalar_t>();
    const float* w = weights.const_data_ptr<float>();
    const int64_t grain = at::divup(kGrain, kPixels * channels);
    at::parallel_for(0, x.size(0) * chunks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % chunks * kPixels, offset = (i / chunks * pixels + first) * channels;
        const int64_t count = std::min(kPixels, pixels - first);
        run_fastest<Forward<scalar_t>>(px + offset, py + offset, w, count, channels, &sums[i]);
      }
    });
  });
  float* result = distance.mutable_data_ptr<float>();
  for (int64_t image = 0; image < x.size(0); ++image) {
    double total = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      total += sums[image * chunks + chunk];
    }
    result[image] = static_cast<float>(total / static_cast<double>(pixels));
  }
  return distance;
}

// (dfx, dfy), the latter empty unless both are wanted.
std::tuple<Tensor, Tensor> backward_meta(
    const Tensor& fx, const Tensor& fy, const Tensor&, const Tensor&, bool both) {
  const auto format = at::MemoryFormat::ChannelsLast;
  return {
      at::empty_like(fx, fx.options(), format),
      both ? at::empty_like(fy, fy.options(), format) : at::empty({0}, fy.options())};
}

std::tuple<Tensor, Tensor> backward_cpu(
    const Tensor& fx, const Tensor& fy, const Tensor& head, const Tensor& upstream, bool both) {
  check(fx, fy, head);
  TORCH_CHECK_VALUE(
      upstream.dim() == 1 && upstream.size(0) == fx.size(0), "lpips_distance: upstream must be [", fx.size(0),
      "], got ", upstream.sizes());
  const Tensor x = channels_last(fx), y = channels_last(fy), weights = head.to(at::kFloat).contiguous();
  const Tensor up = upstream.to(at::kFloat).contiguous();
  auto gradients = backward_meta(fx, fy, head, upstream, both);
  const int64_t channels = x.size(1), pixels = x.size(2) * x.size(3), chunks = at::divup(pixels, kPixels);
  constexpr auto name = "aligntok::lpips_distance backward";
  ALIGNTOK_DISPATCH(x.scalar_type(), name, [&] {
    const scalar_t *px = x.const_data_ptr<scalar_t>(), *py = y.const_data_ptr<scalar_t>();
    scalar_t* dx = std::get<0>(gradients).mutable_data_ptr<scalar_t>();
    scalar_t* dy = both ? std::get<1>(gradients).mutable_data_ptr<scalar_t>() : nullptr;
    const float *w = weights.const_data_ptr<float>(), *scales = up.const_data_ptr<float>();
    const int64_t grain = at::divup(kGrain, kPixels * channels);
    at::parallel_for(0, x.size(0) * chunks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t image = i / chunks, first = i % chunks * kPixels;
        const int64_t offset = (image * pixels + first) * channels;
        run_fastest<Backward<scalar_t>>(
            px + offset, py + offset, w, 2 * scales[image] / static_cast<float>(pixels), dx + offset,
            both ? dy + offset : nullptr, std::min(kPixels, pixels - first), channels);
      }
    });
  });
  return gradients;
}

struct LpipsDistance : public torch::autograd::Function<LpipsDistance> {
  static Tensor forward(AutogradContext* ctx, const Tensor& fx, const Tensor& fy, const Tensor& head) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("aligntok::lpips_distance", "")
                               .typed<decltype(forward_cpu)>();
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({fx, fy, head});
    return op.call(fx, fy, head);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    refuse_second_derivative("lpips_distance");
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("aligntok::lpips_distance_backward", "")
                               .typed<decltype(backward_cpu)>();
    const auto saved = ctx->get_saved_variables();
    const bool both = ctx->needs_input_grad(1);
    auto [dfx, dfy] = op.call(saved[0], saved[1], saved[2], upstream[0], both);
    return {dfx, both ? dfy : Tensor(), Tensor()};
  }
};

Tensor lpips_distance_autograd(const Tensor& fx, const Tensor& fy, const Tensor& head) {
  return LpipsDistance::apply(fx, fy, head);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(aligntok, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("lpips_distance(Tensor fx, Tensor fy, Tensor head) -> Tensor", tags);
  m.def(
      "lpips_distance_backward(Tensor fx, Tensor fy, Tensor head, Tensor upstream, bool both)"
      " -> (Tensor dfx, Tensor dfy)", tags);
}

TORCH_LIBRARY_IMPL(aligntok, CPU, m) {
  m.impl("lpips_distance", forward_cpu);
  m.impl("lpips_distance_backward", backward_cpu);
}

TORCH_LIBRARY_IMPL(aligntok, Meta, m) {
  m.impl("lpips_distance", forward_meta);
  m.impl("lpips_distance_backward", backward_meta);
}

TORCH_LIBRARY_IMPL(aligntok, Autograd, m) {
  m.impl("lpips_distance", lpips_distance_autograd);
}
