#include "world.h"

#include <algorithm>
#include <thread>

namespace cp_run {
namespace {

using Clock = std::chrono::steady_clock;
constexpr Seconds grace{2};  // for the others to come back, once communicators are aborted

class World {
 public:
  World(const Shared& shared, const Nccl* nccl, const std::vector<int>& devices, int repeat)
      : shared_(shared), devices_(devices), size_(static_cast<int>(devices.size())),
        repeat_(repeat), communicators_(nccl), gate_(size_), watch_(size_), ranks_(size_),
        seconds_(size_), outputs_(size_) {}

  Ran run(Seconds timeout);

 private:
  void thread_of(int rank);
  void live(int rank);
  void load(int rank);
  void connect(int rank);
  void forward(int rank, int number);
  void close(int rank);
  [[noreturn]] void give_up(const Error& error);
  std::vector<double> slowest() const;

  const Shared& shared_;
  const std::vector<int>& devices_;
  const int size_;
  const int repeat_;
  Communicators communicators_;
  Gate gate_;
  Watch watch_;
  // Here and not in the threads: a rank that fails must not take its context apart while others
  // still compute with its communicator.
  std::vector<std::unique_ptr<Rank>> ranks_;
  std::vector<std::vector<double>> seconds_;  // by rank, by forward
  std::vector<std::vector<std::byte>> outputs_;
  double load_seconds_ = 0;
};

Ran World::run(Seconds timeout) {
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size_; ++rank) threads.emplace_back([this, rank] { thread_of(rank); });
  if (const auto error = watch_.wait(timeout)) give_up(*error);
  for (std::thread& thread : threads) thread.join();
  return {load_seconds_, slowest(), std::move(outputs_)};
}

void World::give_up(const Error& error) {
  gate_.cancel();
  communicators_.abort_all(grace);
  watch_.wait_ended(grace);
  end_with(error);
}

void World::thread_of(int rank) {
  try {
    live(rank);
    watch_.ended(rank);
  } catch (const Error& error) {
    watch_.failed(rank, Error(error.kind, text("rank ", rank, ": ", error.what()), error.hint));
  } catch (const Cancelled&) {
    watch_.ended(rank);
  } catch (const std::exception& error) {  // memory, mostly: the other ranks must hear of it
    watch_.failed(rank, failed(text("rank ", rank, ": ", error.what(), ".")));
  }
}

void World::live(int rank) {
  load(rank);
  connect(rank);
  for (int number = 0; number <= repeat_; ++number) forward(rank, number);
  outputs_[rank] = ranks_[rank]->outputs();
  close(rank);
}

// Nothing is sent to any device before all ranks have found their files right.
void World::load(int rank) {
  const auto start = Clock::now();
  ranks_[rank] = std::make_unique<Rank>(shared_, rank, devices_[rank]);
  if (shared_.verify) shared_.weights.verify(rank, size_);
  ranks_[rank]->load();
  gate_.wait();
  ranks_[rank]->upload();
  gate_.wait();
  if (rank == 0) load_seconds_ = Seconds(Clock::now() - start).count();
}

void World::connect(int rank) {
  if (size_ == 1) return;  // an ordinary engine, which has no communicator
  if (rank == 0) {
    const InStep step(watch_, rank, "ncclCommInitAll");
    communicators_.make(devices_);
  }
  gate_.wait();
  const InStep step(watch_, rank, "setCommunicator");
  ranks_[rank]->set_communicator(communicators_.of(rank));
}

void World::forward(int rank, int number) {
  gate_.wait();
  const auto start = Clock::now();
  {
    const InStep step(watch_, rank, text("enqueueV3 of forward ", number));
    ranks_[rank]->enqueue();
  }
  {
    const InStep step(watch_, rank, text("forward ", number));
    ranks_[rank]->wait();
  }
  seconds_[rank].push_back(Seconds(Clock::now() - start).count());
}

// Every context and engine, then the communicators, then memory and streams.
void World::close(int rank) {
  gate_.wait();
  {
    const InStep step(watch_, rank, "releasing the context");
    ranks_[rank]->close_session();
  }
  gate_.wait();
  if (size_ > 1) {
    const InStep step(watch_, rank, "ncclCommDestroy");
    communicators_.destroy(rank);
  }
  ranks_[rank]->close_memory();
}

std::vector<double> World::slowest() const {
  std::vector<double> all = seconds_[0];
  for (const auto& own : seconds_)
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = std::max(all[i], own[i]);
  return all;
}

}  // namespace

Ran run_world(const Shared& shared, const Nccl* nccl, const std::vector<int>& devices, int repeat,
              Seconds timeout) {
  return World(shared, nccl, devices, repeat).run(timeout);
}

}  // namespace cp_run
