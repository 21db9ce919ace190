// Memory of tensors on the CPU that is kept when they are freed, and lies in huge pages.
//
// A training step frees hundreds of MiB and the next one asks for as much. PyTorch's allocator passes this on
// to malloc, which hands large blocks back to the system: every step the system maps, clears and faults the
// same pages again. Here a freed block waits for the next tensor of its size.
//
// Sizes are rounded up to an eighth of a power of two, so that tensors of similar sizes share blocks. Blocks
// below kLarge are cut from slabs and stay for good. Larger ones are mapped one by one and unmapped when
// something new is mapped and together they would exceed the largest use so far by more than a quarter and
// kSpare: a run that changes its sizes does not keep the old ones. Every block begins with a line that says
// its size; data follows at the alignment that PyTorch promises.
//
// keep_cpu_memory(true) makes this the allocator of all tensors from then on, keep_cpu_memory(false) PyTorch's.
// Tensors outlive both: each is freed by the one that made it.

#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#if defined(__linux__)

#include <pthread.h>
#include <sys/mman.h>

namespace {

constexpr size_t kLine = 64;                // alignment of data, and what a block's size takes in front of it
constexpr size_t kPage = size_t(1) << 12;
constexpr size_t kHugePage = size_t(1) << 21;
constexpr size_t kLarge = size_t(1) << 20;
constexpr size_t kSlab = size_t(1) << 23;
constexpr size_t kSpare = size_t(1) << 28;
constexpr uint8_t kPriority = 1;            // above PyTorch's own, which has 0

// The next multiple of an eighth of the largest power of two that is not above n; of a line at least.
size_t rounded(size_t n) {
  size_t power = kLine;
  while (power <= n / 2) {
    power *= 2;
  }
  const size_t step = std::max(power / 8, kLine);
  return (n + step - 1) / step * step;
}

// Fresh memory of at least `length` bytes that begins at a huge page, or null.
char* map_pages(size_t length) {
  void* found = mmap(nullptr, length + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (found == MAP_FAILED) {
    return nullptr;
  }
  const auto begin = reinterpret_cast<uintptr_t>(found);
  const uintptr_t aligned = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = begin + length + kHugePage;
  if (aligned > begin) {
    munmap(found, aligned - begin);
  }
  if (end > aligned + length) {
    munmap(reinterpret_cast<void*>(aligned + length), end - aligned - length);
  }
  auto* memory = reinterpret_cast<char*>(aligned);
  madvise(memory, length, MADV_HUGEPAGE);  // a wish: without huge pages everything works, slower
  return memory;
}

struct KeepingAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) {
      return {nullptr, nullptr, &free_data, c10::Device(c10::DeviceType::CPU)};
    }
    char* block = take(bytes);
    if (block == nullptr) {
      c10::profiledCPUMemoryReporter().OutOfMemory(bytes);
      TORCH_CHECK(false, "no memory on the CPU for a tensor of ", bytes, " bytes: take a smaller batch or images");
    }
    void* data = block + kLine;
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, data, &free_data, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return &free_data;
  }

  void copy_data(void* to, const void* from, size_t count) const override {
    default_copy_data(to, from, count);
  }

  // Bytes of tensors, and of freed blocks.
  std::tuple<int64_t, int64_t> state() {
    const std::lock_guard<std::mutex> guard(mutex_);
    return {static_cast<int64_t>(used_), static_cast<int64_t>(kept_)};
  }

  void lock() {
    mutex_.lock();
  }

  void unlock() {
    mutex_.unlock();
  }

  static KeepingAllocator& instance() {
    // Never destroyed: tensors of other static objects may be freed after it would have been.
    static auto* allocator = [] {
      auto* made = new KeepingAllocator;
      // A process that is forked while another thread allocates must not find the mutex locked for good.
      pthread_atfork(
          [] { instance().lock(); }, [] { instance().unlock(); }, [] { instance().unlock(); });
      return made;
    }();
    return *allocator;
  }

 private:
  static size_t& size_of(char* block) {
    return *reinterpret_cast<size_t*>(block);
  }

  static void free_data(void* data) {
    if (data != nullptr) {
      c10::profiledCPUMemoryReporter().Delete(data);
      instance().keep(static_cast<char*>(data) - kLine);
    }
  }

  char* take(size_t bytes) {
    if (bytes > SIZE_MAX / 4) {
      return nullptr;
    }
    const size_t whole = rounded(bytes) + kLine;
    const size_t size = whole < kLarge ? whole : (whole + kPage - 1) / kPage * kPage;
    const std::lock_guard<std::mutex> guard(mutex_);
    char* block = reuse(size);
    if (block == nullptr) {
      block = size < kLarge ? cut(size) : map_large(size);
      if (block == nullptr) {
        return nullptr;
      }
      size_of(block) = size;
    }
    used_ += size;
    most_used_ = std::max(most_used_, used_);
    return block;
  }

  void keep(char* block) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const size_t size = size_of(block);
    used_ -= size;
    kept_ += size;
    free_[size].push_back(block);
  }

  char* reuse(size_t size) {
    const auto found = free_.find(size);
    if (found == free_.end() || found->second.empty()) {
      return nullptr;
    }
    char* block = found->second.back();
    found->second.pop_back();
    kept_ -= size;
    return block;
  }

  char* cut(size_t size) {
    if (slab_end_ - slab_ < static_cast<ptrdiff_t>(size)) {
      char* slab = map_pages(kSlab);
      if (slab == nullptr) {
        return nullptr;
      }
      slab_ = slab;
      slab_end_ = slab + kSlab;
    }
    char* block = slab_;
    slab_ += size;
    return block;
  }

  char* map_large(size_t size) {
    const size_t limit = std::max(most_used_, used_ + size) / 4 * 5 + kSpare;
    if (used_ + kept_ + size > limit) {
      release(used_ + kept_ + size - limit);
    }
    char* block = map_pages(size);
    if (block == nullptr) {
      release(kept_);
      block = map_pages(size);
    }
    return block;
  }

  // Unmap freed large blocks of `bytes` together, the largest first.
  void release(size_t bytes) {
    size_t released = 0;
    for (auto sizes = free_.rbegin(); sizes != free_.rend() && sizes->first >= kLarge; ++sizes) {
      auto& blocks = sizes->second;
      while (!blocks.empty() && released < bytes) {
        munmap(blocks.back(), sizes->first);
        blocks.pop_back();
        released += sizes->first;
      }
    }
    kept_ -= released;
  }

  std::mutex mutex_;
  std::map<size_t, std::vector<char*>> free_;  // freed blocks by size
  size_t used_ = 0, kept_ = 0, most_used_ = 0;
  char *slab_ = nullptr, *slab_end_ = nullptr;
};

void keep_cpu_memory(bool keep) {
  at::Allocator* allocator = keep ? &KeepingAllocator::instance() : c10::GetDefaultCPUAllocator();
  c10::SetCPUAllocator(allocator, kPriority);
}

std::tuple<int64_t, int64_t> cpu_memory() {
  return KeepingAllocator::instance().state();
}

}  // namespace

#else

namespace {

void keep_cpu_memory(bool keep) {
  TORCH_CHECK(!keep, "memory of tensors on the CPU is kept on Linux only");
}

std::tuple<int64_t, int64_t> cpu_memory() {
  return {0, 0};
}

}  // namespace

#endif

TORCH_LIBRARY_FRAGMENT(aligntok, m) {
  m.def("keep_cpu_memory(bool keep) -> ()", keep_cpu_memory);
  m.def("cpu_memory() -> (int used, int kept)", cpu_memory);
}
