// TensorRT or TensorRT-RTX, opened with dlopen: the library, and one rank's engine and context.
#pragma once

#include <memory>
#include <mutex>
#include <optional>

#include "cuda.h"
#include "manifest.h"

namespace cp_run {

class TensorRt {
 public:
  // Opens what the bundle was built with, or the library at `path`.
  // Throws usage errors: it is not there, is another release, or not what cp_run was compiled for.
  TensorRt(const Manifest& manifest, const std::optional<std::string>& path);

  // A run-time of its own for a rank; nullptr when TensorRT refuses.
  std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::ILogger& logger) const;

 private:
  Library library_;
  void* (*create_runtime_)(void*, std::int32_t);
  std::int32_t (*library_version_)();
};

// What TensorRT says: warnings go to stderr, and the last error into the error that it caused.
class Logger : public nvinfer1::ILogger {
 public:
  explicit Logger(int rank) : rank_(rank) {}

  void log(Severity severity, const char* message) noexcept override;
  std::string last_error() const;

 private:
  const int rank_;
  mutable std::mutex lock_;
  std::string last_ = "TensorRT gave no reason";
};

// One rank's engine, its context and its run-time; they go in this order, the context first.
class Session {
 public:
  // Deserialises on the device in use. Throws `failed`.
  Session(const TensorRt& tensorrt, int rank, const std::byte* plan, std::size_t bytes);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // Refuses (`damaged`) an engine whose bindings are not these, and the weights of `rank`.
  void check_bindings(const Manifest& manifest, int rank) const;
  void bind(const std::string& name, void* data);
  // Collective: returns when all ranks have called it. A context takes one communicator, once.
  void set_communicator(void* communicator);
  void enqueue(CudaStream stream);

 private:
  void check_binding(const Tensor& tensor, nvinfer1::TensorIOMode mode) const;
  void require(bool well, const std::string& what) const;

  Logger logger_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
};

}  // namespace cp_run
