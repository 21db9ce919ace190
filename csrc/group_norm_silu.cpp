// SiLU(GroupNorm(x)) on the CPU for x [B, C, H, W] in channels-last memory, forward and backward.
//
//   xhat = (x - mean) * rstd      mean, rstd over the C/groups channels and H*W pixels of an image's group
//   u    = weight * xhat + bias   y = u * sigmoid(u), or y = u without the activation
//   gu   = dy * y'(u)             dbias = sum gu, dweight = sum gu * xhat over images and pixels
//   dx   = rstd * (weight * gu - mean(weight * gu) - xhat * mean(weight * gu * xhat)), means over the group
//
// Memory is [B, H*W, C] with the channels innermost. A channel alone is too short a vector loop, so rows
// (pixels) are taken together until a block has kBlock elements: all per-channel values are repeated to the
// length of the block and the loops run over the block as if it were one flat array. That serves any number
// of channels.
//
// Both directions read their inputs twice: sums first, elements after. Sums run in three stages, each in
// fixed order: lanes of a block over the rows of a chunk, chunks of an image in double, images. Which thread
// takes which chunk or image has no influence, so the result has the same bits for any number of threads.
// Images are independent, so a thread finishes one before it starts the next while the image is still in the
// cache; only if there are too few of them are chunks shared out.
//
// Saved from forward to backward: x, mean, rstd. The rest is computed again. Of the two backward passes the
// first keeps gu for the second where an image is small enough for the cache; otherwise both compute it.

#include "common.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <memory>
#include <tuple>
#include <vector>

namespace {

using namespace aligntok;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Elements of a block: eight vectors of sixteen fp32 lanes. Twice as many are no faster where an image is
// large, and slower where it is small, because every chunk ends with the folding of its lanes.
constexpr int64_t kBlock = 128;
// Elements of a chunk: 32 KiB of bf16. Long against the folding of its lanes, short against an image of the
// decoder.
constexpr int64_t kChunk = 16384;
// Rows of a chunk at most. The sum of squares is taken around the chunk's first row. That row is one of the n
// values, hence n * (first - mean)^2 <= n * M2, and subtracting it amplifies rounding errors by n + 1 at
// most, whatever the data.
constexpr int64_t kChunkRows = 512;
// Elements of an image up to which gu is kept: 1 MiB of fp32, which the second-level cache of a server holds.
constexpr int64_t kKept = int64_t(1) << 18;

// NaN that exp_limited loses stays in the two functions below because u is multiplied back in.

template <bool activation, typename acc_t>
inline acc_t activated(acc_t u) {
  if constexpr (activation) {
    return u * (acc_t(1) / (acc_t(1) + exp_limited(-u)));
  }
  return u;
}

// The derivative of u * s with s = 1 / (1 + e), e = exp(-u), is s + u * s * (1 - s), where 1 - s = e * s.
template <bool activation, typename acc_t>
inline acc_t slope(acc_t u) {
  if constexpr (activation) {
    const acc_t e = exp_limited(-u);
    const acc_t s = acc_t(1) / (acc_t(1) + e);
    return s * (acc_t(1) + u * (e * s));
  }
  return acc_t(1);
}

// Per-channel values of an image, repeated to the length of a block and laid out one block after the other.
template <typename acc_t>
struct Parameters {
  static constexpr int64_t kCount = 5;
  acc_t *mean, *scale, *bias;  // u = (x - mean) * scale + bias
  acc_t *tilt, *offset;        // dx = gu * scale + (x - mean) * tilt + offset

  ALIGNTOK_INLINE Parameters(acc_t* first, int64_t block)
      : mean(first), scale(mean + block), bias(scale + block), tilt(bias + block), offset(tilt + block) {}
};

// The four passes over n elements in blocks. `sums` are two per element of a block, and are added to.

template <typename scalar_t, typename acc_t>
ALIGNTOK_INLINE void sum_moments(
    const scalar_t* x, int64_t n, int64_t block, const acc_t* pivot, acc_t* sums) {
  acc_t *first = sums, *second = sums + block;
  for (int64_t start = 0; start < n; start += block) {
    const int64_t length = std::min(block, n - start);
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
      const acc_t d = widened(x[start + i]) - pivot[i];
      first[i] += d;
      second[i] += d * d;
    }
  }
}

