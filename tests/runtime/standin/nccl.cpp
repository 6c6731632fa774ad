// A stand-in for libnccl.so.2: ranks are threads, a collective is two barriers around reading the
// others' memory. An abort makes whoever waits return with an error, now and later.

#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "standin.h"

namespace {

struct Group {
  explicit Group(int size) : size(size), sent(size) {}

  // Waits for all ranks; false when the group was aborted.
  bool meet() {
    std::unique_lock<std::mutex> held(lock);
    const long turn = turns;
    if (++waiting == size) {
      waiting = 0;
      ++turns;
      changed.notify_all();
    }
    changed.wait(held, [&] { return aborted || turns != turn; });
    return !aborted;
  }

  void abort() {
    const std::lock_guard<std::mutex> held(lock);
    aborted = true;
    changed.notify_all();
  }

  const int size;
  std::vector<const float*> sent;
  std::mutex lock;
  std::condition_variable changed;
  int waiting = 0;
  long turns = 0;
  bool aborted = false;
};

}  // namespace

struct Communicator {
  std::shared_ptr<Group> group;
  int rank;

  // Shows the others what is sent, lets this rank read theirs, and waits until all have read.
  template <class Read>
  int exchange(const void* send, Read read) {
    group->sent[rank] = static_cast<const float*>(send);
    if (!group->meet()) return 6;
    read();
    return group->meet() ? 0 : 6;
  }
};

extern "C" {

const char* ncclGetErrorString(int error) {
  return error == 6 ? "remote process exited or there was a network error" : "internal error";
}

int ncclGetVersion(int* version) {
  *version = static_cast<int>(standin::setting("STANDIN_NCCL", 22803));
  return 0;
}

int ncclCommInitAll(Communicator** all, int size, const int* devices) {
  if (standin::setting("STANDIN_INIT_FAILS", 0) != 0) return 3;
  const auto group = std::make_shared<Group>(size);
  for (int rank = 0; rank < size; ++rank) {
    all[rank] = new Communicator{group, rank};
    standin::log("communicator of rank ", rank, ", device ", devices[rank]);
  }
  return 0;
}

int ncclCommUserRank(Communicator* communicator, int* rank) {
  *rank = communicator->rank;
  return 0;
}

int ncclCommCount(Communicator* communicator, int* size) {
  *size = communicator->group->size;
  return 0;
}

int ncclCommDestroy(Communicator* communicator) {
  if (standin::setting("STANDIN_DESTROY_HANGS", -1) == communicator->rank) pause();
  standin::log("communicator destroyed, rank ", communicator->rank);
  delete communicator;
  return 0;
}

int ncclCommAbort(Communicator* communicator) {
  standin::log("communicator aborted, rank ", communicator->rank);
  communicator->group->abort();
  return 0;
}

// Counts are of floats, for the stand-in computes in float32 alone; work is done when called.
int ncclAllGather(const void* send, void* receive, std::size_t count, int, Communicator* c, void*) {
  return c->exchange(send, [&] {
    for (int rank = 0; rank < c->group->size; ++rank)
      std::memcpy(static_cast<float*>(receive) + rank * count, c->group->sent[rank], 4 * count);
  });
}

int ncclAllReduce(const void* send, void* receive, std::size_t count, int, int, Communicator* c, void*) {
  return c->exchange(send, [&] {
    for (std::size_t i = 0; i < count; ++i) {
      float sum = 0;
      for (const float* one : c->group->sent) sum += one[i];
      static_cast<float*>(receive)[i] = sum;
    }
  });
}

int ncclAlltoAll(const void* send, void* receive, std::size_t count, int, Communicator* c, void*) {
  return c->exchange(send, [&] {
    for (int rank = 0; rank < c->group->size; ++rank)
      std::memcpy(static_cast<float*>(receive) + rank * count,
                  c->group->sent[rank] + c->rank * count, 4 * count);
  });
}
}
