#include "errors.h"

#include <cstdio>
#include <cstdlib>

namespace cp_run {
namespace {

const char* title(Error::Kind kind) {
  switch (kind) {
    case Error::Kind::usage: return "Not a usable request";
    case Error::Kind::damaged: return "Damaged bundle";
    case Error::Kind::failed: return "The run failed";
  }
  return "Error";
}

}  // namespace

void end_with(const Error& error) {
  std::fflush(stdout);
  std::fprintf(stderr, "%s: %s\n", title(error.kind), error.what());
  if (!error.hint.empty()) std::fprintf(stderr, "  try    %s\n", error.hint.c_str());
  std::fflush(stderr);
  std::_Exit(static_cast<int>(error.kind));
}

}  // namespace cp_run