template <bool activation, typename scalar_t, typename acc_t>
ALIGNTOK_INLINE void write_output(
    const scalar_t* x, scalar_t* y, int64_t n, int64_t block, acc_t* parameters) {
  const Parameters<acc_t> p(parameters, block);
  for (int64_t start = 0; start < n; start += block) {
    const int64_t length = std::min(block, n - start);
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
      const acc_t u = (widened(x[start + i]) - p.mean[i]) * p.scale[i] + p.bias[i];
      y[start + i] = narrowed<scalar_t>(activated<activation>(u));
    }
  }
}

// Sums of gu and gu * (x - mean). gu itself is written to `kept` where asked for.
template <bool activation, bool keep, typename scalar_t, typename acc_t>
ALIGNTOK_INLINE void sum_gradients(
    const scalar_t* dy, const scalar_t* x, acc_t* kept, int64_t n, int64_t block, acc_t* parameters,
    acc_t* sums) {
  const Parameters<acc_t> p(parameters, block);
  acc_t *first = sums, *second = sums + block;
  for (int64_t start = 0; start < n; start += block) {
    const int64_t length = std::min(block, n - start);
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
      const acc_t centred = widened(x[start + i]) - p.mean[i];
      const acc_t u = centred * p.scale[i] + p.bias[i];
      const acc_t gu = widened(dy[start + i]) * slope<activation>(u);
      first[i] += gu;
      second[i] += gu * centred;
      if constexpr (keep) {
        kept[start + i] = gu;
      }
    }
  }
}

// From dy, or from the gu that was kept: its derivative with respect to itself is that without activation.
template <bool activation, typename gradient_t, typename scalar_t, typename acc_t>
ALIGNTOK_INLINE void write_gradient(
    const gradient_t* dy, const scalar_t* x, scalar_t* dx, int64_t n, int64_t block, acc_t* parameters) {
  const Parameters<acc_t> p(parameters, block);
  for (int64_t start = 0; start < n; start += block) {
    const int64_t length = std::min(block, n - start);
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
      const acc_t centred = widened(x[start + i]) - p.mean[i];
      const acc_t u = centred * p.scale[i] + p.bias[i];
      const acc_t gu = widened(dy[start + i]) * slope<activation>(u);
      dx[start + i] = narrowed<scalar_t>(gu * p.scale[i] + (centred * p.tilt[i] + p.offset[i]));
    }
  }
}

// The same passes compiled for several instruction sets.
template <typename s, typename a = at::opmath_type<s>>
struct Passes {
  using SumGradients =
      void (*)(const s* dy, const s* x, a* kept, int64_t n, int64_t block, a* parameters, a* sums);

  void (*sum_moments)(const s* x, int64_t n, int64_t block, const a* pivot, a* sums);
  void (*write_output)(const s* x, s* y, int64_t n, int64_t block, a* parameters);
  SumGradients sum_gradients, sum_and_keep_gradients;
  void (*write_gradient)(const s* dy, const s* x, s* dx, int64_t n, int64_t block, a* parameters);
  void (*write_gradient_from_kept)(const a* gu, const s* x, s* dx, int64_t n, int64_t block, a* parameters);
};

