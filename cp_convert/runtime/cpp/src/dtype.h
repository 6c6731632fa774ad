// Element types: their names in the manifest, in safetensors and in TensorRT.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include <NvInferRuntime.h>

namespace cp_run {

struct DType {
  const char* name;  // in the manifest: torch's
  const char* safetensors;
  nvinfer1::DataType tensorrt;
  std::size_t bytes;
  double (*read)(const std::byte* element);  // its value
};

// The type of this name in the manifest, or nullptr.
const DType* dtype_named(const std::string& name);

// The type of this name in a safetensors file, or nullptr.
const DType* dtype_in_safetensors(const std::string& name);

// A tensor without numbers: what the manifest says of an input, an output or a weight.
struct Tensor {
  std::string name;
  const DType* dtype;
  std::vector<std::int64_t> shape;

  std::size_t elements() const;
  std::size_t bytes() const { return elements() * dtype->bytes; }
  std::string described() const;  // such as "float16 [1, 2]"
};

// Such as "[1, 2]".
std::string shown(const std::vector<std::int64_t>& shape);

}  // namespace cp_run
