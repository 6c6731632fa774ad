// Everything that can go wrong for a user, with the exit codes of cp_convert/errors.py.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace cp_run {

// A mistake or limit that is explained; what was thrown is shown by main and ends the process.
class Error : public std::runtime_error {
 public:
  // The value is the exit code.
  enum class Kind { usage = 2, damaged = 6, failed = 7 };

  Error(Kind kind, const std::string& message, std::string hint = "")
      : std::runtime_error(message), kind(kind), hint(std::move(hint)) {}

  Kind kind;
  std::string hint;  // what to try next, or nothing
};

// All arguments one after another, as text.
template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// The request cannot be carried out as it was written.
inline Error usage(const std::string& message, std::string hint = "") {
  return Error(Error::Kind::usage, message, std::move(hint));
}

// A bundle, or a file that it names, is incomplete or altered.
inline Error damaged(const std::string& message, std::string hint = "") {
  return Error(Error::Kind::damaged, message, std::move(hint));
}

// The ranks started and did not come to a right end.
inline Error failed(const std::string& message, std::string hint = "") {
  return Error(Error::Kind::failed, message, std::move(hint));
}

// Shows the error on stderr and ends the process at once with its exit code. Nothing is taken
// apart: other threads may hang in a collective, and what they hold dies with the process.
[[noreturn]] void end_with(const Error& error);

}  // namespace cp_run
