// Whether outputs are numbers, and the same on all ranks.
#pragma once

#include <vector>

#include "manifest.h"

namespace cp_run {

// The largest difference between any rank's outputs and rank 0's, over the largest number of
// that output. `outputs` are by rank, as Rank::outputs gives them.
// Throws `failed`: an output holds NaN or infinity, or ranks differ by more than the proof allows.
double check_outputs(const Manifest& manifest, const std::vector<std::vector<std::byte>>& outputs);

}  // namespace cp_run
