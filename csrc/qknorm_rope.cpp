// QK-norm and rotary positions on the CPU from packed qkv [B, N, 3, H, D] to q, k, v [B, N, H, D], forward
// and backward. For every head of q and of k,
//
//   u = x * r * weight        r = 1 / sqrt(mean(x^2) + eps); u = x without weights
//   out[2i]     = u[2i] * cos[2i] - u[2i + 1] * sin[2i]
//   out[2i + 1] = u[2i + 1] * cos[2i + 1] + u[2i] * sin[2i + 1]          out = u without tables
//
//   t  = the transposed rotation of dout
//   dx = r * (t * weight - x * r * mean(t * weight * x * r)),   dweight = sum t * x * r
//
// and v is copied. One pass each: backward reads dq, dk, dv and q and k again (nothing of qkv without a
// norm) and writes the packed gradient. r is computed again: q and k are read anyhow.
//
// dweight is summed in two stages, each in fixed order: the heads of a chunk of tokens, then chunks in
// double. Which thread takes which chunk has no influence, so the result has the same bits for any number of
// threads.

#include "common.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
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

// Tokens of a chunk: long against its two sums per channel.
constexpr int64_t kChunkTokens = 64;

// Heads [B, N, H, D] with contiguous elements.
template <typename pointer_t>
struct Heads {
  pointer_t data;
  int64_t image_stride, token_stride, head_stride;
};

template <typename acc_t>
struct Constants {
  const acc_t *weight[2], *cos, *sin;  // weights of q and k; null: no norm, no rotation
  int64_t tokens, heads, width;        // N, H, D
  acc_t eps;
};

template <typename acc_t, typename scalar_t>
ALIGNTOK_INLINE acc_t reciprocal_rms(const scalar_t* x, int64_t width, acc_t eps) {
  acc_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < width; ++d) {
    sum += widened(x[d]) * widened(x[d]);
  }
  return acc_t(1) / std::sqrt(sum / static_cast<acc_t>(width) + eps);
}

// Tokens begin to end of the batch. `u` is memory for a head.
template <typename scalar_t, typename acc_t = at::opmath_type<scalar_t>>
struct Forward {
  using Input = Heads<const scalar_t*>;
  Input x[3];
  scalar_t* out[3];  // dense [B, H, N, D]

  ALIGNTOK_INLINE static void run(Forward f, Constants<acc_t> c, acc_t* u, int64_t begin, int64_t end) {
    const int64_t width = c.width;
    for (int64_t token = begin; token < end; ++token) {
      const int64_t image = token / c.tokens, n = token % c.tokens;
      for (int part = 0; part < 3; ++part) {
        const scalar_t* x = f.x[part].data + image * f.x[part].image_stride + n * f.x[part].token_stride;
        scalar_t* out = f.out[part] + (image * c.heads * c.tokens + n) * width;
        for (int64_t head = 0; head < c.heads; ++head, x += f.x[part].head_stride, out += c.tokens * width) {
          if (part == 2) {
            std::copy_n(x, width, out);
          } else {
            transform(x, out, c.weight[part], c, n, u);
          }
        }
      }
    }
  }

  ALIGNTOK_INLINE static void transform(
      const scalar_t* x, scalar_t* out, const acc_t* weight, const Constants<acc_t>& c, int64_t n, acc_t* u) {
    const int64_t width = c.width;
    if (weight) {
      const acc_t r = reciprocal_rms<acc_t>(x, width, c.eps);
#pragma omp simd
      for (int64_t d = 0; d < width; ++d) {
        u[d] = widened(x[d]) * r * weight[d];
      }
    } else {
#pragma omp simd
      for (int64_t d = 0; d < width; ++d) {
        u[d] = widened(x[d]);
      }
    }
    if (c.cos) {
      const acc_t *cos = c.cos + n * width, *sin = c.sin + n * width;
#pragma omp simd
      for (int64_t d = 0; d < width; d += 2) {
        out[d] = narrowed<scalar_t>(u[d] * cos[d] - u[d + 1] * sin[d]);
        out[d + 1] = narrowed<scalar_t>(u[d + 1] * cos[d + 1] + u[d] * sin[d + 1]);
      }
    } else {
#pragma omp simd
      for (int64_t d = 0; d < width; ++d) {
        out[d] = narrowed<scalar_t>(u[d]);
      }
    }
  }
};

