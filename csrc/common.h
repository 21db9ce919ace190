// What the operators for the CPU share: conversions and exp that the compiler can vectorise, loops compiled
// for several instruction sets and chosen at run time, rows of tensors, refusals.

#pragma once

#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

// Targets of functions that capability() chooses among.
#define ALIGNTOK_AVX2 __attribute__((target("avx2,fma,f16c")))
#define ALIGNTOK_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")))

// Left to itself, GCC does not inline all of what stands in a loop.
#define ALIGNTOK_INLINE [[gnu::always_inline]] inline

namespace aligntok {

// Elements that one thread takes at least where a loop is bound by memory: enough work to be worth waking it.
constexpr int64_t kGrain = 32768;

// Elementwise mathematics, without branches or calls for fp32 so that the compiler vectorises the loops
// around it.

template <typename To, typename From>
ALIGNTOK_INLINE To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "reinterpretation keeps the size");
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

// Precision of storage to precision of the arithmetic and back, to the nearest, ties to even. bf16 by hand:
// the class's own conversions (c10's branches on NaN) keep GCC from vectorising the loop.
template <typename scalar_t>
ALIGNTOK_INLINE at::opmath_type<scalar_t> widened(scalar_t value) {
  return static_cast<at::opmath_type<scalar_t>>(value);
}

ALIGNTOK_INLINE float widened(at::BFloat16 value) {
  return bits_as<float>(static_cast<uint32_t>(value.x) << 16);
}

template <typename scalar_t>
ALIGNTOK_INLINE scalar_t narrowed(at::opmath_type<scalar_t> value) {
  return static_cast<scalar_t>(value);
}

template <>
ALIGNTOK_INLINE at::BFloat16 narrowed<at::BFloat16>(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return at::BFloat16(static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded), at::BFloat16::from_bits());
}

// exp(t): t = n ln 2 + r with |r| <= ln(2) / 2, exp(r) by the polynomial 1 + r + r^2 (...) of smallest
// relative error (3e-9), times 2^n by adding n to the exponent: right to about one unit in the last place.
// |t| is limited to 87, where the result and its reciprocal are normal numbers, by comparing bits: magnitudes
// are ordered like integers, and the vector minimum of integers needs no care for NaN. NaN becomes 87 here;
// callers keep it by multiplying with t once more.
ALIGNTOK_INLINE float exp_limited(float t) {
  constexpr uint32_t kSign = 0x80000000u;
  constexpr uint32_t kLimit = 0x42ae0000u;     // 87.0f
  constexpr float kRound = 12582912.0f;        // 1.5 * 2^23: adding it leaves round(x) in the low bits
  constexpr float kLn2High = 0.693359375f;     // ln 2 = high + low, high exact in 9 bits
  constexpr float kLn2Low = -2.12194440e-4f;
  const uint32_t bits = bits_as<uint32_t>(t);
  t = bits_as<float>((bits & kSign) | std::min(bits & ~kSign, kLimit));
  const float shifted = t * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (t - n * kLn2High) - n * kLn2Low;
  float p = 1.3814540579915047e-3f;
  p = p * r + 8.36874544620514e-3f;
  p = p * r + 4.166838899254799e-2f;
  p = p * r + 1.666652113199234e-1f;
  p = p * r + 4.999999403953552e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return bits_as<float>(bits_as<uint32_t>(p) + (bits_as<uint32_t>(shifted) << 23));
}

ALIGNTOK_INLINE double exp_limited(double t) {
  return std::exp(std::min(std::max(t, -700.0), 700.0));
}

// Instruction sets. PyTorch's own choice (and its switch ATEN_CPU_CAPABILITY) picks one at run time, so a
// wheel built on a new processor runs on an old one.

enum class Capability { kDefault, kAvx2, kAvx512 };

inline Capability capability() {
  static const Capability found = [] {
    const std::string name = at::get_cpu_capability();
    return name == "AVX512" ? Capability::kAvx512 : name == "AVX2" ? Capability::kAvx2 : Capability::kDefault;
  }();
  return found;
}

// Loop::run(arguments...), compiled for each instruction set. `run` must be ALIGNTOK_INLINE.
template <typename Loop, typename... Arguments>
void run_default(Arguments... arguments) {
  Loop::run(arguments...);
}

#if defined(__x86_64__)
template <typename Loop, typename... Arguments>
ALIGNTOK_AVX2 void run_avx2(Arguments... arguments) {
  Loop::run(arguments...);
}

template <typename Loop, typename... Arguments>
ALIGNTOK_AVX512 void run_avx512(Arguments... arguments) {
  Loop::run(arguments...);
}
#endif

template <typename Loop, typename... Arguments>
void run_fastest(Arguments... arguments) {
#if defined(__x86_64__)
  switch (capability()) {
    case Capability::kAvx512:
      return run_avx512<Loop>(arguments...);
    case Capability::kAvx2:
      return run_avx2<Loop>(arguments...);
    default:
      break;
  }
#endif
  run_default<Loop>(arguments...);
}

// `tensor`, or a copy of it where its last dimension is not contiguous.
inline at::Tensor with_dense_rows(const at::Tensor& tensor) {
  return tensor.size(-1) == 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

// Precision of arithmetic and sums for a precision of storage.
inline at::ScalarType arithmetic_type(at::ScalarType storage) {
  return storage == at::kDouble ? at::kDouble : at::kFloat;
}

// What a backward pass says that is itself to be differentiated.
inline void refuse_second_derivative(const char* op) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !at::GradMode::is_enabled(), op, ": the C++ implementation has no second derivative; use "
      "implementation=\"reference\" where create_graph=True is needed");
}

}  // namespace aligntok
