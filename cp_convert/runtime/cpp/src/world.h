// All ranks together: one thread each, from the files to the outputs, and back in order.
#pragma once

#include "nccl.h"
#include "rank.h"
#include "watch.h"

namespace cp_run {

struct Ran {
  double load_seconds;                          // engines and weights
  std::vector<double> forward_seconds;          // of the slowest rank; the first one first
  std::vector<std::vector<std::byte>> outputs;  // by rank
};

// Runs 1 + `repeat` forwards; `nccl` may be null for a world of 1. When a rank fails, or is late, the process ends with that error:
// communicators are aborted, and nothing else is taken apart.
Ran run_world(const Shared& shared, const Nccl* nccl, const std::vector<int>& devices, int repeat,
              Seconds timeout);

}  // namespace cp_run
