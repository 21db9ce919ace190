// silu(gate) * value on the CPU for rows of packed [..., 2H] = (gate, value), forward and backward.
//
//   y      = gate * s * value                        s = 1 / (1 + e), e = exp(-gate)
//   dgate  = dy * value * s * (1 + gate * (1 - s))   1 - s = e * s
//   dvalue = dy * gate * s
//
// One pass each: forward reads packed and writes y, backward reads packed and dy and writes the packed
// gradient. Saved from forward to backward: packed alone. Every element is independent, so the result has the
// same bits for any number of threads.

#include "common.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <vector>

namespace {

using namespace aligntok;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// NaN that exp_limited loses stays in both loops because the gate is multiplied back in.

template <typename scalar_t>
struct Forward {
  ALIGNTOK_INLINE static void run(
      const scalar_t* packed, int64_t stride, scalar_t* y, int64_t rows, int64_t half) {
    using acc_t = at::opmath_type<scalar_t>;
    for (int64_t row = 0; row < rows; ++row, packed += stride, y += half) {
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        const acc_t gate = widened(packed[i]);
        const acc_t s = acc_t(1) / (acc_t(1) + exp_limited(-gate));
        y[i] = narrowed<scalar_t>(gate * s * widened(packed[half + i]));
      }
    }
  }
};

template <typename scalar_t>
struct Backward {
  ALIGNTOK_INLINE static void run(
      const scalar_t* packed, int64_t stride, const scalar_t* dy, int64_t dy_stride, scalar_t* gradient,
      int64_t rows, int64_t half) {
    using acc_t = at::opmath_type<scalar_t>;
    for (int64_t row = 0; row < rows; ++row, packed += stride, dy += dy_stride, gradient += 2 * half) {
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        const acc_t gate = widened(packed[i]), upstream = widened(dy[i]);
        const acc_t e = exp_limited(-gate);
        const acc_t s = acc_t(1) / (acc_t(1) + e);
        const acc_t slope = s * (acc_t(1) + gate * (e * s));
        gradient[i] = narrowed<scalar_t>(upstream * widened(packed[half + i]) * slope);
        gradient[half + i] = narrowed<scalar_t>(upstream * (gate * s));
      }
    }
  }
};

// [..., n] as rows with contiguous elements, copied where the strides do not allow that.
Tensor rows_of(const Tensor& tensor) {
  return with_dense_rows(tensor.reshape({-1, tensor.size(-1)}));
}

void check(const Tensor& packed) {
  TORCH_CHECK_VALUE(
      packed.dim() > 0 && packed.size(-1) % 2 == 0 && packed.numel() > 0,
      "swiglu: packed must be [..., 2H] without a zero, got ", packed.sizes());
}

Tensor forward_meta(const Tensor& packed) {
  std::vector<c10::SymInt> shape = packed.sym_sizes().vec();
  shape.back() = shape.back() / 2;
  return at::empty_symint(shape, packed.options());
}

Tensor forward_cpu(const Tensor& packed) {
  check(packed);
  const Tensor y = forward_meta(packed), rows = rows_of(packed);
  const int64_t half = y.size(-1), stride = rows.stride(0);
  constexpr auto name = "aligntok::swiglu";
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, packed.scalar_type(), name, [&] {
    const scalar_t* source = rows.const_data_ptr<scalar_t>();
    scalar_t* target = y.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, rows.size(0), at::divup(kGrain, half), [&](int64_t begin, int64_t end) {
      run_fastest<Forward<scalar_t>>(
          source + begin * stride, stride, target + begin * half, end - begin, half);
    });
  });
  return y;
}

Tensor backward_meta(const Tensor& packed, const Tensor&) {
  return at::empty_like(packed, packed.options(), at::MemoryFormat::Contiguous);
}

Tensor backward_cpu(const Tensor& packed, const Tensor& dy) {
  check(packed);
  TORCH_CHECK_VALUE(
      dy.sizes().equals(forward_meta(packed).sizes()) && dy.scalar_type() == packed.scalar_type(),
      "swiglu: dy does not fit packed in shape or dtype");
  const Tensor gradient = backward_meta(packed, dy), rows = rows_of(packed), upstream = rows_of(dy);
  const int64_t half = dy.size(-1), stride = rows.stride(0), dy_stride = upstream.stride(0);
  constexpr auto name = "aligntok::swiglu backward";
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, packed.scalar_type(), name, [&] {
    const scalar_t *source = rows.const_data_ptr<scalar_t>(), *up = upstream.const_data_ptr<scalar_t>();
    scalar_t* target = gradient.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, rows.size(0), at::divup(kGrain, half), [&](int64_t begin, int64_t end) {
      run_fastest<Backward<scalar_t>>(
          source + begin * stride, stride, up + begin * dy_stride, dy_stride, target + begin * 2 * half,
          end - begin, half);
    });
  });
  return gradient;
}

struct SwiGLU : public torch::autograd::Function<SwiGLU> {
  static Tensor forward(AutogradContext* ctx, const Tensor& packed) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("aligntok::swiglu", "")
                               .typed<decltype(forward_cpu)>();
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({packed});
    return op.call(packed);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    refuse_second_derivative("swiglu");
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("aligntok::swiglu_backward", "")
                               .typed<decltype(backward_cpu)>();
    return {op.call(ctx->get_saved_variables()[0], upstream[0])};
  }
};

Tensor swiglu_autograd(const Tensor& packed) {
  return SwiGLU::apply(packed);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(aligntok, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("swiglu(Tensor packed) -> Tensor", tags);
  m.def("swiglu_backward(Tensor packed, Tensor dy) -> Tensor", tags);
}

TORCH_LIBRARY_IMPL(aligntok, CPU, m) {
  m.impl("swiglu", forward_cpu);
  m.impl("swiglu_backward", backward_cpu);
}

TORCH_LIBRARY_IMPL(aligntok, Meta, m) {
  m.impl("swiglu", forward_meta);
  m.impl("swiglu_backward", backward_meta);
}

TORCH_LIBRARY_IMPL(aligntok, Autograd, m) {
  m.impl("swiglu", swiglu_autograd);
}