template <typename scalar_t, typename acc_t = at::opmath_type<scalar_t>>
struct Backward {
  using Input = Heads<const scalar_t*>;
  Input dout[3];
  Input x[2];          // null without a norm
  scalar_t* gradient;  // dense [B, N, 3, H, D]

  // `sums` [2, D], those of q's and k's weight, are added to.
  ALIGNTOK_INLINE static void run(
      Backward f, Constants<acc_t> c, acc_t* t, acc_t* sums, int64_t begin, int64_t end) {
    const int64_t width = c.width;
    scalar_t* gradient = f.gradient + begin * 3 * c.heads * width;
    for (int64_t token = begin; token < end; ++token) {
      const int64_t image = token / c.tokens, n = token % c.tokens;
      for (int part = 0; part < 3; ++part) {
        const Input &d = f.dout[part], &x = f.x[part % 2];
        for (int64_t head = 0; head < c.heads; ++head, gradient += width) {
          const scalar_t* dout =
              d.data + image * d.image_stride + n * d.token_stride + head * d.head_stride;
          if (part == 2) {
            std::copy_n(dout, width, gradient);
            continue;
          }
          rotate_back(dout, c, n, t);
          if (c.weight[part]) {
            const scalar_t* source =
                x.data + image * x.image_stride + n * x.token_stride + head * x.head_stride;
            norm_backward(t, source, c.weight[part], c, sums + part * width, gradient);
          } else {
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) {
              gradient[i] = narrowed<scalar_t>(t[i]);
            }
          }
        }
      }
    }
  }

  ALIGNTOK_INLINE static void rotate_back(
      const scalar_t* dout, const Constants<acc_t>& c, int64_t n, acc_t* t) {
    const int64_t width = c.width;
    if (c.cos) {
      const acc_t *cos = c.cos + n * width, *sin = c.sin + n * width;
#pragma omp simd
      for (int64_t d = 0; d < width; d += 2) {
        const acc_t even = widened(dout[d]), odd = widened(dout[d + 1]);
        t[d] = even * cos[d] + odd * sin[d + 1];
        t[d + 1] = odd * cos[d + 1] - even * sin[d];
      }
    } else {
#pragma omp simd
      for (int64_t d = 0; d < width; ++d) {
        t[d] = widened(dout[d]);
      }
    }
  }

  ALIGNTOK_INLINE static void norm_backward(
      const acc_t* t, const scalar_t* x, const acc_t* weight, const Constants<acc_t>& c, acc_t* sums,
      scalar_t* gradient) {
    const int64_t width = c.width;
    acc_t squares = 0, products = 0;
#pragma omp simd reduction(+ : squares, products)
    for (int64_t d = 0; d < width; ++d) {
      const acc_t value = widened(x[d]);
      squares += value * value;
      products += t[d] * weight[d] * value;
    }
    const acc_t share = acc_t(1) / static_cast<acc_t>(width);
    const acc_t r = acc_t(1) / std::sqrt(squares * share + c.eps);
    const acc_t mean = products * r * share;  // of t * weight * n
#pragma omp simd
    for (int64_t d = 0; d < width; ++d) {
      const acc_t normed = widened(x[d]) * r;
      sums[d] += t[d] * normed;
      gradient[d] = narrowed<scalar_t>(r * (t[d] * weight[d] - normed * mean));
    }
  }
};

// A small tensor in the precision of the arithmetic, or none.
template <typename acc_t>
struct Constant {
  Tensor tensor;

  explicit Constant(const optional<Tensor>& source) {
    if (source) {
      tensor = source->to(c10::CppTypeToScalarType<acc_t>::value).contiguous();
    }
  }

