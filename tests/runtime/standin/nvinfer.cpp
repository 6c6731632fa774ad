// A stand-in for libnvinfer.so.11: an "engine" is JSON with bindings and layers, computed in
// float32 on host memory, in the stream's thread; collectives by whatever libnccl.so.2 is there.
//
// "misbehave" makes a rank do what must not happen:
//   {"hang": r}, {"enqueue_hangs": r}, {"enqueue_fails": r}, {"refuse_communicator": r}

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstring>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <thread>
#include <vector>

#include "standin.h"

namespace {

using namespace nvinfer1;
using nlohmann::json;

struct Array {
  std::vector<int64_t> shape;
  std::vector<float> data;
};

const std::map<std::string, std::pair<DataType, int>> types = {
    {"float32", {DataType::kFLOAT, 4}}, {"float16", {DataType::kHALF, 2}},
    {"bfloat16", {DataType::kBF16, 2}}, {"int64", {DataType::kINT64, 8}},
    {"bool", {DataType::kBOOL, 1}}, {"float8_e4m3fn", {DataType::kFP8, 1}},
    {"uint8", {DataType::kUINT8, 1}}, {"float4_e2m1fn_x2", {DataType::kFP4, 1}},
};

// NCCL as TensorRT finds it: by name, when a communicator comes.
struct Nccl {
  Nccl() {
    void* library = dlopen("libnccl.so.2", RTLD_NOW);
    find(rank, library, "ncclCommUserRank");
    find(size, library, "ncclCommCount");
    find(gather, library, "ncclAllGather");
    find(reduce, library, "ncclAllReduce");
    find(exchange, library, "ncclAlltoAll");
  }

  template <class F>
  static void find(F*& function, void* library, const char* name) {
    function = reinterpret_cast<F*>(dlsym(library, name));
  }

  int (*rank)(void*, int*);
  int (*size)(void*, int*);
  int (*gather)(const void*, void*, std::size_t, int, void*, void*);
  int (*reduce)(const void*, void*, std::size_t, int, int, void*, void*);
  int (*exchange)(const void*, void*, std::size_t, int, void*, void*);
};

struct Failure {
  int error;
};

int64_t elements(const std::vector<int64_t>& shape) {
  int64_t all = 1;
  for (const int64_t extent : shape) all *= extent;
  return all;
}

class Context final : public IExecutionContext {
 public:
  Context(const json& engine, ILogger& logger)
      : engine_(engine), logger_(logger), device_(standin::current_device()) {}
  ~Context() noexcept override { standin::log("context gone, device ", device_); }

  bool setTensorAddress(char const* name, void* data) noexcept override {
    if (reinterpret_cast<std::uintptr_t>(data) % 256 != 0) return refuse("the address is not aligned");
    addresses_[name] = data;
    return true;
  }

  bool setCommunicator(void* communicator) noexcept override {
    nccl_ = std::make_unique<Nccl>();
    nccl_->rank(communicator, &rank_);
    nccl_->size(communicator, &size_);
    std::ostringstream thread;
    thread << std::this_thread::get_id();
    standin::log("setCommunicator, rank ", rank_, ", thread ", thread.str());
    if (misbehaves("refuse_communicator")) return refuse("The engine is not a multi-device engine");
    if (communicator_ != nullptr) return refuse("The existing communicator must be null");
    if (size_ != engine_.at("world").get<int>()) return refuse("world_size does not match");
    communicator_ = communicator;
    std::vector<float> all(size_);
    const float own = 0;
    return nccl_->gather(&own, all.data(), 1, 7, communicator, nullptr) == 0;  // waits for all
  }

  bool enqueueV3(cudaStream_t stream) noexcept override {
    for (const json& io : engine_.at("io"))
      if (addresses_.count(io.at("name")) == 0) return refuse("a binding has no address");
    if (size_ != engine_.at("world").get<int>()) return refuse("there is no communicator");
    if (misbehaves("enqueue_fails")) return refuse("launch failed");
    if (misbehaves("enqueue_hangs")) pause();
    standin::add(stream, [this] { return compute(); });
    return true;
  }

 private:
  bool refuse(const char* reason) {
    logger_.log(ILogger::Severity::kERROR, reason);
    return false;
  }

  bool misbehaves(const char* how) const {
    const json& all = engine_.at("misbehave");
    return all.contains(how) && all.at(how).get<int>() == rank_;
  }

  int compute() {
    if (misbehaves("hang")) pause();
    std::map<std::string, Array> values;
    read(values);
    try {
      for (const json& layer : engine_.at("layers")) values[layer.at("out")] = layer_of(layer, values);
    } catch (const Failure& failure) {
      return failure.error;
    }
    return write(values) ? 0 : 1;
  }

  void read(std::map<std::string, Array>& values) const {
    for (const json& io : engine_.at("io")) {
      if (io.at("mode") != "input" || io.at("dtype") != "float32") continue;
      Array array{io.at("shape"), {}};
      const auto* data = static_cast<const float*>(addresses_.at(io.at("name")));
      array.data.assign(data, data + elements(array.shape));
      values[io.at("name")] = array;
    }
  }

