// Memory for large outputs of ops on a CPU, which goes from one step to the
// next.
//
// malloc maps memory of its own for a tensor of more than 32 MiB and gives it
// back with it, and TensorFlow leaves it at that unless oneDNN is on. Then the
// system finds and clears pages in every step: of 318 ms that bias and ELU of
// 64 M elements took, forward and backward, that were 230.
#pragma once

#include "tensorflow/core/framework/op_kernel.h"

#ifdef __linux__
#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "absl/strings/str_cat.h"
#include "rules/sums.h"
#include "tensorflow/core/platform/errors.h"
#endif

namespace wdops {
#ifdef __linux__

inline constexpr size_t kLargeBytes = 32 << 20;

// What is not in use stays mapped, so far as more was once in use at a time,
// and is the system's to take whenever it needs memory.
class KeptMemory : public tensorflow::Allocator {
 public:
  // Never destroyed: tensors may live longer than anything static.
  static KeptMemory* Get() {
    static KeptMemory* const memory = new KeptMemory;
    return memory;
  }

  std::string Name() override { return "wdops"; }

  // The alignment asked for is never more than that of pages.
  void* AllocateRaw(size_t, size_t bytes) override {
    bytes = Ceil(bytes, kPage) * kPage;
    const std::lock_guard<std::mutex> lock(mutex_);
    void* data = TakeKept(bytes);
    if (!data) data = MapNew(bytes);
    if (!data) return nullptr;
    in_use_[data] = bytes;
    used_ += bytes;
    most_ = std::max(most_, used_);
    return data;
  }

  void DeallocateRaw(void* data) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto block = in_use_.find(data);
    // From here on its bytes are what they were or 0, until they are written.
    madvise(data, block->second, MADV_FREE);
    kept_.push_back(*block);
    used_ -= block->second;
    in_use_.erase(block);
  }

 private:
  using Block = std::pair<void*, size_t>;  // and bytes
  static constexpr int64_t kPage = 2 << 20;

  // The one that was used last: a part of it may still be in a cache.
  void* TakeKept(size_t bytes) {
    for (size_t i = kept_.size(); i-- > 0;) {
      if (kept_[i].second != bytes) continue;
      void* data = kept_[i].first;
      kept_.erase(kept_.begin() + i);
      return data;
    }
    return nullptr;
  }

  void* MapNew(size_t bytes) {
    Release(std::max(most_, used_ + bytes) - bytes);
    void* data = Map(bytes);
    if (data) return data;
    Release(0);
    return Map(bytes);
  }

  // Unmaps what was used longest ago, until no more than so many bytes are
  // mapped or all are in use.
  void Release(size_t bytes) {
    size_t mapped = used_;
    for (const Block& block : kept_) mapped += block.second;
    size_t count = 0;
    for (; count < kept_.size() && mapped > bytes; ++count) {
      munmap(kept_[count].first, kept_[count].second);
      mapped -= kept_[count].second;
    }
    kept_.erase(kept_.begin(), kept_.begin() + count);
  }

  // At a whole page of the large ones, which are then asked for: that is a hint
  // and may fail.
  static void* Map(size_t bytes) {
    void* mapped = mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    char* const begin = static_cast<char*>(mapped);
    const size_t before = -reinterpret_cast<uintptr_t>(begin) % kPage;
    if (before > 0) munmap(begin, before);
    if (before < kPage) munmap(begin + before + bytes, kPage - before);
    madvise(begin + before, bytes, MADV_HUGEPAGE);
    return begin + before;
  }

  std::mutex mutex_;
  std::unordered_map<void*, size_t> in_use_;  // bytes of each
  std::vector<Block> kept_;                   // the one used last is last
  size_t used_ = 0, most_ = 0;                // bytes in use, now and ever
};
#endif

// As ctx->allocate_output; large ones are kept where TensorFlow's allocator is
// the plain one.
inline absl::Status AllocateOutput(tensorflow::OpKernelContext* ctx, int index,
                                   const tensorflow::TensorShape& shape,
                                   tensorflow::Tensor** output) {
#ifdef __linux__
  const tensorflow::DataType dtype = ctx->expected_output_dtype(index);
  const size_t bytes = shape.num_elements() * DataTypeSize(dtype);
  if (bytes > kLargeBytes &&
      ctx->get_allocator(ctx->output_alloc_attr(index))->Name() == "cpu") {
    tensorflow::Tensor kept(KeptMemory::Get(), dtype, shape);
    if (!kept.IsInitialized()) {
      return absl::ResourceExhaustedError(
          absl::StrCat("there is no memory for an output of ", bytes,
                       " bytes, of shape ", shape.DebugString()));
    }
    ctx->set_output(index, kept);
    *output = ctx->mutable_output(index);
    return absl::OkStatus();
  }
#endif
  return ctx->allocate_output(index, shape, output);
}

}  // namespace wdops
