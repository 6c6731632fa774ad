// From mapped files to a device, through two page-locked buffers in turn.
#pragma once

#include <array>

#include "cuda.h"

namespace cp_run {

// While one buffer is on its way to the device, the other is filled from the file.
class Upload {
 public:
  explicit Upload(const Cuda& cuda);

  // Returns before the last bytes have arrived; `finish` waits for them.
  void copy(std::byte* to, const std::byte* from, std::size_t bytes);
  void finish();

 private:
  const Cuda& cuda_;
  std::array<Lane, 2> lanes_;
  std::size_t turn_ = 0;
};

}  // namespace cp_run
