// Gated residual, RMSNorm and modulation on the CPU for x [B, N, D], forward and backward.
//
//   x_new = x + gate * h                   rounded to x's type; x itself where there is no h
//   n     = x_new * r                      r = 1 / sqrt(mean(x_new^2) + eps) of a row
//   y     = n * f + shift                  f = weight * (1 + scale), one vector per image
//   dx    = dx_new + r * (dy * f - n * mean(dy * f * n)),   dh = gate * dx,   dgate = sum dx * h
//   dshift = sum dy,   dscale = weight * A,   dweight = sum (1 + scale) * A over images,   A = sum dy * n
//
// where sums run over the N rows of an image. Both directions go through memory once: what a row's second
// loop reads again is still in the first-level cache. Saved from forward to backward: x_new, r, h and the
// vectors.
//
// The sums over rows have two stages, each in fixed order: the rows of a chunk in fp32, the chunks of an
// image. Which thread takes which chunk has no influence, so the result has the same bits for any number of
// threads.
//
// x has one type, h and y (and their gradients) share another. Only pairs that training uses are compiled:
// other combinations go through fp32, which holds all of them exactly, and are rounded afterwards.

#include "common.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

namespace {

using namespace aligntok;
using at::Tensor;
using std::optional;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Rows of a chunk: its partial sums (12 bytes a column) are small against the rows themselves.
constexpr int64_t kChunkRows = 64;

struct Layout {
  int64_t images, rows, width;
  int64_t chunks;  // per image

  explicit Layout(const Tensor& x)
      : images(x.size(0)), rows(x.size(1)), width(x.size(2)), chunks(at::divup(rows, kChunkRows)) {}

  // body(image, chunk, first row, row after the last) for every chunk of every image.
  template <typename Body>
  void for_each_chunk(const Body& body) const {
    const int64_t grain = at::divup(kGrain, std::min(rows, kChunkRows) * width);
    at::parallel_for(0, images * chunks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % chunks * kChunkRows;
        body(i / chunks, i % chunks, first, std::min(first + kChunkRows, rows));
      }
    });
  }
};

// A tensor [B, N, D] whose rows are contiguous, converted to scalar_t; or none.
template <typename scalar_t>
struct Rows {
  Tensor tensor;
  const scalar_t* data = nullptr;
  int64_t image_stride = 0, row_stride = 0;

  explicit Rows(const optional<Tensor>& source) {
    if (source) {
      tensor = with_dense_rows(source->to(c10::CppTypeToScalarType<scalar_t>::value));
      data = tensor.const_data_ptr<scalar_t>();
      image_stride = tensor.stride(0), row_stride = tensor.stride(1);
    }
  }

  const scalar_t* row(int64_t image, int64_t n) const {
    return data + image * image_stride + n * row_stride;
  }
};

// A tensor [B, D], or [D] for all images, in fp32; or none, which stands for `absent` everywhere.
struct Vectors {
  Tensor tensor;
  std::vector<float> constant;
  int64_t stride;

  Vectors(const optional<Tensor>& source, int64_t width, float absent)
      : stride(source && source->dim() == 2 ? width : 0) {
    if (source) {
      tensor = source->to(at::kFloat).contiguous();
    } else {
      constant.assign(width, absent);
    }
  }

  const float* of(int64_t image) const {
    return tensor.defined() ? tensor.const_data_ptr<float>() + image * stride : constant.data();
  }
};

// f of an image.
std::vector<float> factors(const float* weight, const float* scale, int64_t width) {
  std::vector<float> result(width);
  for (int64_t d = 0; d < width; ++d) {
    result[d] = weight[d] * (1.0f + scale[d]);
  }
  return result;
}

// The passes over a chunk of rows. Pointers are to its first row, outputs are dense.

template <typename stream_t, typename branch_t>
struct ForwardChunk {
  const stream_t* x;
  const branch_t* h;  // null: no residual, x_new and gate are null as well
  stream_t* x_new;
  branch_t* y;
  float* rstd;
  int64_t x_stride, h_stride;
  const float *gate, *factor, *shift;
  int64_t rows, width;
  float eps;

