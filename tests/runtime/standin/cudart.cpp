// A stand-in for libcudart.so.13: devices are host memory, a stream is a thread with a queue.

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>

#include "standin.h"

namespace {

thread_local int device = 0;
std::atomic<int> live{0};  // allocations and streams that were not released

int count() { return static_cast<int>(standin::setting("STANDIN_GPUS", 4)); }

int take(void** memory, std::size_t bytes) {
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  ++live;
  return *memory == nullptr ? 2 : 0;
}

int give(void* memory) {
  std::free(memory);
  standin::log("released, ", --live, " left");
  return 0;
}

}  // namespace

struct CUstream_st {
  CUstream_st() : thread([this] { work(); }) {}
  ~CUstream_st() {
    {
      const std::lock_guard<std::mutex> held(lock);
      ending = true;
    }
    changed.notify_all();
    thread.join();
  }

  void work() {
    std::unique_lock<std::mutex> held(lock);
    for (;;) {
      changed.wait(held, [this] { return ending || !queue.empty(); });
      if (queue.empty()) return;
      held.unlock();
      const int result = queue.front()();
      held.lock();
      if (result != 0 && error == 0) error = result;
      queue.pop_front();
      changed.notify_all();
    }
  }

  int synchronize() {
    std::unique_lock<std::mutex> held(lock);
    changed.wait(held, [this] { return queue.empty(); });
    return error;
  }

  std::mutex lock;
  std::condition_variable changed;
  std::deque<std::function<int()>> queue;
  bool ending = false;
  int error = 0;
  std::thread thread;  // last: it uses the others
};

namespace standin {

void add(CUstream_st* stream, std::function<int()> work) {
  const std::lock_guard<std::mutex> held(stream->lock);
  stream->queue.push_back(std::move(work));
  stream->changed.notify_all();
}

int current_device() { return device; }

}  // namespace standin

extern "C" {

const char* cudaGetErrorString(int error) {
  return error == 35 ? "CUDA driver version is insufficient" : error == 2 ? "out of memory" : error == 101 ? "invalid device ordinal" : "unspecified launch failure";
}

int cudaGetDeviceCount(int* found) {
  *found = count();
  return *found == 0 ? 35 : 0;
}

int cudaSetDevice(int wanted) {
  if (wanted < 0 || wanted >= count()) return 101;
  device = wanted;
  return 0;
}

int cudaDeviceGetAttribute(int* value, int attribute, int) {
  *value = static_cast<int>(attribute == 75 ? standin::setting("STANDIN_MAJOR", 8)
                                            : standin::setting("STANDIN_MINOR", 9));
  return 0;
}

int cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  *free = *total = static_cast<std::size_t>(standin::setting("STANDIN_FREE", 8'000'000'000));
  return 0;
}

int cudaMalloc(void** memory, std::size_t bytes) {
  if (static_cast<long>(bytes) > standin::setting("STANDIN_LARGEST", 1L << 40)) return 2;
  return take(memory, bytes);
}
int cudaFree(void* memory) { return give(memory); }
int cudaMallocHost(void** memory, std::size_t bytes) { return take(memory, bytes); }
int cudaFreeHost(void* memory) { return give(memory); }

int cudaStreamCreateWithFlags(CUstream_st** stream, unsigned) {
  *stream = new CUstream_st;
  ++live;
  return 0;
}

int cudaStreamDestroy(CUstream_st* stream) {
  delete stream;
  standin::log("released, ", --live, " left");
  return 0;
}

int cudaStreamSynchronize(CUstream_st* stream) { return stream->synchronize(); }

int cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, int, CUstream_st* stream) {
  standin::log("copy of ", bytes, " bytes, device ", device);
  standin::add(stream, [=] {
    std::memcpy(to, from, bytes);
    return 0;
  });
  return 0;
}
}
