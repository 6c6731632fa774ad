#include "library.h"

#include <dlfcn.h>

#include "errors.h"

namespace cp_run {

Library::Library(const std::string& what, const std::vector<std::string>& names,
                 const std::string& hint) {
  std::string reasons;
  for (const std::string& name : names) {
    // Global: TensorRT opens NCCL by itself and must find the one that is here.
    handle_ = dlopen(name.c_str(), RTLD_NOW | RTLD_GLOBAL);
    name_ = name;
    if (handle_ != nullptr) return;
    reasons += text(reasons.empty() ? "" : "; ", dlerror());
  }
  throw usage(text(what, " cannot be opened: ", reasons, "."), hint);
}

void* Library::symbol(const char* name) const {
  void* found = dlsym(handle_, name);
  if (found == nullptr) throw usage(text(name_, " has no function ", name, "; it is too old."));
  return found;
}

}  // namespace cp_run