#define ALIGNTOK_PASSES(SUFFIX, TARGET)                                                                     \
  template <typename s, typename a>                                                                         \
  TARGET void sum_moments_##SUFFIX(const s* x, int64_t n, int64_t block, const a* pivot, a* sums) {         \
    sum_moments(x, n, block, pivot, sums);                                                                  \
  }                                                                                                         \
  template <bool activation, typename s, typename a>                                                        \
  TARGET void write_output_##SUFFIX(const s* x, s* y, int64_t n, int64_t block, a* parameters) {            \
    write_output<activation>(x, y, n, block, parameters);                                                   \
  }                                                                                                         \
  template <bool activation, bool keep, typename s, typename a>                                             \
  TARGET void sum_gradients_##SUFFIX(                                                                       \
      const s* dy, const s* x, a* kept, int64_t n, int64_t block, a* parameters, a* sums) {                 \
    sum_gradients<activation, keep>(dy, x, kept, n, block, parameters, sums);                               \
  }                                                                                                         \
  template <bool activation, typename g, typename s, typename a>                                            \
  TARGET void write_gradient_##SUFFIX(                                                                      \
      const g* dy, const s* x, s* dx, int64_t n, int64_t block, a* parameters) {                            \
    write_gradient<activation>(dy, x, dx, n, block, parameters);                                            \
  }                                                                                                         \
  template <bool activation, typename s, typename a = at::opmath_type<s>>                                   \
  Passes<s> passes_##SUFFIX() {                                                                             \
    return {                                                                                                \
        sum_moments_##SUFFIX<s, a>, write_output_##SUFFIX<activation, s, a>,                                \
        sum_gradients_##SUFFIX<activation, false, s, a>,                                                    \
        sum_gradients_##SUFFIX<activation, activation, s, a>,                                               \
        write_gradient_##SUFFIX<activation, s, s, a>, write_gradient_##SUFFIX<false, a, s, a>};             \
  }

ALIGNTOK_PASSES(default, )
#if defined(__x86_64__)
ALIGNTOK_PASSES(avx2, ALIGNTOK_AVX2)
ALIGNTOK_PASSES(avx512, ALIGNTOK_AVX512)
#endif

template <bool activation, typename scalar_t>
Passes<scalar_t> passes() {
#if defined(__x86_64__)
  switch (capability()) {
    case Capability::kAvx512:
      return passes_avx512<activation, scalar_t>();
    case Capability::kAvx2:
      return passes_avx2<activation, scalar_t>();
    default:
      break;
  }
#endif
  return passes_default<activation, scalar_t>();
}

template <typename scalar_t>
Passes<scalar_t> passes(bool activation) {
  return activation ? passes<true, scalar_t>() : passes<false, scalar_t>();
}

// How x is cut up. It depends on the shape alone.
struct Layout {
  int64_t images, pixels, channels, groups;
  int64_t block;       // elements, whole rows
  int64_t chunk_rows;  // whole blocks
  int64_t chunks;      // per image

  Layout(const Tensor& x, int64_t groups_)
      : images(x.size(0)), pixels(x.size(2) * x.size(3)), channels(x.size(1)), groups(groups_) {
    const int64_t rows = std::min(pixels, at::divup(kBlock, channels));
    block = rows * channels;
    chunk_rows = std::max<int64_t>(1, std::min(kChunkRows, kChunk / channels) / rows) * rows;
    chunks = at::divup(pixels, chunk_rows);
  }

  int64_t width() const {
    return channels / groups;
  }

  int64_t image_elements() const {
    return pixels * channels;
  }

  int64_t offset(int64_t image, int64_t chunk) const {
    return (image * pixels + chunk * chunk_rows) * channels;
  }

  int64_t rows(int64_t chunk) const {
    return std::min(chunk_rows, pixels - chunk * chunk_rows);
  }

  double group_count() const {
    return static_cast<double>(pixels) * static_cast<double>(width());
  }
};

// Partial sums (two doubles per channel for every chunk) and parameters of all images.
template <typename acc_t>
struct Workspace {
  std::vector<double> sums;
  std::vector<acc_t> parameters;
  const Layout& layout;

  explicit Workspace(const Layout& layout_)
      : sums(layout_.images * layout_.chunks * 2 * layout_.channels),
        parameters(layout_.images * Parameters<acc_t>::kCount * layout_.block),
        layout(layout_) {}

