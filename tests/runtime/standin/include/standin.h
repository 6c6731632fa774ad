// What the three stand-ins share: a log that tests read, and settings from the environment.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <cstdlib>
#include <functional>
#include <sstream>
#include <string>

struct CUstream_st;

namespace standin {

// One line in $STANDIN_LOG; lines of several threads do not mix.
template <class... Parts>
void log(const Parts&... parts) {
  static const char* const path = std::getenv("STANDIN_LOG");
  if (path == nullptr) return;
  std::ostringstream line;
  (line << ... << parts) << '\n';
  const std::string all = line.str();
  const int file = open(path, O_WRONLY | O_APPEND | O_CREAT, 0644);
  if (write(file, all.data(), all.size()) < 0) std::abort();
  close(file);
}

inline long setting(const char* name, long usual) {
  const char* const value = std::getenv(name);
  return value == nullptr ? usual : std::atol(value);
}

// In libcudart.so.13: work for a stream's thread; a result other than 0 stays with the stream.
void add(CUstream_st* stream, std::function<int()> work);
int current_device();

}  // namespace standin
