// CUDA's run-time, opened with dlopen: the few functions that are needed, every result checked.
#pragma once

#include <cstddef>
#include <string>

#include "library.h"

struct CUstream_st;  // CUDA's

namespace cp_run {

using CudaStream = CUstream_st*;

// Every function throws `failed` with CUDA's own words when CUDA refuses.
class Cuda {
 public:
  Cuda();

  int device_count() const;                           // throws `usage`: there is no driver
  void use(int device) const;                         // in this thread
  std::string compute_capability(int device) const;   // such as "8.9"
  std::size_t free_bytes() const;                     // of the device in use
  void* allocate(std::size_t bytes) const;            // on the device
  void release(void* device) const;
  void* allocate_host(std::size_t bytes) const;       // page-locked
  void release_host(void* host) const;
  CudaStream make_stream() const;                     // does not wait for the default stream
  void release_stream(CudaStream stream) const;
  void copy(void* to, const void* from, std::size_t bytes, CudaStream stream) const;
  void wait(CudaStream stream) const;

 private:
  // CUDA's enumerations are passed as integers: cudaSuccess is 0.
  void check(int result, const std::string& what) const;

  Library library_;
  const char* (*error_string_)(int);
  int (*get_device_count_)(int*);
  int (*set_device_)(int);
  int (*get_attribute_)(int*, int, int);
  int (*mem_get_info_)(std::size_t*, std::size_t*);
  int (*malloc_)(void**, std::size_t);
  int (*free_)(void*);
  int (*malloc_host_)(void**, std::size_t);
  int (*free_host_)(void*);
  int (*stream_create_)(CudaStream*, unsigned);
  int (*stream_destroy_)(CudaStream);
  int (*stream_synchronize_)(CudaStream);
  int (*memcpy_async_)(void*, const void*, std::size_t, int, CudaStream);
};

// Memory on a device, aligned to 256 bytes at least, as cudaMalloc gives it.
class DeviceMemory {
 public:
  // No bytes are some too: TensorRT takes no null pointer.
  DeviceMemory(const Cuda& cuda, std::size_t bytes)
      : cuda_(cuda), data_(cuda.allocate(bytes == 0 ? 1 : bytes)) {}
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  std::byte* data() const { return static_cast<std::byte*>(data_); }

 private:
  const Cuda& cuda_;
  void* data_;
};

// A stream with page-locked memory for what passes through it.
class Lane {
 public:
  Lane(const Cuda& cuda, std::size_t bytes);
  ~Lane();
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  CudaStream stream() const { return stream_; }
  std::byte* staging() const { return static_cast<std::byte*>(staging_); }

 private:
  const Cuda& cuda_;
  CudaStream stream_;
  void* staging_ = nullptr;
};

}  // namespace cp_run
