// External weights: their files, checked once, and where each one lies on every device.
#pragma once

#include <map>
#include <memory>
#include <tuple>
#include <vector>

#include "manifest.h"
#include "mapped_file.h"
#include "upload.h"

namespace cp_run {

class Weights {
 public:
  using Source = std::tuple<std::string, std::size_t, std::size_t>;  // file, offset, bytes

  // Maps the files. Throws `damaged`: a file is missing, or ends too early.
  explicit Weights(const std::vector<Weight>& weights);

  // Compares every `step`-th piece with its digest, from the `first` on: ranks share the work.
  // Throws `damaged`.
  void verify(std::size_t first, std::size_t step) const;

  static Source source(const Weight& weight);

  // Bytes of a rank's pieces on its device.
  std::size_t bytes(int rank) const;

  // Uploads every piece of a rank once, tied weights as one; returns where each lies, at multiples
  // of 256 behind `to`.
  std::map<Source, std::byte*> upload(Upload& upload, int rank, std::byte* to) const;

 private:
  struct Piece {
    std::vector<const Weight*> weights;  // those that share it
    const std::byte* data;

    bool is_of(int rank) const;
  };

  void add(const Weight& weight);

  std::map<std::string, std::unique_ptr<MappedFile>> files_;
  std::vector<Piece> pieces_;
  std::map<Source, std::size_t> by_source_;  // the piece
};

// The next multiple of 256, as TensorRT wants addresses.
inline std::size_t aligned(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace cp_run
