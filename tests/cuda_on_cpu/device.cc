// A device that TensorFlow takes for a GPU: its memory is the host's, and its
// stream does everything at once. With the kernels of csrc/cuda compiled for
// it, the ops for a GPU run as they are built, on a machine without one.
#include <cstring>

#include "tensorflow/core/common_runtime/device_factory.h"
#include "tensorflow/core/common_runtime/local_device.h"
#include "tensorflow/core/framework/device_base.h"
#include "xla/stream_executor/stream.h"

namespace wdops {
namespace {

namespace se = stream_executor;
using tensorflow::Allocator;
using tensorflow::Device;
using tensorflow::StatusCallback;
using tensorflow::Tensor;

class HostStream : public se::Stream {
 public:
  PlatformSpecificHandle platform_specific_handle() const override {
    return {};
  }
  bool ok() const override { return true; }
  absl::Status WaitFor(Stream*) override { return absl::OkStatus(); }
  absl::Status WaitFor(se::Event*) override { return absl::OkStatus(); }
  absl::Status RecordEvent(se::Event*) override { return absl::OkStatus(); }
  absl::Status BlockHostUntilDone() override { return absl::OkStatus(); }
  absl::Status Memcpy(void* to, const se::DeviceAddressBase& from,
                      uint64_t size) override {
    memcpy(to, from.opaque(), size);
    return absl::OkStatus();
  }
  absl::Status Memcpy(se::DeviceAddressBase* to, const void* from,
                      uint64_t size) override {
    memcpy(to->opaque(), from, size);
    return absl::OkStatus();
  }
  absl::Status Memcpy(se::DeviceAddressBase* to,
                      const se::DeviceAddressBase& from,
                      uint64_t size) override {
    return Memcpy(to, from.opaque(), size);
  }
  absl::Status MemZero(se::DeviceAddressBase* memory, uint64_t size) override {
    memset(memory->opaque(), 0, size);
    return absl::OkStatus();
  }
  absl::Status DoHostCallbackWithStatus(
      absl::AnyInvocable<absl::Status() &&> callback) override {
    return std::move(callback)();
  }
  absl::StatusOr<Stream*> GetOrCreateSubStream() override { return this; }
  void ReturnSubStream(Stream*) override {}
  se::StreamExecutor* parent() const override { return nullptr; }
  se::CudaComputeCapability GetCudaComputeCapability() const override {
    return {};
  }
  se::RocmComputeCapability GetRocmComputeCapability() const override {
    return {};
  }
  se::OneAPIComputeCapability GetOneAPIComputeCapability() const override {
    return {};
  }
  std::variant<se::StreamPriority, int> priority() const override { return 0; }
  const std::string& GetName() const override { return name_; }
  void SetName(std::string name) override { name_ = name; }

 private:
  std::string name_;
};

class Context : public tensorflow::DeviceContext {
 public:
  se::Stream* stream() const override { return &stream_; }
  void CopyCPUTensorToDevice(const Tensor* from, Device*, Tensor* to,
                             StatusCallback done, bool) const override {
    Copy(from, to, done);
  }
  void CopyDeviceTensorToCPU(const Tensor* from, absl::string_view, Device*,
                             Tensor* to, StatusCallback done) override {
    Copy(from, to, done);
  }
  void CopyTensorInSameDevice(const Tensor* from, Device*, Tensor* to,
                              StatusCallback done) const override {
    Copy(from, to, done);
  }
  absl::Status ThenExecute(Device*, se::Stream*,
                           std::function<void()> run) override {
    run();
    return absl::OkStatus();
  }

 private:
  static void Copy(const Tensor* from, Tensor* to, const StatusCallback& done) {
    memcpy(to->data(), from->data(), from->TotalBytes());
    done(absl::OkStatus());
  }

  mutable HostStream stream_;
};

class HostGpu : public tensorflow::LocalDevice {
 public:
  HostGpu(const tensorflow::SessionOptions& options, const std::string& name)
      : LocalDevice(options,
                    BuildDeviceAttributes(name, tensorflow::DEVICE_GPU,
                                          tensorflow::Bytes(1 << 30), {}, "")) {
    info_.stream = context_->stream();
    info_.default_context = context_.get();
    info_.gpu_id = 0;
    set_tensorflow_accelerator_device_info(&info_);
  }

  Allocator* GetAllocator(tensorflow::AllocatorAttributes) override {
    return tensorflow::cpu_allocator();
  }
  absl::Status MakeTensorFromProto(const tensorflow::TensorProto& proto,
                                   tensorflow::AllocatorAttributes,
                                   Tensor* tensor) override {
    if (tensor->FromProto(proto)) return absl::OkStatus();
    return absl::InvalidArgumentError("cannot parse a tensor");
  }
  absl::Status TryGetDeviceContext(
      tensorflow::DeviceContext** context) override {
    context_->Ref();
    *context = context_.get();
    return absl::OkStatus();
  }
  void CopyTensorInSameDevice(const Tensor* from, Tensor* to,
                              const tensorflow::DeviceContext*,
                              StatusCallback done) override {
    context_->CopyTensorInSameDevice(from, this, to, done);
  }
  absl::Status Sync() override { return absl::OkStatus(); }

 private:
  tensorflow::core::RefCountPtr<Context> context_{new Context};
  AcceleratorDeviceInfo info_;
};

class Factory : public tensorflow::DeviceFactory {
 public:
  absl::Status ListPhysicalDevices(std::vector<std::string>* devices) override {
    devices->push_back("/physical_device:GPU:0");
    return absl::OkStatus();
  }
  absl::Status CreateDevices(
      const tensorflow::SessionOptions& options, const std::string& name_prefix,
      std::vector<std::unique_ptr<Device>>* devices) override {
    devices->push_back(
        std::make_unique<HostGpu>(options, name_prefix + "/device:GPU:0"));
    return absl::OkStatus();
  }
};

REGISTER_LOCAL_DEVICE_FACTORY("GPU", Factory, 210);

}  // namespace
}  // namespace wdops