  ALIGNTOK_INLINE static void run(ForwardChunk c) {
    const int64_t width = c.width;
    for (int64_t row = 0; row < c.rows; ++row, c.x += c.x_stride, c.y += width) {
      const stream_t* x = c.x;
      float sum = 0;
      if (c.h) {
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < width; ++d) {
          const stream_t rounded = narrowed<stream_t>(widened(x[d]) + c.gate[d] * widened(c.h[d]));
          c.x_new[d] = rounded;
          sum += widened(rounded) * widened(rounded);
        }
        x = c.x_new;
        c.x_new += width, c.h += c.h_stride;
      } else {
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < width; ++d) {
          sum += widened(x[d]) * widened(x[d]);
        }
      }
      const float r = 1.0f / std::sqrt(sum / static_cast<float>(width) + c.eps);
      c.rstd[row] = r;
#pragma omp simd
      for (int64_t d = 0; d < width; ++d) {
        c.y[d] = narrowed<branch_t>(widened(x[d]) * r * c.factor[d] + c.shift[d]);
      }
    }
  }
};

template <typename stream_t, typename branch_t>
struct BackwardChunk {
  const stream_t *dx_new, *x_new;  // dx_new is null where h is
  const branch_t *dy, *h;          // h null: no residual
  const float* rstd;
  stream_t* dx;
  branch_t* dh;
  int64_t dx_new_stride, x_new_stride, dy_stride, h_stride;
  const float *gate, *factor;
  float *normed, *shift, *gated;  // sums over the rows of dy * n, dy, dx * h, added to
  int64_t rows, width;

  ALIGNTOK_INLINE static void run(BackwardChunk c) {
    const int64_t width = c.width;
    for (int64_t row = 0; row < c.rows; ++row) {
      const float r = c.rstd[row];
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t d = 0; d < width; ++d) {
        const float upstream = widened(c.dy[d]);
        const float product = upstream * (widened(c.x_new[d]) * r);
        c.normed[d] += product;
        c.shift[d] += upstream;
        sum += product * c.factor[d];
      }
      const float mean = sum / static_cast<float>(width);
      if (c.h) {
#pragma omp simd
        for (int64_t d = 0; d < width; ++d) {
          const float n = widened(c.x_new[d]) * r;
          const float dx = widened(c.dx_new[d]) + r * (widened(c.dy[d]) * c.factor[d] - n * mean);
          c.dx[d] = narrowed<stream_t>(dx);
          c.dh[d] = narrowed<branch_t>(dx * c.gate[d]);
          c.gated[d] += dx * widened(c.h[d]);
        }
        c.dx_new += c.dx_new_stride, c.h += c.h_stride, c.dh += width;
      } else {
#pragma omp simd
        for (int64_t d = 0; d < width; ++d) {
          const float n = widened(c.x_new[d]) * r;
          c.dx[d] = narrowed<stream_t>(r * (widened(c.dy[d]) * c.factor[d] - n * mean));
        }
      }
      c.x_new += c.x_new_stride, c.dy += c.dy_stride, c.dx += width;
    }
  }
};

// The type that h and y are computed in, given x's and those that are wanted.
at::ScalarType branch_type(at::ScalarType stream, const optional<Tensor>& h, at::ScalarType y) {
  const bool equal = !h || h->scalar_type() == y;
  return equal && (stream == at::kFloat || stream == y) ? y : at::kFloat;
}

// function(stream_t(), branch_t()) for the pairs that branch_type leaves.
template <typename Function>
void with_types(at::ScalarType stream, at::ScalarType branch, const Function& function) {
  if (stream == at::kBFloat16) {
    return branch == stream ? function(at::BFloat16(), at::BFloat16()) : function(at::BFloat16(), float());
  }
  if (stream == at::kHalf) {
    return branch == stream ? function(at::Half(), at::Half()) : function(at::Half(), float());
  }
  if (branch == at::kFloat) {
    return function(float(), float());
  }
  return branch == at::kBFloat16 ? function(float(), at::BFloat16()) : function(float(), at::Half());
}

template <typename stream_t, typename branch_t>
void forward_kernel(
    const Tensor& x_, const optional<Tensor>& h_, const optional<Tensor>& gate_, const Tensor& scale_,
    const optional<Tensor>& shift_, const optional<Tensor>& weight_, double eps, const Tensor& x_new,
    const Tensor& y, const Tensor& rstd) {
  const Layout layout(x_);
  const int64_t width = layout.width;
  const Rows<stream_t> x(x_);
  const Rows<branch_t> h(h_);
  const Vectors gate(gate_, width, 0), scale(scale_, width, 0), shift(shift_, width, 0);
  const Vectors weight(weight_, width, 1);
  stream_t* x_new_data = h_ ? x_new.mutable_data_ptr<stream_t>() : nullptr;
  branch_t* y_data = y.mutable_data_ptr<branch_t>();
  float* rstd_data = rstd.mutable_data_ptr<float>();
  layout.for_each_chunk([&](int64_t image, int64_t, int64_t first, int64_t last) {
    const auto factor = factors(weight.of(image), scale.of(image), width);
    const int64_t token = image * layout.rows + first;
    run_fastest<ForwardChunk<stream_t, branch_t>>(ForwardChunk<stream_t, branch_t>{
        x.row(image, first), h_ ? h.row(image, first) : nullptr, h_ ? x_new_data + token * width : nullptr,
        y_data + token * width, rstd_data + token, x.row_stride, h.row_stride, gate.of(image), factor.data(),
        shift.of(image), last - first, width, static_cast<float>(eps)});
  });
}

