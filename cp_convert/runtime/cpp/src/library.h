// A shared library that is opened when it is needed, and its functions by name.
#pragma once

#include <string>
#include <vector>

namespace cp_run {

// Stays open until the process ends: what it keeps for the GPU must outlive everybody.
class Library {
 public:
  // Opens the first of the names that the loader finds.
  // Throws usage errors; `what` says whose library it is, `hint` what to try.
  Library(const std::string& what, const std::vector<std::string>& names, const std::string& hint);

  // The function of this name; throws usage errors.
  template <class Function>
  void find(Function*& function, const char* name) const {
    function = reinterpret_cast<Function*>(symbol(name));
  }

  // The name under which it was opened.
  const std::string& name() const { return name_; }

 private:
  void* symbol(const char* name) const;

  std::string name_;
  void* handle_ = nullptr;
};

}  // namespace cp_run