  // False when what was computed is not what the manifest promised.
  bool write(const std::map<std::string, Array>& values) const {
    for (const json& io : engine_.at("io")) {
      if (io.at("mode") != "output") continue;
      const auto name = io.at("name").get<std::string>();
      if (io.contains("copy_of")) {  // of any type
        const auto bytes = elements(io.at("shape")) * types.at(io.at("dtype")).second;
        std::memcpy(addresses_.at(name), addresses_.at(io.at("copy_of")), bytes);
      } else {
        const Array& array = values.at(name);
        if (array.data.size() != static_cast<std::size_t>(elements(io.at("shape")))) return false;
        std::memcpy(addresses_.at(name), array.data.data(), 4 * array.data.size());
      }
    }
    return true;
  }

  Array layer_of(const json& layer, const std::map<std::string, Array>& values) const {
    const auto op = layer.at("op").get<std::string>();
    const Array& in = values.at(layer.at("in"));
    if (op == "matmul") return matmul(in, values.at(layer.at("by")));
    if (op == "scale") return scaled(in, layer.at("factor"));
    if (op == "lie") return scaled(in, layer.at("rank") == rank_ ? 1.5F : 1.0F);
    if (op == "rows_of_rank") return rows(in);
    return collective(op, in);
  }

  static Array matmul(const Array& a, const Array& b) {
    const int64_t m = a.shape[0], k = a.shape[1], n = b.shape[1];
    Array out{{m, n}, std::vector<float>(m * n)};
    for (int64_t i = 0; i < m; ++i)
      for (int64_t l = 0; l < k; ++l)
        for (int64_t j = 0; j < n; ++j) out.data[i * n + j] += a.data[i * k + l] * b.data[l * n + j];
    return out;
  }

  static Array scaled(Array in, float factor) {
    for (float& value : in.data) value *= factor;
    return in;
  }

  Array rows(const Array& in) const {
    const std::size_t part = in.data.size() / size_;
    Array out{in.shape, {in.data.begin() + rank_ * part, in.data.begin() + (rank_ + 1) * part}};
    out.shape[0] /= size_;
    return out;
  }

  Array collective(const std::string& op, const Array& in) const {
    Array out = in;
    const std::size_t count = in.data.size();
    int error = 1;
    if (op == "all_gather") {
      out.shape[0] *= size_;
      out.data.resize(count * size_);
      error = nccl_->gather(in.data.data(), out.data.data(), count, 7, communicator_, nullptr);
    } else if (op == "all_reduce") {
      error = nccl_->reduce(in.data.data(), out.data.data(), count, 7, 0, communicator_, nullptr);
    } else if (op == "all_to_all") {
      error = nccl_->exchange(in.data.data(), out.data.data(), count / size_, 7, communicator_, nullptr);
    }
    if (error != 0) throw Failure{719};  // cudaErrorLaunchFailure
    return out;
  }

  const json& engine_;
  ILogger& logger_;
  const int device_;
  std::map<std::string, void*> addresses_;
  std::unique_ptr<Nccl> nccl_;
  void* communicator_ = nullptr;
  int rank_ = 0;
  int size_ = 1;
};

class Engine final : public ICudaEngine {
 public:
  Engine(json description, ILogger& logger)
      : description_(std::move(description)), logger_(logger), device_(standin::current_device()) {}
  ~Engine() noexcept override { standin::log("engine gone, device ", device_); }

  IExecutionContext* createExecutionContext() noexcept override {
    return new Context(description_, logger_);
  }
  int32_t getNbIOTensors() const noexcept override {
    return static_cast<int32_t>(description_.at("io").size());
  }
  TensorIOMode getTensorIOMode(char const* name) const noexcept override {
    const json* io = find(name);
    if (io == nullptr) return TensorIOMode::kNONE;
    return io->at("mode") == "input" ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
  }
  DataType getTensorDataType(char const* name) const noexcept override {
    return types.at(find(name)->at("dtype")).first;
  }
  Dims getTensorShape(char const* name) const noexcept override {
    Dims dims{};
    for (const int64_t extent : find(name)->at("shape")) dims.d[dims.nbDims++] = extent;
    return dims;
  }

 private:
  const json* find(char const* name) const {
    for (const json& io : description_.at("io"))
      if (io.at("name") == name) return &io;
    return nullptr;
  }

  const json description_;
  ILogger& logger_;
  const int device_;
};

class Runtime final : public IRuntime {
 public:
  explicit Runtime(ILogger& logger) : logger_(logger) {}
  ~Runtime() noexcept override { standin::log("runtime gone"); }

  ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept override {
    const auto* text = static_cast<const char*>(blob);
    json description = json::parse(text, text + size, nullptr, false);
    if (!description.is_discarded()) return new Engine(std::move(description), logger_);
    logger_.log(ILogger::Severity::kERROR, "the plan is not one");
    return nullptr;
  }

 private:
  ILogger& logger_;
};

}  // namespace

extern "C" {
std::int32_t getInferLibVersion() {
  return static_cast<std::int32_t>(standin::setting("STANDIN_TENSORRT", NV_TENSORRT_VERSION));
}
void* createInferRuntime_INTERNAL(void* logger, std::int32_t version) {
  return version == NV_TENSORRT_VERSION ? new Runtime(*static_cast<ILogger*>(logger)) : nullptr;
}
}
