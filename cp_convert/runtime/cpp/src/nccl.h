// NCCL, opened with dlopen, and the communicators of one process.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <vector>

#include "library.h"

namespace cp_run {

class Nccl {
 public:
  // Throws usage errors: NCCL is not there, or older than TensorRT's collectives need.
  Nccl();

  // One communicator a rank, on these devices. Throws `failed`, as the next one does.
  std::vector<void*> make(const std::vector<int>& devices) const;
  void destroy(void* communicator) const;
  // Makes whoever waits in the communicator return with an error. Its result is of no use.
  void abort(void* communicator) const { comm_abort_(communicator); }

 private:
  // NCCL's ncclResult_t is passed as an integer: ncclSuccess is 0.
  void check(int result, const char* what) const;

  Library library_;
  const char* (*error_string_)(int);
  int (*get_version_)(int*);
  int (*comm_init_all_)(void**, int, const int*);
  int (*comm_destroy_)(void*);
  int (*comm_abort_)(void*);
};

// The communicators of all ranks; several threads may ask.
class Communicators {
 public:
  // `nccl` may be null for a world of 1, which has none.
  explicit Communicators(const Nccl* nccl) : nccl_(nccl) {}

  void make(const std::vector<int>& devices);
  void* of(int rank) const;
  void destroy(int rank);
  // One thread each, for an abort may wait for the other ranks' abort, or hang like all else:
  // they are waited for so long at most. This object must live until the process ends.
  void abort_all(std::chrono::duration<double> limit);

 private:
  void abort(void* communicator);

  const Nccl* nccl_;
  mutable std::mutex lock_;
  std::vector<void*> all_;
  std::size_t aborting_ = 0;
  std::condition_variable aborted_;
};

}  // namespace cp_run