  const acc_t* data() const {
    return tensor.defined() ? tensor.const_data_ptr<acc_t>() : nullptr;
  }
};

template <typename scalar_t>
Heads<const scalar_t*> heads_of(const Tensor& tensor) {  // [B, N, H, D] with contiguous elements
  return {tensor.const_data_ptr<scalar_t>(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

void check(
    at::IntArrayRef shape, const optional<Tensor>& q_weight, const optional<Tensor>& k_weight,
    const optional<Tensor>& cos, const optional<Tensor>& sin) {
  TORCH_CHECK_VALUE(
      shape.size() == 5 && shape[2] == 3 && c10::multiply_integers(shape) > 0,
      "qknorm_rope: qkv must be [B, N, 3, H, D] without a zero, got ", shape);
  const int64_t weight[] = {shape[4]}, table[] = {shape[1], shape[4]};
  TORCH_CHECK_VALUE(
      q_weight.has_value() == k_weight.has_value() &&
          (!q_weight || (q_weight->sizes().equals(weight) && k_weight->sizes().equals(weight))),
      "qknorm_rope: q_weight and k_weight must be [D] or both none");
  TORCH_CHECK_VALUE(
      cos.has_value() == sin.has_value() &&
          (!cos || (cos->sizes().equals(table) && sin->sizes().equals(table) && shape[4] % 2 == 0)),
      "qknorm_rope: cos and sin must be [N, D] with an even D, or both none");
}

// body(memory for a head, chunk, first token, token after the last) for every chunk of the B * N tokens.
template <typename acc_t, typename Body>
void for_each_chunk(int64_t tokens, int64_t heads, int64_t width, const Body& body) {
  const int64_t grain = at::divup(kGrain, kChunkTokens * 3 * heads * width);
  at::parallel_for(0, at::divup(tokens, kChunkTokens), grain, [&](int64_t begin, int64_t end) {
    std::vector<acc_t> head(width);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kChunkTokens;
      body(head.data(), chunk, first, std::min(first + kChunkTokens, tokens));
    }
  });
}

using ForwardResult = std::tuple<Tensor, Tensor, Tensor>;
using BackwardResult = std::tuple<Tensor, Tensor, Tensor>;

ForwardResult forward_meta(
    const Tensor& qkv, const optional<Tensor>&, const optional<Tensor>&, const optional<Tensor>&,
    const optional<Tensor>&, double) {
  // [B, N, H, D] with the heads outside in memory: what batched matrix products take without a copy
  const c10::SymInt shape[] = {qkv.sym_size(0), qkv.sym_size(3), qkv.sym_size(1), qkv.sym_size(4)};
  const auto empty = [&] { return at::empty_symint(shape, qkv.options()).transpose(1, 2); };
  return {empty(), empty(), empty()};
}

ForwardResult forward_cpu(
    const Tensor& qkv_, const optional<Tensor>& q_weight, const optional<Tensor>& k_weight,
    const optional<Tensor>& cos, const optional<Tensor>& sin, double eps) {
  check(qkv_.sizes(), q_weight, k_weight, cos, sin);
  auto result = forward_meta(qkv_, q_weight, k_weight, cos, sin, eps);
  const Tensor &q = std::get<0>(result), &k = std::get<1>(result), &v = std::get<2>(result);
  const Tensor qkv = with_dense_rows(qkv_);
  const int64_t images = qkv.size(0), tokens = qkv.size(1), heads = qkv.size(3), width = qkv.size(4);
  constexpr auto name = "aligntok::qknorm_rope";
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, qkv.scalar_type(), name, [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const Constant<acc_t> wq(q_weight), wk(k_weight), c(cos), s(sin);
    const Constants<acc_t> constants{
        {wq.data(), wk.data()}, c.data(), s.data(), tokens, heads, width, static_cast<acc_t>(eps)};
    const Forward<scalar_t> forward{
        {heads_of<scalar_t>(qkv.select(2, 0)), heads_of<scalar_t>(qkv.select(2, 1)),
         heads_of<scalar_t>(qkv.select(2, 2))},
        {q.mutable_data_ptr<scalar_t>(), k.mutable_data_ptr<scalar_t>(), v.mutable_data_ptr<scalar_t>()}};
    const auto body = [&](acc_t* memory, int64_t, int64_t first, int64_t last) {
      run_fastest<Forward<scalar_t>>(forward, constants, memory, first, last);
    };
    for_each_chunk<acc_t>(images * tokens, heads, width, body);
  });
  return result;
}

BackwardResult backward_meta(
    const Tensor& dq, const Tensor&, const Tensor&, const optional<Tensor>&, const optional<Tensor>& q_weight,
    const optional<Tensor>& k_weight, const optional<Tensor>&, const optional<Tensor>&, double) {
  const c10::SymInt shape[] = {dq.sym_size(0), dq.sym_size(1), 3, dq.sym_size(2), dq.sym_size(3)};
  const auto like = [&](const optional<Tensor>& weight) {
    return weight ? at::empty_like(*weight, weight->options(), at::MemoryFormat::Contiguous)
                  : at::empty({0}, dq.options());
  };
  return {at::empty_symint(shape, dq.options()), like(q_weight), like(k_weight)};
}

// The chunks' sums [chunks, 2, D] in order, in double, to the gradients of both weights.
template <typename acc_t>
void add_chunks(const std::vector<acc_t>& sums, const Tensor& dq_weight, const Tensor& dk_weight) {
  const int64_t width = dq_weight.size(0);
  std::vector<double> total(2 * width);
  for (size_t start = 0; start < sums.size(); start += total.size()) {
    for (size_t i = 0; i < total.size(); ++i) {
      total[i] += static_cast<double>(sums[start + i]);
    }
  }
  std::copy_n(total.data(), width, dq_weight.mutable_data_ptr<acc_t>());
  std::copy_n(total.data() + width, width, dk_weight.mutable_data_ptr<acc_t>());
}

BackwardResult backward_cpu(
    const Tensor& dq_, const Tensor& dk_, const Tensor& dv_, const optional<Tensor>& qkv_,
    const optional<Tensor>& q_weight, const optional<Tensor>& k_weight, const optional<Tensor>& cos,
    const optional<Tensor>& sin, double eps) {
  auto result = backward_meta(dq_, dk_, dv_, qkv_, q_weight, k_weight, cos, sin, eps);
  auto& gradient = std::get<0>(result);
  check(gradient.sizes(), q_weight, k_weight, cos, sin);
  TORCH_CHECK_VALUE(
      dk_.sizes() == dq_.sizes() && dv_.sizes() == dq_.sizes() && dk_.scalar_type() == dq_.scalar_type() &&
          dv_.scalar_type() == dq_.scalar_type(),
      "qknorm_rope: dq, dk and dv differ in shape or dtype");
  TORCH_CHECK_VALUE(
      !q_weight || (qkv_ && qkv_->sizes() == gradient.sizes() && qkv_->scalar_type() == dq_.scalar_type()),
      "qknorm_rope: the backward pass of a norm needs qkv, like dq in dtype");
  const Tensor dq = with_dense_rows(dq_), dk = with_dense_rows(dk_), dv = with_dense_rows(dv_);
  const Tensor qkv = q_weight ? with_dense_rows(*qkv_) : gradient;
  const int64_t images = dq.size(0), tokens = dq.size(1), heads = dq.size(2), width = dq.size(3);
  constexpr auto name = "aligntok::qknorm_rope backward";
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dq.scalar_type(), name, [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const Constant<acc_t> wq(q_weight), wk(k_weight), c(cos), s(sin);
    const Constants<acc_t> constants{
        {wq.data(), wk.data()}, c.data(), s.data(), tokens, heads, width, static_cast<acc_t>(eps)};
    const Backward<scalar_t> backward{
        {heads_of<scalar_t>(dq), heads_of<scalar_t>(dk), heads_of<scalar_t>(dv)},
        {heads_of<scalar_t>(qkv.select(2, 0)), heads_of<scalar_t>(qkv.select(2, 1))},
        gradient.mutable_data_ptr<scalar_t>()};
    std::vector<acc_t> sums(at::divup(images * tokens, kChunkTokens) * 2 * width);
    const auto body = [&](acc_t* memory, int64_t chunk, int64_t first, int64_t last) {
      run_fastest<Backward<scalar_t>>(
          backward, constants, memory, sums.data() + chunk * 2 * width, first, last);
    };
    for_each_chunk<acc_t>(images * tokens, heads, width, body);
    if (q_weight) {
      const auto options = wq.tensor.options();
      const Tensor wide_q = at::empty({width}, options), wide_k = at::empty({width}, options);
      add_chunks(sums, wide_q, wide_k);
      std::get<1>(result) = wide_q.to(q_weight->scalar_type());
      std::get<2>(result) = wide_k.to(k_weight->scalar_type());
    }
  });
  return result;
}

