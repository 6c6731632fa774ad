#include "dtype.h"

#include <cmath>
#include <cstring>
#include <iterator>

#include "errors.h"

namespace cp_run {
namespace {

template <class T>
double plain(const std::byte* element) {
  T value;
  std::memcpy(&value, element, sizeof value);
  return static_cast<double>(value);
}

// bfloat16 is the upper half of a float.
double bfloat16(const std::byte* element) {
  std::uint16_t half;
  std::memcpy(&half, element, sizeof half);
  const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// IEEE half precision: one sign bit, 5 bits of exponent with bias 15, 10 of fraction.
double float16(const std::byte* element) {
  std::uint16_t bits;
  std::memcpy(&bits, element, sizeof bits);
  const int exponent = (bits >> 10) & 31;
  const int fraction = bits & 1023;
  double size = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(fraction + 1024, exponent - 25);
  if (exponent == 31) size = fraction != 0 ? std::nan("") : INFINITY;
  return (bits >> 15) != 0 ? -size : size;
}

// E4M3: one sign bit, 4 bits of exponent with bias 7, 3 of fraction; no infinity.
double float8_e4m3fn(const std::byte* element) {
  const int bits = std::to_integer<int>(*element);
  const int exponent = (bits >> 3) & 15;
  const int fraction = bits & 7;
  double size = exponent == 0 ? std::ldexp(fraction, -9) : std::ldexp(fraction + 8, exponent - 10);
  if ((bits & 127) == 127) size = std::nan("");
  return (bits >> 7) != 0 ? -size : size;
}

using nvinfer1::DataType;

constexpr DType types[] = {
    {"float32", "F32", DataType::kFLOAT, 4, plain<float>},
    {"float16", "F16", DataType::kHALF, 2, float16},
    {"bfloat16", "BF16", DataType::kBF16, 2, bfloat16},
    {"float8_e4m3fn", "F8_E4M3", DataType::kFP8, 1, float8_e4m3fn},
    {"int64", "I64", DataType::kINT64, 8, plain<std::int64_t>},
    {"int32", "I32", DataType::kINT32, 4, plain<std::int32_t>},
    {"int8", "I8", DataType::kINT8, 1, plain<std::int8_t>},
    {"uint8", "U8", DataType::kUINT8, 1, plain<std::uint8_t>},
    {"bool", "BOOL", DataType::kBOOL, 1, plain<std::uint8_t>},
};

}  // namespace

const DType* dtype_named(const std::string& name) {
  for (const DType& type : types)
    if (name == type.name) return &type;
  return nullptr;
}

const DType* dtype_in_safetensors(const std::string& name) {
  for (const DType& type : types)
    if (name == type.safetensors) return &type;
  return nullptr;
}

std::size_t Tensor::elements() const {
  std::size_t count = 1;
  for (const std::int64_t extent : shape) count *= static_cast<std::size_t>(extent);
  return count;
}

std::string Tensor::described() const { return text(dtype->name, " ", shown(shape)); }

std::string shown(const std::vector<std::int64_t>& shape) {
  std::string all = "[";
  for (std::size_t i = 0; i < shape.size(); ++i)
    all += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return all + "]";
}

}  // namespace cp_run
