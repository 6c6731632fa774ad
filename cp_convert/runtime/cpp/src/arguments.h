// The command line.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace cp_run {

struct Arguments {
  std::string bundle;
  std::string inputs;
  std::optional<std::string> outputs;
  int repeat = 0;                      // forwards that are timed, after the first
  std::optional<std::vector<int>> devices;  // the GPU of every rank; 0, 1, ... otherwise
  double timeout = 60;                 // seconds that ranks wait for one another in one step
  std::optional<std::string> library;  // TensorRT's
  bool verify = true;                  // whether digests are checked
};

// Throws usage errors. Shows the help and exits when asked for it.
Arguments parse(int count, char** words);

}  // namespace cp_run
