// A file as memory that is read when it is touched.
#pragma once

#include <cstddef>
#include <filesystem>

#include "errors.h"

namespace cp_run {

class MappedFile {
 public:
  // Throws an error of this kind when the file cannot be read.
  MappedFile(const std::filesystem::path& path, Error::Kind kind);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace cp_run