  double* sums_of(int64_t image, int64_t chunk) {
    return sums.data() + (image * layout.chunks + chunk) * 2 * layout.channels;
  }

  acc_t* parameters_of(int64_t image) {
    return parameters.data() + image * Parameters<acc_t>::kCount * layout.block;
  }
};

// sums(image, chunk, kept) for every chunk of an image, then combine(image), then
// elements(image, chunk, kept) for every chunk. `kept` is memory for as many elements as the chunk has, or
// null if not asked for; what the first writes the last can read.
template <typename acc_t, typename Sums, typename Combine, typename Elements>
void for_each_image(
    const Layout& layout, bool keep, const Sums& sums, const Combine& combine, const Elements& elements) {
  const int64_t image_elements = layout.image_elements();
  const auto memory = [&](int64_t images) {
    return std::unique_ptr<acc_t[]>(keep ? new acc_t[images * image_elements] : nullptr);
  };
  if (layout.images >= at::get_num_threads() || image_elements < kGrain) {
    at::parallel_for(0, layout.images, at::divup(kGrain, image_elements), [&](int64_t begin, int64_t end) {
      const auto kept = memory(1);
      const auto chunk_memory = [&](int64_t chunk) {
        return keep ? kept.get() + layout.offset(0, chunk) : nullptr;
      };
      for (int64_t image = begin; image < end; ++image) {
        for (int64_t chunk = 0; chunk < layout.chunks; ++chunk) {
          sums(image, chunk, chunk_memory(chunk));
        }
        combine(image);
        for (int64_t chunk = 0; chunk < layout.chunks; ++chunk) {
          elements(image, chunk, chunk_memory(chunk));
        }
      }
    });
    return;
  }
  const auto kept = memory(layout.images);
  const auto over_chunks = [&](const auto& function) {
    const int64_t grain = at::divup(kGrain, layout.chunk_rows * layout.channels);
    at::parallel_for(0, layout.images * layout.chunks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t image = i / layout.chunks, chunk = i % layout.chunks;
        function(image, chunk, keep ? kept.get() + layout.offset(image, chunk) : nullptr);
      }
    });
  };
  over_chunks(sums);
  for (int64_t image = 0; image < layout.images; ++image) {
    combine(image);
  }
  over_chunks(elements);
}

// Per channel: the sum of the block's lanes that belong to it.
template <typename acc_t>
void fold(const acc_t* lanes, const Layout& layout, double* sums) {
  std::fill_n(sums, layout.channels, 0.0);
  for (int64_t row = 0; row < layout.block; row += layout.channels) {
    for (int64_t c = 0; c < layout.channels; ++c) {
      sums[c] += static_cast<double>(lanes[row + c]);
    }
  }
}

// Repeats the first row of a block to its end.
template <typename acc_t>
void repeat(acc_t* values, const Layout& layout) {
  for (int64_t i = layout.channels; i < layout.block; ++i) {
    values[i] = values[i - layout.channels];
  }
}

template <typename acc_t>
void set_statistics(
    const Layout& layout, const acc_t* mean, const acc_t* rstd, const acc_t* weight, const acc_t* bias,
    const Parameters<acc_t>& p) {
  for (int64_t g = 0; g < layout.groups; ++g) {
    for (int64_t c = g * layout.width(); c < (g + 1) * layout.width(); ++c) {
      p.mean[c] = mean[g];
      p.scale[c] = weight[c] * rstd[g];
      p.bias[c] = bias[c];
    }
  }
  repeat(p.mean, layout);
  repeat(p.scale, layout);
  repeat(p.bias, layout);
}

