// What the ranks' threads do, seen from the main thread: who waits where, and for how long.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "errors.h"

namespace cp_run {

using Seconds = std::chrono::duration<double>;

// What a rank's thread meets when another rank has failed: it ends without words of its own.
struct Cancelled {};

// A place where every rank's thread waits for all others.
class Gate {
 public:
  explicit Gate(int ranks) : ranks_(ranks) {}

  // Throws Cancelled when a rank has failed, now or later.
  void wait();
  void cancel();

 private:
  const int ranks_;
  int waiting_ = 0;
  long turn_ = 0;
  bool cancelled_ = false;
  std::mutex lock_;
  std::condition_variable changed_;
};

// Who is in which step since when. Only steps in which ranks wait for one another are told to it.
class Watch {
 public:
  explicit Watch(int ranks) : steps_(ranks), ended_(ranks, false) {}

  void enter(int rank, std::string step);
  void leave(int rank);
  void ended(int rank);
  void failed(int rank, const Error& error);

  // Waits for all ranks. The first error, or one that says who is late in which step.
  std::optional<Error> wait(Seconds limit);
  // Waits for all ranks to end, for so long at most.
  void wait_ended(Seconds limit);

 private:
  using Clock = std::chrono::steady_clock;
  struct Step {
    std::string name;
    Clock::time_point since;
  };

  bool all_ended() const;
  bool someone_is_late(Seconds limit) const;
  Error late(Seconds limit) const;

  std::vector<std::optional<Step>> steps_;
  std::vector<bool> ended_;
  std::optional<Error> error_;
  std::mutex lock_;
  std::condition_variable changed_;
};

// A step of a rank, as long as this lives.
class InStep {
 public:
  InStep(Watch& watch, int rank, std::string step) : watch_(watch), rank_(rank) {
    watch.enter(rank, std::move(step));
  }
  ~InStep() { watch_.leave(rank_); }
  InStep(const InStep&) = delete;
  InStep& operator=(const InStep&) = delete;

 private:
  Watch& watch_;
  const int rank_;
};

}  // namespace cp_run
