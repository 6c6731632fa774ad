#include "upload.h"

#include <algorithm>
#include <cstring>

namespace cp_run {
namespace {

constexpr std::size_t piece = std::size_t{32} << 20;

}  // namespace

Upload::Upload(const Cuda& cuda) : cuda_(cuda), lanes_{{{cuda, piece}, {cuda, piece}}} {}

void Upload::copy(std::byte* to, const std::byte* from, std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += piece) {
    const Lane& lane = lanes_[turn_++ % lanes_.size()];
    const std::size_t size = std::min(piece, bytes - at);
    cuda_.wait(lane.stream());  // until the buffer is free again
    std::memcpy(lane.staging(), from + at, size);
    cuda_.copy(to + at, lane.staging(), size, lane.stream());
  }
}

void Upload::finish() {
  for (const Lane& lane : lanes_) cuda_.wait(lane.stream());
}

}  // namespace cp_run