// Mean and sum of squared deviations (M2) of a chunk's rows per channel: moments [2, channels].
template <typename scalar_t>
void chunk_moments(
    const Layout& layout, const Passes<scalar_t>& pass, const scalar_t* x, int64_t rows, double* moments) {
  using acc_t = at::opmath_type<scalar_t>;
  std::vector<acc_t> lanes(3 * layout.block);
  acc_t *pivot = lanes.data(), *sums = pivot + layout.block;
  std::copy_n(x, layout.channels, pivot);
  repeat(pivot, layout);
  pass.sum_moments(x, rows * layout.channels, layout.block, pivot, sums);
  double *mean = moments, *m2 = moments + layout.channels;
  fold(sums, layout, mean);
  fold(sums + layout.block, layout, m2);
  const double share = 1.0 / static_cast<double>(rows);
  for (int64_t c = 0; c < layout.channels; ++c) {
    const double shift = mean[c] * share;
    m2[c] -= mean[c] * shift;
    m2[c] = m2[c] < 0.0 ? 0.0 : m2[c];  // negative by rounding; NaN stays NaN
    mean[c] = static_cast<double>(pivot[c]) + shift;
  }
}

// Adds the moments of `rows` more rows to those of `seen` rows (Chan, Golub and LeVeque 1983, updating
// formula).
void merge_moments(int64_t channels, double seen, double rows, const double* other, double* moments) {
  const double share = rows / (seen + rows);
  for (int64_t c = 0; c < channels; ++c) {
    const double delta = other[c] - moments[c];
    moments[c] += delta * share;
    moments[channels + c] += other[channels + c] + delta * delta * seen * share;
  }
}

// Statistics of an image's groups from the moments [chunks, 2, channels], of which the first chunk's are
// overwritten.
template <typename acc_t>
void group_statistics(const Layout& layout, double* moments, double eps, acc_t* mean, acc_t* rstd) {
  const int64_t channels = layout.channels, width = layout.width();
  double seen = static_cast<double>(layout.rows(0));
  for (int64_t chunk = 1; chunk < layout.chunks; ++chunk) {
    const double rows = static_cast<double>(layout.rows(chunk));
    merge_moments(channels, seen, rows, moments + 2 * chunk * channels, moments);
    seen += rows;
  }
  for (int64_t g = 0; g < layout.groups; ++g) {
    const double *means = moments + g * width, *m2s = means + channels;
    double total = 0, m2 = 0;
    for (int64_t c = 0; c < width; ++c) {
      total += means[c];
    }
    const double centre = total / static_cast<double>(width);
    for (int64_t c = 0; c < width; ++c) {
      m2 += m2s[c] + seen * (means[c] - centre) * (means[c] - centre);
    }
    mean[g] = static_cast<acc_t>(centre);
    rstd[g] = static_cast<acc_t>(1.0 / std::sqrt(m2 / layout.group_count() + eps));
  }
}

template <typename scalar_t>
void forward_kernel(
    const Tensor& x_, const Tensor& weight_, const Tensor& bias_, double eps, bool activation,
    const Tensor& y_, const Tensor& mean_, const Tensor& rstd_) {
  using acc_t = at::opmath_type<scalar_t>;
  const Layout layout(x_, mean_.size(1));
  const Passes<scalar_t> pass = passes<scalar_t>(activation);
  const scalar_t* x = x_.const_data_ptr<scalar_t>();
  const acc_t *weight = weight_.const_data_ptr<acc_t>(), *bias = bias_.const_data_ptr<acc_t>();
  scalar_t* y = y_.mutable_data_ptr<scalar_t>();
  acc_t *mean = mean_.mutable_data_ptr<acc_t>(), *rstd = rstd_.mutable_data_ptr<acc_t>();
  Workspace<acc_t> work(layout);

  const auto sums = [&](int64_t image, int64_t chunk, acc_t*) {
    const scalar_t* first = x + layout.offset(image, chunk);
    chunk_moments(layout, pass, first, layout.rows(chunk), work.sums_of(image, chunk));
  };
  const auto combine = [&](int64_t image) {
    acc_t *m = mean + image * layout.groups, *r = rstd + image * layout.groups;
    group_statistics(layout, work.sums_of(image, 0), eps, m, r);
    set_statistics(layout, m, r, weight, bias, Parameters<acc_t>(work.parameters_of(image), layout.block));
  };
  const auto elements = [&](int64_t image, int64_t chunk, acc_t*) {
    const int64_t offset = layout.offset(image, chunk), n = layout.rows(chunk) * layout.channels;
    pass.write_output(x + offset, y + offset, n, layout.block, work.parameters_of(image));
  };
  for_each_image<acc_t>(layout, false, sums, combine, elements);
}

