#include "nccl.h"

#include <thread>

#include "errors.h"
#include "version.h"

namespace cp_run {
namespace {

// TensorRT takes ncclAlltoAll from NCCL, which is there from this version on.
constexpr int needed = 22803;  // 2.28.3, as NCCL counts

}  // namespace

Nccl::Nccl()
    : library_("NCCL", {"libnccl.so.2", "libnccl.so"},
               "install NCCL 2.28.3 or later and name its folder in LD_LIBRARY_PATH.") {
  library_.find(error_string_, "ncclGetErrorString");
  library_.find(get_version_, "ncclGetVersion");
  library_.find(comm_init_all_, "ncclCommInitAll");
  library_.find(comm_destroy_, "ncclCommDestroy");
  library_.find(comm_abort_, "ncclCommAbort");
  int version = 0;
  check(get_version_(&version), "ncclGetVersion");
  if (version < needed)
    throw usage(text("NCCL is ", shown_version(version), "; TensorRT's collectives need ",
                     shown_version(needed), " or later."),
                "name the folder of a later libnccl.so.2 in LD_LIBRARY_PATH.");
}

void Nccl::check(int result, const char* what) const {
  if (result != 0) throw failed(text(what, ": ", error_string_(result), "."));
}

std::vector<void*> Nccl::make(const std::vector<int>& devices) const {
  std::vector<void*> all(devices.size());
  check(comm_init_all_(all.data(), static_cast<int>(devices.size()), devices.data()),
        "ncclCommInitAll");
  return all;
}

void Nccl::destroy(void* communicator) const { check(comm_destroy_(communicator), "ncclCommDestroy"); }

void Communicators::make(const std::vector<int>& devices) {
  std::vector<void*> made = nccl_->make(devices);  // may hang: not under the lock
  const std::lock_guard<std::mutex> held(lock_);
  all_ = std::move(made);
}

void* Communicators::of(int rank) const {
  const std::lock_guard<std::mutex> held(lock_);
  return all_.at(rank);
}

void Communicators::destroy(int rank) {
  nccl_->destroy(of(rank));
  const std::lock_guard<std::mutex> held(lock_);
  all_[rank] = nullptr;
}

void Communicators::abort_all(std::chrono::duration<double> limit) {
  std::unique_lock<std::mutex> held(lock_);
  for (void* one : all_) {
    if (one == nullptr) continue;
    ++aborting_;
    std::thread([this, one] { abort(one); }).detach();
  }
  aborted_.wait_for(held, limit, [this] { return aborting_ == 0; });
}

void Communicators::abort(void* communicator) {
  nccl_->abort(communicator);
  const std::lock_guard<std::mutex> held(lock_);
  --aborting_;
  aborted_.notify_all();
}

}  // namespace cp_run
