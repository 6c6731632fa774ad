// Versions as one number, the way NCCL and TensorRT tell theirs: 10000 major + 100 minor + patch.
#pragma once

#include <string>

namespace cp_run {

inline std::string shown_version(int version) {
  const auto part = [version](int unit) { return std::to_string(version / unit % 100); };
  return part(10000) + "." + part(100) + "." + part(1);
}

}  // namespace cp_run