// Per channel the sums of gu and gu * (x - mean) over an image, [chunks, 2, channels]: the chunks in order,
// into the first.
void add_chunks(const Layout& layout, double* sums) {
  const int64_t length = 2 * layout.channels;
  for (int64_t chunk = 1; chunk < layout.chunks; ++chunk) {
    for (int64_t i = 0; i < length; ++i) {
      sums[i] += sums[chunk * length + i];
    }
  }
}

// tilt and offset from an image's sums per channel [2, channels]; the second row becomes that of gu * xhat.
template <typename acc_t>
void gradient_of_statistics(
    const Layout& layout, const acc_t* weight, const acc_t* rstd, double* sums, const Parameters<acc_t>& p) {
  const int64_t width = layout.width();
  for (int64_t g = 0; g < layout.groups; ++g) {
    const double r = static_cast<double>(rstd[g]);
    double first = 0, second = 0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      sums[layout.channels + c] *= r;
      first += static_cast<double>(weight[c]) * sums[c];
      second += static_cast<double>(weight[c]) * sums[layout.channels + c];
    }
    std::fill_n(p.tilt + g * width, width, static_cast<acc_t>(-second / layout.group_count() * r * r));
    std::fill_n(p.offset + g * width, width, static_cast<acc_t>(-first / layout.group_count() * r));
  }
  repeat(p.tilt, layout);
  repeat(p.offset, layout);
}

// dbias and dweight: the images' sums in order.
template <typename acc_t>
void add_images(const Layout& layout, Workspace<acc_t>& work, acc_t* dweight, acc_t* dbias) {
  std::vector<double> total(2 * layout.channels);
  for (int64_t image = 0; image < layout.images; ++image) {
    const double* one = work.sums_of(image, 0);
    for (size_t i = 0; i < total.size(); ++i) {
      total[i] += one[i];
    }
  }
  std::copy_n(total.data(), layout.channels, dbias);
  std::copy_n(total.data() + layout.channels, layout.channels, dweight);
}

template <typename scalar_t>
void backward_kernel(
    const Tensor& dy_, const Tensor& x_, const Tensor& weight_, const Tensor& bias_, const Tensor& mean_,
    const Tensor& rstd_, bool activation, const Tensor& dx_, const Tensor& dweight, const Tensor& dbias) {
  using acc_t = at::opmath_type<scalar_t>;
  const Layout layout(x_, mean_.size(1));
  const Passes<scalar_t> pass = passes<scalar_t>(activation);
  const int64_t block = layout.block, groups = layout.groups;
  const scalar_t *dy = dy_.const_data_ptr<scalar_t>(), *x = x_.const_data_ptr<scalar_t>();
  scalar_t* dx = dx_.mutable_data_ptr<scalar_t>();
  const acc_t *weight = weight_.const_data_ptr<acc_t>(), *bias = bias_.const_data_ptr<acc_t>();
  const acc_t *mean = mean_.const_data_ptr<acc_t>(), *rstd = rstd_.const_data_ptr<acc_t>();
  Workspace<acc_t> work(layout);
  for (int64_t image = 0; image < layout.images; ++image) {
    const Parameters<acc_t> p(work.parameters_of(image), block);
    set_statistics(layout, mean + image * groups, rstd + image * groups, weight, bias, p);
  }

  const bool keep = activation && layout.image_elements() <= kKept;
  const auto sum_gradients = keep ? pass.sum_and_keep_gradients : pass.sum_gradients;
  const auto sums = [&](int64_t image, int64_t chunk, acc_t* kept) {
    const int64_t offset = layout.offset(image, chunk), n = layout.rows(chunk) * layout.channels;
    std::vector<acc_t> lanes(2 * block);
    sum_gradients(dy + offset, x + offset, kept, n, block, work.parameters_of(image), lanes.data());
    fold(lanes.data(), layout, work.sums_of(image, chunk));
    fold(lanes.data() + block, layout, work.sums_of(image, chunk) + layout.channels);
  };
  const auto combine = [&](int64_t image) {
    add_chunks(layout, work.sums_of(image, 0));
    const Parameters<acc_t> p(work.parameters_of(image), block);
    gradient_of_statistics(layout, weight, rstd + image * groups, work.sums_of(image, 0), p);
  };
  const auto elements = [&](int64_t image, int64_t chunk, const acc_t* kept) {
    const int64_t offset = layout.offset(image, chunk), n = layout.rows(chunk) * layout.channels;
    if (keep) {
      pass.write_gradient_from_kept(kept, x + offset, dx + offset, n, block, work.parameters_of(image));
    } else {
      pass.write_gradient(dy + offset, x + offset, dx + offset, n, block, work.parameters_of(image));
    }
  };
  for_each_image<acc_t>(layout, keep, sums, combine, elements);
  add_images(layout, work, dweight.mutable_data_ptr<acc_t>(), dbias.mutable_data_ptr<acc_t>());
}

