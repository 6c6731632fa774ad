// External weights: their files, checked once, and where each one lies on every device.
#pragma once

#include <map>
#include <memory>
#include <tuple>

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

  // Bytes of all pieces on a device.
  std::size_t bytes() const { return bytes_; }

  // Uploads every piece once; tied weights are one.
  void upload(Upload& upload, std::byte* to) const;

  // Where a weight lies behind the start of the device's memory: a multiple of 256.
  std::size_t place(const Weight& weight) const;

 private:
  struct Piece {
    const Weight* weight;  // the first of those that share it
    const std::byte* data;
    std::size_t place;
  };

  void add(const Weight& weight);

  std::map<std::string, std::unique_ptr<MappedFile>> files_;
  std::vector<Piece> pieces_;
  std::map<Source, std::size_t> by_source_;  // the piece
  std::size_t bytes_ = 0;
};

// The next multiple of 256, as TensorRT wants addresses.
inline std::size_t aligned(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace cp_run
