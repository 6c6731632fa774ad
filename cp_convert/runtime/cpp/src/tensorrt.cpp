#include "tensorrt.h"

#include <cstdio>

#include "errors.h"
#include "version.h"

namespace cp_run {
namespace {

// TensorRT-RTX counts from 1, TensorRT is at 11; the headers tell which of the two they are of.
constexpr bool headers_are_rtx = NV_TENSORRT_MAJOR < 8;
constexpr const char* product = headers_are_rtx ? "tensorrt-rtx" : "tensorrt";

std::vector<std::string> names(const std::optional<std::string>& path) {
  if (path) return {*path};
  const std::string major = std::to_string(NV_TENSORRT_MAJOR);
  return {(headers_are_rtx ? "libtensorrt_rtx.so." : "libnvinfer.so.") + major};
}

// The headers' classes are one product's: its engines are the ones that can be run.
const std::optional<std::string>& checked(const Manifest& manifest,
                                          const std::optional<std::string>& path) {
  if (manifest.backend != product)
    throw usage(text("the engines are of ", manifest.backend, ", and this cp_run was compiled with the "
                     "headers of ", product, "."),
                text("compile another one with -DTENSORRT_INCLUDE= the headers of ", manifest.backend, "."));
  return path;
}

bool begins_with(const std::string& whole, const std::string& start) {
  return whole == start || whole.rfind(start + ".", 0) == 0;
}

bool equal(const nvinfer1::Dims& dims, const std::vector<std::int64_t>& shape) {
  if (dims.nbDims != static_cast<std::int32_t>(shape.size())) return false;
  for (std::size_t i = 0; i < shape.size(); ++i)
    if (dims.d[i] != shape[i]) return false;
  return true;
}

// The shape that an engine tells of a tensor that it takes by this type; {-1} where it cannot.
// Codes of 4 bits lie in bytes, two in each, and an engine counts the codes.
std::vector<std::int64_t> counted(const Tensor& tensor, nvinfer1::DataType type) {
  if (type == tensor.dtype->tensorrt) return tensor.shape;
  if (type != nvinfer1::DataType::kFP4 || tensor.dtype->tensorrt != nvinfer1::DataType::kUINT8)
    return {-1};
  auto shape = tensor.shape;
  if (!shape.empty()) shape.back() *= 2;
  return shape;
}

}  // namespace

TensorRt::TensorRt(const Manifest& manifest, const std::optional<std::string>& path)
    : library_(product, names(checked(manifest, path)),
               "name its folder in LD_LIBRARY_PATH, or the file with --library.") {
  library_.find(create_runtime_, "createInferRuntime_INTERNAL");
  library_.find(library_version_, "getInferLibVersion");
  const std::string version = shown_version(library_version_());
  if (!begins_with(manifest.version, version))
    throw usage(text("the engines were built by ", product, " ", manifest.version, ", and ",
                     library_.name(), " is ", version, ": a plan belongs to its release."),
                text("install ", product, " ", manifest.version, ", or convert again."));
}

std::unique_ptr<nvinfer1::IRuntime> TensorRt::runtime(nvinfer1::ILogger& logger) const {
  return std::unique_ptr<nvinfer1::IRuntime>(
      static_cast<nvinfer1::IRuntime*>(create_runtime_(&logger, NV_TENSORRT_VERSION)));
}

void Logger::log(Severity severity, const char* message) noexcept {
  if (severity > Severity::kWARNING) return;
  const std::lock_guard<std::mutex> held(lock_);
  if (severity == Severity::kWARNING)
    std::fprintf(stderr, "rank %d: %s\n", rank_, message);
  else
    last_ = message;
}

std::string Logger::last_error() const {
  const std::lock_guard<std::mutex> held(lock_);
  return last_;
}

Session::Session(const TensorRt& tensorrt, int rank, const std::byte* plan, std::size_t bytes)
    : logger_(rank), runtime_(tensorrt.runtime(logger_)) {
  require(runtime_ != nullptr, "createInferRuntime");
  engine_.reset(runtime_->deserializeCudaEngine(plan, bytes));
  require(engine_ != nullptr, "deserializeCudaEngine");
  context_.reset(engine_->createExecutionContext());
  require(context_ != nullptr, "createExecutionContext");
}

Session::~Session() = default;  // members go in the reverse of their order

void Session::require(bool well, const std::string& what) const {
  if (!well) throw failed(text(what, " failed: ", logger_.last_error(), "."));
}

void Session::check_bindings(const Manifest& manifest, int rank) const {
  auto known = manifest.inputs.size() + manifest.outputs.size();
  for (const Tensor& input : manifest.inputs) check_binding(input, nvinfer1::TensorIOMode::kINPUT);
  for (const Weight& weight : manifest.weights) {
    if (!weight.is_of(rank)) continue;
    check_binding(weight.tensor, nvinfer1::TensorIOMode::kINPUT);
    ++known;
  }
  for (const Tensor& output : manifest.outputs)
    check_binding(output, nvinfer1::TensorIOMode::kOUTPUT);
  const auto count = engine_->getNbIOTensors();
  if (static_cast<std::size_t>(count) != known)
    throw damaged(text("the engine has ", count, " bindings, the manifest ", known, "."));
}

void Session::check_binding(const Tensor& tensor, nvinfer1::TensorIOMode mode) const {
  const char* name = tensor.name.c_str();
  if (engine_->getTensorIOMode(name) != mode)
    throw damaged(text("the engine has no ",
                       mode == nvinfer1::TensorIOMode::kINPUT ? "input " : "output ", name, "."));
  const auto type = engine_->getTensorDataType(name);
  if (!equal(engine_->getTensorShape(name), counted(tensor, type)))
    throw damaged(text("the engine has another ", name, " than the manifest's ",
                       tensor.described(), "."));
}

void Session::bind(const std::string& name, void* data) {
  require(context_->setTensorAddress(name.c_str(), data), "setTensorAddress of " + name);
}

void Session::set_communicator(void* communicator) {
  // An engine that goes on without its communicator computes something else, silently.
  require(context_->setCommunicator(communicator), "setCommunicator");
}

void Session::enqueue(CudaStream stream) { require(context_->enqueueV3(stream), "enqueueV3"); }

}  // namespace cp_run
