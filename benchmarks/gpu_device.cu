// What benchmarks/gpu.py needs of CUDA's runtime beside the kernels, as C
// functions: so a compiler checks the calls, which ctypes would not.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED int device_name(char* name, int bytes) {
  cudaDeviceProp properties;
  const int error = cudaGetDeviceProperties(&properties, 0);
  if (error == cudaSuccess) snprintf(name, bytes, "%s", properties.name);
  return error;
}
EXPORTED int device_version(int* driver) {
  return cudaDriverGetVersion(driver);
}
EXPORTED int device_memory(size_t* free, size_t* total) {
  return cudaMemGetInfo(free, total);
}

EXPORTED int device_allocate(void** data, int64_t bytes) {
  return cudaMalloc(data, bytes);
}
EXPORTED int device_free(void* data) { return cudaFree(data); }
// On the host, for copies that a stream does not wait with.
EXPORTED int device_allocate_pinned(void** data, int64_t bytes) {
  return cudaMallocHost(data, bytes);
}
EXPORTED int device_free_pinned(void* data) { return cudaFreeHost(data); }

EXPORTED int device_copy(void* to, const void* from, int64_t bytes,
                         cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream);
}
EXPORTED int device_new_stream(cudaStream_t* stream) {
  return cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking);
}
EXPORTED int device_wait(cudaStream_t stream) {
  return cudaStreamSynchronize(stream);
}

EXPORTED int device_new_event(cudaEvent_t* event) {
  return cudaEventCreate(event);
}
EXPORTED int device_record(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecord(event, stream);
}
EXPORTED int device_milliseconds(float* milliseconds, cudaEvent_t begin,
                                 cudaEvent_t end) {
  return cudaEventElapsedTime(milliseconds, begin, end);
}

EXPORTED int device_begin_capture(cudaStream_t stream) {
  return cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal);
}
EXPORTED int device_end_capture(cudaStream_t stream, cudaGraphExec_t* graph) {
  cudaGraph_t captured;
  const int error = cudaStreamEndCapture(stream, &captured);
  if (error != cudaSuccess) return error;
  return cudaGraphInstantiate(graph, captured, 0);
}
EXPORTED int device_launch(cudaGraphExec_t graph, cudaStream_t stream) {
  return cudaGraphLaunch(graph, stream);
}