struct QKNormRope : public torch::autograd::Function<QKNormRope> {
  static variable_list forward(
      AutogradContext* ctx, const Tensor& qkv, const optional<Tensor>& q_weight,
      const optional<Tensor>& k_weight, const optional<Tensor>& cos, const optional<Tensor>& sin,
      double eps) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("aligntok::qknorm_rope", "")
                               .typed<decltype(forward_cpu)>();
    at::AutoDispatchBelowADInplaceOrView below;
    const auto saved = [](const optional<Tensor>& tensor) { return tensor.value_or(Tensor()); };
    ctx->save_for_backward(
        {q_weight ? qkv : Tensor(), saved(q_weight), saved(k_weight), saved(cos), saved(sin)});
    ctx->saved_data["eps"] = eps;
    auto [q, k, v] = op.call(qkv, q_weight, k_weight, cos, sin, eps);
    return {q, k, v};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    refuse_second_derivative("qknorm_rope");
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("aligntok::qknorm_rope_backward", "")
                               .typed<decltype(backward_cpu)>();
    std::vector<optional<Tensor>> saved;
    for (const Tensor& tensor : ctx->get_saved_variables()) {
      saved.push_back(tensor.defined() ? optional<Tensor>(tensor) : std::nullopt);
    }
    auto [dqkv, dq_weight, dk_weight] = op.call(
        upstream[0], upstream[1], upstream[2], saved[0], saved[1], saved[2], saved[3], saved[4],
        ctx->saved_data["eps"].toDouble());
    return {dqkv, saved[1] ? dq_weight : Tensor(), saved[2] ? dk_weight : Tensor(), Tensor(), Tensor(),
            Tensor()};
  }
};