// The sums of a chunk [3, D]: of dy * n, dy and dx * h.
constexpr int64_t kSums = 3;

// Per image the sums of its chunks in order, into those of the first: sums [B, chunks, 3, D].
void add_chunks(const Layout& layout, float* sums) {
  const int64_t length = kSums * layout.width;
  const int64_t grain = at::divup(kGrain, layout.chunks * length);
  at::parallel_for(0, layout.images, grain, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      float* total = sums + image * layout.chunks * length;
      for (int64_t chunk = 1; chunk < layout.chunks; ++chunk) {
        for (int64_t i = 0; i < length; ++i) {
          total[i] += total[chunk * length + i];
        }
      }
    }
  });
}

// Gradients of the vectors in fp32: those of images from their sums, dweight over the images in order.
struct VectorGradients {
  Tensor dgate, dscale, dshift, dweight;

  VectorGradients(const Layout& layout, const float* sums, const Vectors& scale, const Vectors& weight) {
    const int64_t width = layout.width;
    const auto options = at::TensorOptions().dtype(at::kFloat);
    for (Tensor* gradient : {&dgate, &dscale, &dshift}) {
      *gradient = at::empty({layout.images, width}, options);
    }
    dweight = at::zeros({width}, options);
    float *scale_data = dscale.mutable_data_ptr<float>(), *weight_data = dweight.mutable_data_ptr<float>();
    for (int64_t image = 0; image < layout.images; ++image) {
      const float* normed = sums + image * layout.chunks * kSums * width;
      const float *s = scale.of(image), *w = weight.of(image);
      for (int64_t d = 0; d < width; ++d) {
        scale_data[image * width + d] = normed[d] * w[d];
        weight_data[d] += normed[d] * (1.0f + s[d]);
      }
      std::copy_n(normed + width, width, dshift.mutable_data_ptr<float>() + image * width);
      std::copy_n(normed + 2 * width, width, dgate.mutable_data_ptr<float>() + image * width);
    }
  }
};

template <typename stream_t, typename branch_t>
VectorGradients backward_kernel(
    const optional<Tensor>& dx_new_, const Tensor& dy_, const Tensor& x_new_, const Tensor& rstd,
    const optional<Tensor>& h_, const optional<Tensor>& gate_, const Tensor& scale_,
    const optional<Tensor>& weight_, const Tensor& dx, const Tensor& dh) {
  const Layout layout(x_new_);
  const int64_t width = layout.width;
  const Rows<stream_t> dx_new(dx_new_), x_new(x_new_);
  const Rows<branch_t> dy(dy_), h(h_);
  const Vectors gate(gate_, width, 0), scale(scale_, width, 0), weight(weight_, width, 1);
  const float* rstd_data = rstd.const_data_ptr<float>();
  stream_t* dx_data = dx.mutable_data_ptr<stream_t>();
  branch_t* dh_data = h_ ? dh.mutable_data_ptr<branch_t>() : nullptr;
  std::vector<float> sums(layout.images * layout.chunks * kSums * width);
  layout.for_each_chunk([&](int64_t image, int64_t chunk, int64_t first, int64_t last) {
    const auto factor = factors(weight.of(image), scale.of(image), width);
    const int64_t token = image * layout.rows + first;
    float* partial = sums.data() + (image * layout.chunks + chunk) * kSums * width;
    run_fastest<BackwardChunk<stream_t, branch_t>>(BackwardChunk<stream_t, branch_t>{
        h_ ? dx_new.row(image, first) : nullptr, x_new.row(image, first), dy.row(image, first),
        h_ ? h.row(image, first) : nullptr, rstd_data + token, dx_data + token * width,
        h_ ? dh_data + token * width : nullptr, dx_new.row_stride, x_new.row_stride, dy.row_stride,
        h.row_stride, gate.of(image), factor.data(), partial, partial + width, partial + 2 * width,
        last - first, width});
  });
  add_chunks(layout, sums.data());
  return VectorGradients(layout, sums.data(), scale, weight);
}

