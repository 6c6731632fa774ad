// Safetensors files: 8 bytes of length (little-endian), as many of JSON, then the numbers.
#pragma once

#include <filesystem>
#include <map>
#include <memory>

#include "dtype.h"
#include "mapped_file.h"

namespace cp_run {

// A file's tensors; their numbers stay in the mapped file.
class Safetensors {
 public:
  struct View {
    Tensor tensor;
    const std::byte* data;
  };

  // Throws usage errors: the file is the user's.
  explicit Safetensors(const std::filesystem::path& path);

  const std::map<std::string, View>& tensors() const { return tensors_; }

 private:
  MappedFile file_;
  std::map<std::string, View> tensors_;
};

// The views of exactly these tensors, in this order.
// Throws usage errors: a name is missing or unknown, a type or shape is another.
std::vector<Safetensors::View> matched(const Safetensors& file, const std::vector<Tensor>& wanted);

// Refuses (usage), before any work, a file that could not be written in the end.
void check_writable(const std::filesystem::path& path);

// Writes a file whole or not at all. Throws usage errors.
void write_safetensors(const std::filesystem::path& path,
                       const std::vector<Safetensors::View>& tensors);

}  // namespace cp_run
