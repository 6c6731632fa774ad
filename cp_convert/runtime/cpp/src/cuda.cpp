#include "cuda.h"

#include "errors.h"

namespace cp_run {
namespace {

constexpr int compute_capability_major = 75;  // cudaDevAttrComputeCapabilityMajor
constexpr int compute_capability_minor = 76;  // cudaDevAttrComputeCapabilityMinor
constexpr int copy_either_way = 4;            // cudaMemcpyDefault
constexpr unsigned non_blocking = 1;          // cudaStreamNonBlocking

// A destructor has nobody to tell: what cannot be released is released with the process.
template <class Release>
void quietly(Release release) noexcept {
  try {
    release();
  } catch (const Error&) {
    return;
  }
}

}  // namespace

Cuda::Cuda()
    : library_("CUDA's run-time", {"libcudart.so.13", "libcudart.so.12"},
               "install CUDA's run-time and name its folder in LD_LIBRARY_PATH.") {
  library_.find(error_string_, "cudaGetErrorString");
  library_.find(get_device_count_, "cudaGetDeviceCount");
  library_.find(set_device_, "cudaSetDevice");
  library_.find(get_attribute_, "cudaDeviceGetAttribute");
  library_.find(mem_get_info_, "cudaMemGetInfo");
  library_.find(malloc_, "cudaMalloc");
  library_.find(free_, "cudaFree");
  library_.find(malloc_host_, "cudaMallocHost");
  library_.find(free_host_, "cudaFreeHost");
  library_.find(stream_create_, "cudaStreamCreateWithFlags");
  library_.find(stream_destroy_, "cudaStreamDestroy");
  library_.find(stream_synchronize_, "cudaStreamSynchronize");
  library_.find(memcpy_async_, "cudaMemcpyAsync");
}

void Cuda::check(int result, const std::string& what) const {
  if (result != 0) throw failed(text(what, ": ", error_string_(result), "."));
}

int Cuda::device_count() const {
  int count = 0;
  const int result = get_device_count_(&count);
  if (result != 0)
    throw usage(text("no GPU can be used here: ", error_string_(result), "."),
                "nvidia-smi tells what the driver sees.");
  return count;
}

void Cuda::use(int device) const { check(set_device_(device), text("cudaSetDevice(", device, ")")); }

std::string Cuda::compute_capability(int device) const {
  int major = 0, minor = 0;
  check(get_attribute_(&major, compute_capability_major, device), "cudaDeviceGetAttribute");
  check(get_attribute_(&minor, compute_capability_minor, device), "cudaDeviceGetAttribute");
  return text(major, ".", minor);
}

std::size_t Cuda::free_bytes() const {
  std::size_t free = 0, total = 0;
  check(mem_get_info_(&free, &total), "cudaMemGetInfo");
  return free;
}

void* Cuda::allocate(std::size_t bytes) const {
  void* memory = nullptr;
  check(malloc_(&memory, bytes), text("cudaMalloc of ", bytes, " bytes"));
  return memory;
}

void Cuda::release(void* device) const { check(free_(device), "cudaFree"); }

void* Cuda::allocate_host(std::size_t bytes) const {
  void* memory = nullptr;
  check(malloc_host_(&memory, bytes), text("cudaMallocHost of ", bytes, " bytes"));
  return memory;
}

void Cuda::release_host(void* host) const { check(free_host_(host), "cudaFreeHost"); }

CudaStream Cuda::make_stream() const {
  CudaStream stream = nullptr;
  check(stream_create_(&stream, non_blocking), "cudaStreamCreateWithFlags");
  return stream;
}

void Cuda::release_stream(CudaStream stream) const {
  check(stream_destroy_(stream), "cudaStreamDestroy");
}

void Cuda::copy(void* to, const void* from, std::size_t bytes, CudaStream stream) const {
  check(memcpy_async_(to, from, bytes, copy_either_way, stream),
        text("cudaMemcpyAsync of ", bytes, " bytes"));
}

void Cuda::wait(CudaStream stream) const {
  check(stream_synchronize_(stream), "cudaStreamSynchronize");
}

DeviceMemory::~DeviceMemory() {
  quietly([this] { cuda_.release(data_); });
}

Lane::Lane(const Cuda& cuda, std::size_t bytes) : cuda_(cuda), stream_(cuda.make_stream()) {
  if (bytes > 0) staging_ = cuda.allocate_host(bytes);
}

Lane::~Lane() {
  if (staging_ != nullptr) quietly([this] { cuda_.release_host(staging_); });
  quietly([this] { cuda_.release_stream(stream_); });
}

}  // namespace cp_run