void check(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups) {
  TORCH_CHECK_VALUE(x.dim() == 4, "group_norm_silu: x must be [B, C, H, W], got ", x.sizes());
  TORCH_CHECK_VALUE(x.numel() > 0, "group_norm_silu: x has no element, got shape ", x.sizes());
  TORCH_CHECK_VALUE(
      groups > 0 && x.size(1) % groups == 0, "group_norm_silu: ", x.size(1), " channels do not divide into ",
      groups, " groups");
  TORCH_CHECK_VALUE(
      weight.dim() == 1 && weight.size(0) == x.size(1) && bias.sizes() == weight.sizes(),
      "group_norm_silu: weight and bias must be [", x.size(1), "], got ", weight.sizes(), " and ",
      bias.sizes());
}

using ForwardResult = std::tuple<Tensor, Tensor, Tensor>;
using BackwardResult = std::tuple<Tensor, Tensor, Tensor>;

ForwardResult forward_meta(const Tensor& x, const Tensor&, const Tensor&, int64_t groups, double, bool) {
  const auto options = x.options().dtype(arithmetic_type(x.scalar_type()));
  const c10::SymInt shape[] = {x.sym_size(0), groups};
  return {at::empty_like(x, x.options(), at::MemoryFormat::ChannelsLast), at::empty_symint(shape, options),
          at::empty_symint(shape, options)};
}

ForwardResult forward_cpu(
    const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups, double eps, bool activation) {
  check(x, weight, bias, groups);
  auto result = forward_meta(x, weight, bias, groups, eps, activation);
  const auto& [y, mean, rstd] = result;
  const Tensor dense = x.contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor w = weight.to(mean.scalar_type()).contiguous(), b = bias.to(mean.scalar_type()).contiguous();
  constexpr auto name = "aligntok::group_norm_silu";
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), name, [&] {
    forward_kernel<scalar_t>(dense, w, b, eps, activation, y, mean, rstd);
  });
  return result;
}

BackwardResult backward_meta(
    const Tensor&, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor&, const Tensor&,
    bool) {
  return {at::empty_like(x, x.options(), at::MemoryFormat::ChannelsLast),
          at::empty_like(weight, weight.options(), at::MemoryFormat::Contiguous),
          at::empty_like(bias, bias.options(), at::MemoryFormat::Contiguous)};
}

