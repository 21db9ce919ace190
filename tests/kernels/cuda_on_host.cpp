// The CUDA sources of csrc/ compiled for a CPU and run there: the same kernels, with the few CUDA functions that they
// call written down below. What this proves: indices, tails, alignment, reductions and their order, the last block's
// part, and that results do not depend on the order in which blocks and threads run. What it cannot prove: speed, and
// the GPU's memory model.
//
// Every thread of a block is a fibre. A collective operation (barrier, shuffle) suspends it until the others were
// there; blocks run one after the other in a shuffled order, the threads of each block in another shuffled order.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#undef __shared__
#define __shared__ static
#define __launch_bounds__(threads)
#undef __grid_constant__
#define __grid_constant__

static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr size_t kStack = 64 * 1024;

struct Fibre {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  bool done = false;
};

ucontext_t scheduler;
std::vector<Fibre> fibres;
std::function<void()> body;
unsigned current, arrived, generation;
std::vector<double> exchanged;
std::mt19937 shuffle;

void suspend() {
  swapcontext(&fibres[current].context, &scheduler);
}

void fibre_main() {
  body();
  fibres[current].done = true;
  suspend();
}

std::vector<unsigned> shuffled(unsigned n) {
  std::vector<unsigned> order(n);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), shuffle);
  return order;
}

// Each round lets every fibre run to its next collective operation.
void run_block(unsigned threads) {
  fibres.resize(threads);
  exchanged.assign(threads, 0);
  arrived = generation = 0;
  for (Fibre& fibre : fibres) {
    fibre.done = false;
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.data();
    fibre.context.uc_stack.ss_size = fibre.stack.size();
    makecontext(&fibre.context, fibre_main, 0);
  }
  const std::vector<unsigned> order = shuffled(threads);
  for (bool left = true; left;) {
    left = false;
    for (unsigned thread : order) {
      if (!fibres[thread].done) {
        current = thread;
        threadIdx.x = thread;
        swapcontext(&scheduler, &fibres[thread].context);
        left = left || !fibres[thread].done;
      }
    }
  }
}

}  // namespace emulation

void __syncthreads() {
  const unsigned mine = emulation::generation;
  if (++emulation::arrived == blockDim.x) {
    emulation::arrived = 0;
    ++emulation::generation;
  }
  while (emulation::generation == mine) {
    emulation::suspend();
  }
}

// Lanes of a warp come here the same number of times, so one round separates writing from reading.
double __shfl_down_sync(unsigned, double value, unsigned offset) {
  const unsigned lane = threadIdx.x % 32;
  emulation::exchanged[threadIdx.x] = value;
  emulation::suspend();
  const double received = lane + offset < 32 ? emulation::exchanged[threadIdx.x + offset] : value;
  emulation::suspend();
  return received;
}

void __threadfence() {}

unsigned atomicInc(unsigned* address, unsigned limit) {
  const unsigned old = *address;
  *address = old >= limit ? 0 : old + 1;
  return old;
}

template <typename T>
T __ldcg(const T* address) {
  return *address;
}

template <typename... Expected, typename... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Given&&... given) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  emulation::body = [&] { kernel(given...); };
  for (unsigned block : emulation::shuffled(gridDim.x)) {
    blockIdx.x = block;
    emulation::run_block(blockDim.x);
  }
  return cudaSuccess;
}

#include "gan_loss_cuda.cu"
#include "norm_ratio_cuda.cu"

// Arguments as ctypes passes them. Every function returns the counter afterwards, which must be 0.

extern "C" unsigned host_gan_loss(
    int phi, int scalar, int sides, const void* const* logits, void* const* gradients, const int64_t* counts,
    const double* signs, double weight, const double* gradient_scales, const float* lecam_means, double lecam_weight,
    void* loss, void* stats, unsigned seed) {
  aligntok::GanLoss arguments{};
  int64_t blocks = 0;
  for (int s = 0; s < sides; ++s) {
    const int64_t own = aligntok::gan_loss_blocks(counts[s]);
    arguments.sides[s] = {logits[s], gradients[s], counts[s], own, signs[s], weight, gradient_scales[s]};
    blocks += own;
  }
  std::vector<double> partial(blocks * 3, NAN);
  unsigned counter = 0;
  arguments.side_count = sides;
  arguments.lecam_means = lecam_means;
  arguments.lecam_weight = lecam_weight;
  arguments.partial = partial.data();
  arguments.counter = &counter;
  arguments.loss = loss;
  arguments.stats = stats;
  emulation::shuffle.seed(seed);
  aligntok::launch_gan_loss(arguments, static_cast<aligntok::Phi>(phi), static_cast<aligntok::Scalar>(scalar), nullptr);
  return counter;
}

extern "C" unsigned host_norm_ratio(
    int scalar, int tensors, int numerators, const void* const* data, const int64_t* counts, double delta,
    double limit, void* result, unsigned seed) {
  aligntok::NormRatio arguments{};
  for (int t = 0; t < tensors; ++t) {
    arguments.data[t] = data[t];
    arguments.count[t] = counts[t];
    arguments.first_block[t + 1] = arguments.first_block[t] +
        static_cast<int>(aligntok::norm_ratio_blocks(counts[t], static_cast<aligntok::Scalar>(scalar)));
  }
  std::vector<double> partial(arguments.first_block[tensors], NAN);
  unsigned counter = 0;
  arguments.tensors = tensors;
  arguments.numerators = numerators;
  arguments.delta = delta;
  arguments.limit = limit;
  arguments.partial = partial.data();
  arguments.counter = &counter;
  arguments.result = result;
  emulation::shuffle.seed(seed);
  aligntok::launch_norm_ratio(arguments, static_cast<aligntok::Scalar>(scalar), nullptr);
  return counter;
}
