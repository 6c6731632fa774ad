#include "compare.h"

#include <algorithm>
#include <cmath>

#include "errors.h"

namespace cp_run {
namespace {

constexpr double without_a_proof = 0.01;

void check_finite(const Tensor& output, const std::byte* data, std::size_t rank) {
  std::size_t bad = 0;
  for (std::size_t i = 0; i < output.elements(); ++i)
    if (!std::isfinite(output.dtype->read(data + i * output.dtype->bytes))) ++bad;
  if (bad > 0)
    throw failed(text("output ", output.name, " of rank ", rank, " holds ", bad, " of ",
                      output.elements(), " numbers that are NaN or infinite."),
                 "look at the inputs first; fp16 may overflow where bf16 does not.");
}

double difference(const Tensor& output, const std::byte* one, const std::byte* other) {
  double largest = 0, apart = 0;
  for (std::size_t i = 0; i < output.elements(); ++i) {
    const double a = output.dtype->read(one + i * output.dtype->bytes);
    const double b = output.dtype->read(other + i * output.dtype->bytes);
    largest = std::max(largest, std::abs(a));
    apart = std::max(apart, std::abs(a - b));
  }
  return apart == 0 ? 0 : apart / (largest == 0 ? 1 : largest);
}

}  // namespace

double check_outputs(const Manifest& manifest, const std::vector<std::vector<std::byte>>& outputs) {
  // Each of two ranks may be a bound away from what is right.
  const double allowed = manifest.bound ? 2 * *manifest.bound : without_a_proof;
  double most = 0;
  std::size_t at = 0;
  for (const Tensor& output : manifest.outputs) {
    for (std::size_t rank = 0; rank < outputs.size(); ++rank) {
      const std::byte* own = outputs[rank].data() + at;
      check_finite(output, own, rank);
      const double apart = difference(output, outputs[0].data() + at, own);
      most = std::max(most, apart);
      if (apart > allowed)
        throw failed(text("output ", output.name, " of rank ", rank, " differs from rank 0's by ", apart,
                          " of its largest number; the proof allows ", allowed, "."),
                     "an engine of another rank or bundle, or collectives over the wrong ranks "
                     "(TensorRT before 11.4 with groups).");
    }
    at += output.bytes();
  }
  return most;
}

}  // namespace cp_run
