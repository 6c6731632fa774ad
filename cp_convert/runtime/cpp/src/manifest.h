// What a bundle's manifest says, as far as running needs it (docs/manifest.md).
#pragma once

#include <algorithm>
#include <filesystem>
#include <optional>

#include "dtype.h"

namespace cp_run {

struct EngineFile {
  std::filesystem::path path;
  std::size_t bytes;
  std::string sha256;
  std::size_t activation_bytes;  // 0 where the builder did not tell
};

// A weight that is an input of the engines: `bytes()` bytes at `offset` of a file.
struct Weight {
  Tensor tensor;
  std::filesystem::path path;
  std::size_t offset;
  std::string sha256;
  std::vector<int> ranks;  // whose input it is; empty: all ranks'

  bool is_of(int rank) const {
    return ranks.empty() || std::find(ranks.begin(), ranks.end(), rank) != ranks.end();
  }
};

struct Manifest {
  std::string model;
  std::string backend;  // "tensorrt" or "tensorrt-rtx"
  std::string version;  // of the TensorRT that built the engines
  std::vector<std::string> compute_capabilities;
  int world;
  std::vector<Tensor> inputs;
  std::vector<Tensor> outputs;
  std::vector<EngineFile> engines;  // by rank
  std::vector<Weight> weights;
  std::optional<double> bound;  // the relative error that the proof allowed a rank
};

// The manifest of a bundle, given by its folder or its manifest. Throws `damaged`.
Manifest read_manifest(const std::filesystem::path& bundle);

}  // namespace cp_run
