#include "report.h"

#include <algorithm>
#include <cstdio>

namespace cp_run {
namespace {

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

}  // namespace

void report(const Manifest& manifest, const std::vector<int>& devices, std::size_t weight_bytes,
            const Ran& ran, double apart) {
  std::string gpus;
  for (const int device : devices) gpus += (gpus.empty() ? "" : ", ") + std::to_string(device);
  std::printf("%s: ranks %d, GPUs %s, %s %s\n", manifest.model.c_str(), manifest.world, gpus.c_str(),
              manifest.backend.c_str(), manifest.version.c_str());
  std::printf("load: %.2f s, external weights %.2f GB a rank\n", ran.load_seconds,
              static_cast<double>(weight_bytes) / 1e9);
  std::printf("first forward: %.2f ms\n", 1e3 * ran.forward_seconds[0]);
  const std::vector<double> timed(ran.forward_seconds.begin() + 1, ran.forward_seconds.end());
  if (!timed.empty())
    std::printf("%zu forwards, slowest rank: median %.2f ms, from %.2f to %.2f ms\n", timed.size(),
                1e3 * median(timed), 1e3 * *std::min_element(timed.begin(), timed.end()),
                1e3 * *std::max_element(timed.begin(), timed.end()));
  std::printf("outputs: %d ranks agree, largest relative difference %.2e\n", manifest.world, apart);
}

}  // namespace cp_run