BackwardResult backward_cpu(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
    const Tensor& rstd, bool activation) {
  TORCH_CHECK_VALUE(
      mean.dim() == 2 && mean.size(0) == x.size(0) && rstd.sizes() == mean.sizes(),
      "group_norm_silu: mean and rstd must be [B, groups], got ", mean.sizes(), " and ", rstd.sizes());
  check(x, weight, bias, mean.size(1));
  TORCH_CHECK_VALUE(
      dy.sizes() == x.sizes() && dy.scalar_type() == x.scalar_type(),
      "group_norm_silu: dy and x differ in shape or dtype");
  const at::ScalarType type = arithmetic_type(x.scalar_type());
  const auto channels_last = at::MemoryFormat::ChannelsLast;
  const Tensor w = weight.to(type).contiguous(), b = bias.to(type).contiguous();
  const Tensor dx = at::empty_like(x, x.options(), channels_last);
  const Tensor dweight = at::empty({x.size(1)}, w.options()), dbias = at::empty({x.size(1)}, w.options());
  constexpr auto name = "aligntok::group_norm_silu backward";
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), name, [&] {
    backward_kernel<scalar_t>(
        dy.contiguous(channels_last), x.contiguous(channels_last), w, b, mean.contiguous(), rstd.contiguous(),
        activation, dx, dweight, dbias);
  });
  return {dx, dweight.to(weight.scalar_type()), dbias.to(bias.scalar_type())};
}

ForwardResult call_forward(
    const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups, double eps, bool activation) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("aligntok::group_norm_silu_forward", "")
                             .typed<decltype(forward_cpu)>();
  return op.call(x, weight, bias, groups, eps, activation);
}

BackwardResult call_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
    const Tensor& rstd, bool activation) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("aligntok::group_norm_silu_backward", "")
                             .typed<decltype(backward_cpu)>();
  return op.call(dy, x, weight, bias, mean, rstd, activation);
}

struct GroupNormSilu : public torch::autograd::Function<GroupNormSilu> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups,
      double eps, bool activation) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, mean, rstd] = call_forward(x, weight, bias, groups, eps, activation);
    ctx->save_for_backward({x, weight, bias, mean, rstd});
    ctx->saved_data["activation"] = activation;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    refuse_second_derivative("group_norm_silu");
    const auto saved = ctx->get_saved_variables();
    auto [dx, dweight, dbias] = call_backward(
        upstream[0], saved[0], saved[1], saved[2], saved[3], saved[4],
        ctx->saved_data["activation"].toBool());
    return {dx, dweight, dbias, Tensor(), Tensor(), Tensor()};
  }
};

Tensor group_norm_silu_no_grad(
    const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups, double eps, bool activation) {
  return std::get<0>(call_forward(x, weight, bias, groups, eps, activation));
}

Tensor group_norm_silu_autograd(
    const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups, double eps, bool activation) {
  if (!at::GradMode::is_enabled() || !(x.requires_grad() || weight.requires_grad() || bias.requires_grad())) {
    at::AutoDispatchBelowADInplaceOrView below;
    return group_norm_silu_no_grad(x, weight, bias, groups, eps, activation);
  }
  return GroupNormSilu::apply(x, weight, bias, groups, eps, activation);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(aligntok, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool activation)"
      " -> Tensor", tags);
  m.def(
      "group_norm_silu_forward(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool activation)"
      " -> (Tensor y, Tensor mean, Tensor rstd)", tags);
  m.def(
      "group_norm_silu_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd,"
      " bool activation) -> (Tensor dx, Tensor dweight, Tensor dbias)", tags);
}

TORCH_LIBRARY_IMPL(aligntok, CPU, m) {
  m.impl("group_norm_silu_forward", forward_cpu);
  m.impl("group_norm_silu_backward", backward_cpu);
}

TORCH_LIBRARY_IMPL(aligntok, Meta, m) {
  m.impl("group_norm_silu_forward", forward_meta);
  m.impl("group_norm_silu_backward", backward_meta);
}

TORCH_LIBRARY_IMPL(aligntok, CompositeExplicitAutograd, m) {
  m.impl("group_norm_silu", group_norm_silu_no_grad);
}

TORCH_LIBRARY_IMPL(aligntok, Autograd, m) {
  m.impl("group_norm_silu", group_norm_silu_autograd);
}
