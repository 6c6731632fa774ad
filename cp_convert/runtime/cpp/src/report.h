// What a person reads of a run.
#pragma once

#include "manifest.h"
#include "world.h"

namespace cp_run {

void report(const Manifest& manifest, const std::vector<int>& devices, std::size_t weight_bytes,
            const Ran& ran, double apart);

}  // namespace cp_run
