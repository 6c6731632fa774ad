// SHA-256 (FIPS 180-4).
#pragma once

#include <cstddef>
#include <string>

namespace cp_run {

// The digest of `size` bytes, as 64 hexadecimal digits.
std::string sha256(const std::byte* data, std::size_t size);

}  // namespace cp_run