ForwardResult qknorm_rope_autograd(
    const Tensor& qkv, const optional<Tensor>& q_weight, const optional<Tensor>& k_weight,
    const optional<Tensor>& cos, const optional<Tensor>& sin, double eps) {
  auto result = QKNormRope::apply(qkv, q_weight, k_weight, cos, sin, eps);
  return {result[0], result[1], result[2]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(aligntok, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "qknorm_rope(Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, float eps)"
      " -> (Tensor q, Tensor k, Tensor v)", tags);
  m.def(
      "qknorm_rope_backward(Tensor dq, Tensor dk, Tensor dv, Tensor? qkv, Tensor? q_weight, Tensor? k_weight,"
      " Tensor? cos, Tensor? sin, float eps) -> (Tensor dqkv, Tensor dq_weight, Tensor dk_weight)", tags);
}

TORCH_LIBRARY_IMPL(aligntok, CPU, m) {
  m.impl("qknorm_rope", forward_cpu);
  m.impl("qknorm_rope_backward", backward_cpu);
}

TORCH_LIBRARY_IMPL(aligntok, Meta, m) {
  m.impl("qknorm_rope", forward_meta);
  m.impl("qknorm_rope_backward", backward_meta);
}

TORCH_LIBRARY_IMPL(aligntok, Autograd, m) {
  m.impl("qknorm_rope", qknorm_rope_autograd);
}