void check(
    const Tensor& x, const optional<Tensor>& h, const optional<Tensor>& gate, const Tensor& scale,
    const optional<Tensor>& shift, const optional<Tensor>& weight) {
  TORCH_CHECK_VALUE(
      x.dim() == 3 && x.numel() > 0, "adaln: x must be [B, N, D] without a zero, got ", x.sizes());
  TORCH_CHECK_VALUE(h.has_value() == gate.has_value(), "adaln: h and gate are given together or not at all");
  TORCH_CHECK_VALUE(!h || h->sizes() == x.sizes(), "adaln: h and x differ in shape");
  const int64_t vector[] = {x.size(0), x.size(2)};
  for (const Tensor* one : {&scale, shift ? &*shift : nullptr, gate ? &*gate : nullptr}) {
    TORCH_CHECK_VALUE(
        !one || one->sizes().equals(vector), "adaln: scale, shift and gate must be [B, D] = ",
        at::IntArrayRef(vector));
  }
  TORCH_CHECK_VALUE(
      !weight || (weight->dim() == 1 && weight->size(0) == x.size(2)), "adaln: weight must be [D]");
}

void check_type(at::ScalarType type) {
  TORCH_CHECK_VALUE(
      type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
      "adaln: the C++ implementation has no ", type);
}

// Like `source` and contiguous, or without elements where there is none.
Tensor empty_for(const optional<Tensor>& source, const Tensor& x) {
  return source ? at::empty_like(*source, source->options(), at::MemoryFormat::Contiguous)
                : at::empty({0}, x.options());
}

using ForwardResult = std::tuple<Tensor, Tensor, Tensor>;
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

ForwardResult forward_meta(
    const Tensor& x, const optional<Tensor>& h, const optional<Tensor>&, const Tensor&,
    const optional<Tensor>&, const optional<Tensor>&, double, at::ScalarType dtype) {
  const c10::SymInt rows[] = {x.sym_size(0), x.sym_size(1)};
  const auto contiguous = at::MemoryFormat::Contiguous;
  return {h ? at::empty_like(x, x.options(), contiguous) : at::empty({0}, x.options()),
          at::empty_like(x, x.options().dtype(dtype), contiguous),
          at::empty_symint(rows, x.options().dtype(at::kFloat))};
}

ForwardResult forward_cpu(
    const Tensor& x, const optional<Tensor>& h, const optional<Tensor>& gate, const Tensor& scale,
    const optional<Tensor>& shift, const optional<Tensor>& weight, double eps, at::ScalarType dtype) {
  check(x, h, gate, scale, shift, weight);
  for (const at::ScalarType type : {x.scalar_type(), dtype, h ? h->scalar_type() : dtype}) {
    check_type(type);
  }
  const at::ScalarType branch = branch_type(x.scalar_type(), h, dtype);
  auto [x_new, y, rstd] = forward_meta(x, h, gate, scale, shift, weight, eps, branch);
  with_types(x.scalar_type(), branch, [&](auto s, auto b) {
    forward_kernel<decltype(s), decltype(b)>(x, h, gate, scale, shift, weight, eps, x_new, y, rstd);
  });
  return {x_new, y.to(dtype), rstd};
}

BackwardResult backward_meta(
    const optional<Tensor>&, const Tensor&, const Tensor& x_new, const Tensor&, const optional<Tensor>& h,
    const optional<Tensor>& gate, const Tensor& scale, const optional<Tensor>& shift,
    const optional<Tensor>& weight) {
  return {empty_for(x_new, x_new), empty_for(h, x_new),     empty_for(gate, x_new),
          empty_for(scale, x_new), empty_for(shift, x_new), empty_for(weight, x_new)};
}

