// What the kernels for a GPU take from TensorFlow: its stream, its memory, and
// copies in the order of the stream. No header of CUDA is needed.
#pragma once

#include <string>
#include <vector>

#include "cuda/interface.h"
#include "tensorflow/core/common_runtime/device.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "xla/stream_executor/stream.h"

namespace wdops {

class Card {
 public:
  explicit Card(tensorflow::OpKernelContext* ctx)
      : ctx_(ctx), stream_(ctx->op_device_context()->stream()) {}

  WdopsStream stream() const {
    return static_cast<WdopsStream>(stream_->platform_specific_handle().stream);
  }

  // Of the card, for what the stream is given while the op's kernel runs:
  // TensorFlow hands memory to others in the order of its one stream.
  absl::Status Allocate(int64_t bytes, tensorflow::Tensor* memory) const {
    return ctx_->allocate_temp(tensorflow::DT_UINT8, {bytes}, memory);
  }

  // Of the host, where the card can read by itself.
  absl::Status AllocatePinned(int64_t bytes, tensorflow::Tensor* memory) const {
    tensorflow::AllocatorAttributes attributes;
    attributes.set_on_host(true);
    attributes.set_gpu_compatible(true);
    return ctx_->allocate_temp(tensorflow::DT_UINT8, {bytes}, memory,
                               attributes);
  }

  // To memory of the card, as long or longer. `pinned` lives until the stream
  // has read it: the host's memory has no such order.
  absl::Status Send(const tensorflow::Tensor& pinned,
                    tensorflow::Tensor* memory) const {
    auto to = Address(*memory);
    TF_RETURN_IF_ERROR(
        stream_->Memcpy(&to, pinned.data(), pinned.TotalBytes()));
    return ctx_->op_device_context()->ThenExecute(
        static_cast<tensorflow::Device*>(ctx_->device()), stream_, [pinned] {});
  }

  absl::Status Copy(const tensorflow::Tensor& from,
                    tensorflow::Tensor* to) const {
    auto address = Address(*to);
    return stream_->Memcpy(&address, Address(from), from.TotalBytes());
  }

  absl::Status Clear(tensorflow::Tensor* memory) const {
    if (memory->TotalBytes() == 0) return absl::OkStatus();
    auto address = Address(*memory);
    return stream_->MemZero(&address, memory->TotalBytes());
  }

 private:
  static stream_executor::DeviceAddressBase Address(
      const tensorflow::Tensor& tensor) {
    return stream_executor::DeviceAddressBase(tensor.data(),
                                              tensor.TotalBytes());
  }

  tensorflow::OpKernelContext* ctx_;
  stream_executor::Stream* stream_;
};

// What a call of cuda/interface.h returned.
inline absl::Status Check(int error) {
  if (error == 0) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("CUDA: ", wdops_cuda_error(error)));
}

// Registers the kernel of an op for a GPU.
template <class Kernel>
void RegisterOnCard(const std::string& op,
                    const std::vector<std::string>& in_host_memory) {
  tensorflow::KernelDefBuilder builder(op.c_str());
  builder.Device(tensorflow::DEVICE_GPU);
  for (const std::string& name : in_host_memory) {
    builder.HostMemory(name.c_str());
  }
  tensorflow::kernel_factory::OpKernelRegistrar(
      builder.Build(), op,
      [](tensorflow::OpKernelConstruction* ctx) -> tensorflow::OpKernel* {
        return new Kernel(ctx);
      });
}

}  // namespace wdops
