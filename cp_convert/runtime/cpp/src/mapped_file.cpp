#include "mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace cp_run {

MappedFile::MappedFile(const std::filesystem::path& path, Error::Kind kind) {
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat state {};
  void* pages = MAP_FAILED;
  if (descriptor >= 0 && fstat(descriptor, &state) == 0) {
    size_ = static_cast<std::size_t>(state.st_size);
    // Nothing cannot be mapped, and nothing need be.
    pages = size_ == 0 ? nullptr : mmap(nullptr, size_, PROT_READ, MAP_SHARED, descriptor, 0);
  }
  const int reason = errno;
  if (descriptor >= 0) close(descriptor);
  if (pages == MAP_FAILED)
    throw Error(kind, text(path.string(), " cannot be read: ", std::strerror(reason), "."));
  data_ = static_cast<const std::byte*>(pages);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<std::byte*>(data_), size_);
}

}  // namespace cp_run