BackwardResult backward_cpu(
    const optional<Tensor>& dx_new, const Tensor& dy, const Tensor& x_new, const Tensor& rstd,
    const optional<Tensor>& h, const optional<Tensor>& gate, const Tensor& scale,
    const optional<Tensor>& shift, const optional<Tensor>& weight) {
  check(x_new, h, gate, scale, shift, weight);
  TORCH_CHECK_VALUE(
      dy.sizes() == x_new.sizes() && dx_new.has_value() == h.has_value() &&
          (!dx_new || dx_new->sizes() == x_new.sizes()) && rstd.scalar_type() == at::kFloat &&
          rstd.numel() == x_new.size(0) * x_new.size(1),
      "adaln: the gradients or rstd do not fit x_new [B, N, D]; dx_new is given if and only if h is");
  const at::ScalarType y = dy.scalar_type();
  for (const at::ScalarType type : {x_new.scalar_type(), y, h ? h->scalar_type() : y}) {
    check_type(type);
  }
  const at::ScalarType branch = branch_type(x_new.scalar_type(), h, y);
  const Tensor dx = empty_for(x_new, x_new);
  const Tensor dh = h ? at::empty(h->sizes(), h->options().dtype(branch)) : at::empty({0}, x_new.options());
  optional<VectorGradients> vectors;
  with_types(x_new.scalar_type(), branch, [&](auto s, auto b) {
    vectors = backward_kernel<decltype(s), decltype(b)>(
        dx_new, dy, x_new, rstd.contiguous(), h, gate, scale, weight, dx, dh);
  });
  const auto like = [&](const Tensor& gradient, const optional<Tensor>& source) {
    return source ? gradient.to(source->scalar_type()) : at::empty({0}, x_new.options());
  };
  return {dx, like(dh, h), like(vectors->dgate, gate), like(vectors->dscale, scale),
          like(vectors->dshift, shift), like(vectors->dweight, weight)};
}

optional<Tensor> present(const Tensor& tensor) {
  return tensor.defined() ? optional<Tensor>(tensor) : std::nullopt;
}

struct AdaLN : public torch::autograd::Function<AdaLN> {
  static variable_list forward(
      AutogradContext* ctx, const Tensor& x, const optional<Tensor>& h, const optional<Tensor>& gate,
      const Tensor& scale, const optional<Tensor>& shift, const optional<Tensor>& weight, double eps,
      at::ScalarType dtype) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("aligntok::adaln", "")
                               .typed<decltype(forward_cpu)>();
    at::AutoDispatchBelowADInplaceOrView below;
    auto [x_new, y, rstd] = op.call(x, h, gate, scale, shift, weight, eps, dtype);
    const auto saved = [](const optional<Tensor>& tensor) { return tensor.value_or(Tensor()); };
    ctx->save_for_backward(
        {h ? x_new : x, rstd, saved(h), saved(gate), scale, saved(shift), saved(weight)});
    ctx->mark_non_differentiable(h ? variable_list{rstd} : variable_list{x_new, rstd});
    return {x_new, y, rstd};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    refuse_second_derivative("adaln");
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("aligntok::adaln_backward", "")
                               .typed<decltype(backward_cpu)>();
    const auto saved = ctx->get_saved_variables();
    const optional<Tensor> h = present(saved[2]), gate = present(saved[3]), shift = present(saved[5]),
                           weight = present(saved[6]);
    const auto dx_new = h ? optional<Tensor>(upstream[0]) : std::nullopt;
    auto [dx, dh, dgate, dscale, dshift, dweight] =
        op.call(dx_new, upstream[1], saved[0], saved[1], h, gate, saved[4], shift, weight);
    return {dx, h ? dh : Tensor(), gate ? dgate : Tensor(), dscale, shift ? dshift : Tensor(),
            weight ? dweight : Tensor(), Tensor(), Tensor()};
  }
};

ForwardResult adaln_autograd(
    const Tensor& x, const optional<Tensor>& h, const optional<Tensor>& gate, const Tensor& scale,
    const optional<Tensor>& shift, const optional<Tensor>& weight, double eps, at::ScalarType dtype) {
  auto result = AdaLN::apply(x, h, gate, scale, shift, weight, eps, dtype);
  return {result[0], result[1], result[2]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(aligntok, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "adaln(Tensor x, Tensor? h, Tensor? gate, Tensor scale, Tensor? shift, Tensor? weight, float eps,"
      " ScalarType dtype) -> (Tensor x_new, Tensor y, Tensor rstd)", tags);
  m.def(
      "adaln_backward(Tensor? dx_new, Tensor dy, Tensor x_new, Tensor rstd, Tensor? h, Tensor? gate,"
      " Tensor scale, Tensor? shift, Tensor? weight)"
      " -> (Tensor dx, Tensor dh, Tensor dgate, Tensor dscale, Tensor dshift, Tensor dweight)", tags);
}

TORCH_LIBRARY_IMPL(aligntok, CPU, m) {
  m.impl("adaln", forward_cpu);
  m.impl("adaln_backward", backward_cpu);
}

TORCH_LIBRARY_IMPL(aligntok, Meta, m) {
  m.impl("adaln", forward_meta);
  m.impl("adaln_backward", backward_meta);
}

TORCH_LIBRARY_IMPL(aligntok, Autograd, m) {
  m.impl("adaln", adaln_autograd);
}
