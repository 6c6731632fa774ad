#include "watch.h"

#include <algorithm>
#include <map>

namespace cp_run {
namespace {

constexpr auto look = std::chrono::milliseconds(20);  // how often lateness is looked for

}  // namespace

void Gate::wait() {
  std::unique_lock<std::mutex> held(lock_);
  const long turn = turn_;
  if (++waiting_ == ranks_) {
    waiting_ = 0;
    ++turn_;
    changed_.notify_all();
  }
  changed_.wait(held, [&] { return cancelled_ || turn_ != turn; });
  if (cancelled_) throw Cancelled();
}

void Gate::cancel() {
  const std::lock_guard<std::mutex> held(lock_);
  cancelled_ = true;
  changed_.notify_all();
}

void Watch::enter(int rank, std::string step) {
  const std::lock_guard<std::mutex> held(lock_);
  steps_[rank] = Step{std::move(step), Clock::now()};
}

void Watch::leave(int rank) {
  const std::lock_guard<std::mutex> held(lock_);
  steps_[rank].reset();
}

void Watch::ended(int rank) {
  const std::lock_guard<std::mutex> held(lock_);
  ended_[rank] = true;
  changed_.notify_all();
}

void Watch::failed(int rank, const Error& error) {
  const std::lock_guard<std::mutex> held(lock_);
  if (!error_) error_ = error;  // later ones follow from the first
  ended_[rank] = true;
  changed_.notify_all();
}

std::optional<Error> Watch::wait(Seconds limit) {
  std::unique_lock<std::mutex> held(lock_);
  while (!error_ && !all_ended() && !someone_is_late(limit)) changed_.wait_for(held, look);
  if (!error_ && !all_ended()) error_ = late(limit);
  return error_;
}

void Watch::wait_ended(Seconds limit) {
  std::unique_lock<std::mutex> held(lock_);
  changed_.wait_for(held, limit, [this] { return all_ended(); });
}

bool Watch::all_ended() const {
  return std::all_of(ended_.begin(), ended_.end(), [](bool one) { return one; });
}

bool Watch::someone_is_late(Seconds limit) const {
  const auto now = Clock::now();
  return std::any_of(steps_.begin(), steps_.end(),
                     [&](const auto& step) { return step && now - step->since > limit; });
}

Error Watch::late(Seconds limit) const {
  std::map<std::string, std::string> ranks_by_step;
  for (std::size_t rank = 0; rank < steps_.size(); ++rank) {
    const std::string step = steps_[rank] ? steps_[rank]->name : "no collective step";
    std::string& ranks = ranks_by_step[step];
    ranks += text(ranks.empty() ? "rank " : ", ", rank);
  }
  std::string where;
  for (const auto& [step, ranks] : ranks_by_step)
    where += text(where.empty() ? "" : "; ", ranks, " in ", step);
  return cp_run::failed(text("ranks waited for one another for more than ", limit.count(), " s: ", where, "."),
                        "a larger --timeout, if a forward may take that long; else look at the rank "
                        "that is elsewhere than the others.");
}

}  // namespace cp_run
