#include "safetensors.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <set>

#include <nlohmann/json.hpp>

#include "errors.h"

namespace cp_run {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
constexpr std::size_t prefix = 8;

std::uint64_t header_size(const MappedFile& file, const std::string& path) {
  std::uint64_t size = 0;
  for (std::size_t i = 0; i < prefix && i < file.size(); ++i)
    size |= std::to_integer<std::uint64_t>(file.data()[i]) << (8 * i);
  if (file.size() < prefix || size > file.size() - prefix)
    throw usage(text(path, " is no safetensors file: it ends before its header."));
  return size;
}

Safetensors::View view_of(const std::string& name, const json& entry, const std::byte* numbers,
                          std::size_t size) {
  const auto dtype = entry.at("dtype").get<std::string>();
  const DType* known = dtype_in_safetensors(dtype);
  if (known == nullptr) throw usage(text("input ", name, " is of type ", dtype, ", which cp_run lacks."));
  Tensor tensor{name, known, entry.at("shape").get<std::vector<std::int64_t>>()};
  const auto begin = entry.at("data_offsets").at(0).get<std::size_t>();
  const auto end = entry.at("data_offsets").at(1).get<std::size_t>();
  if (begin > end || end > size || end - begin != tensor.bytes())
    throw usage(text("input ", name, " (", tensor.described(), ") does not fill its place in the file."));
  return {tensor, numbers + begin};
}

// What is wrong with the names, one clause for each side, or nothing.
std::string difference(const std::set<std::string>& missing, const std::set<std::string>& unknown) {
  std::string all;
  for (const std::string& name : missing) all += (all.empty() ? "lacks " : ", ") + name;
  if (!missing.empty() && !unknown.empty()) all += "; and ";
  std::string more;
  for (const std::string& name : unknown)
    more += (more.empty() ? "has what is no input: " : ", ") + name;
  return all + more;
}

json header_of(const std::vector<Safetensors::View>& tensors) {
  json header = json::object();
  std::size_t at = 0;
  for (const auto& [tensor, data] : tensors) {
    header[tensor.name] = {{"dtype", tensor.dtype->safetensors},
                           {"shape", tensor.shape},
                           {"data_offsets", {at, at + tensor.bytes()}}};
    at += tensor.bytes();
  }
  return header;
}

void write_all(std::ostream& out, const std::vector<Safetensors::View>& tensors) {
  std::string header = header_of(tensors).dump();
  header.resize((header.size() + 7) / 8 * 8, ' ');  // numbers begin at a multiple of 8
  for (std::size_t i = 0; i < prefix; ++i)
    out.put(static_cast<char>(static_cast<std::uint64_t>(header.size()) >> (8 * i)));
  out << header;
  for (const auto& [tensor, data] : tensors)
    out.write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(tensor.bytes()));
  out.flush();
}

}  // namespace

Safetensors::Safetensors(const fs::path& path) : file_(path, Error::Kind::usage) {
  const std::uint64_t size = header_size(file_, path.string());
  const char* header = reinterpret_cast<const char*>(file_.data()) + prefix;
  const std::byte* numbers = file_.data() + prefix + size;
  try {
    const json all = json::parse(header, header + size);
    for (const auto& [name, entry] : all.items())
      if (name != "__metadata__")
        tensors_.emplace(name, view_of(name, entry, numbers, file_.size() - prefix - size));
  } catch (const json::exception& error) {
    throw usage(text(path.string(), " is no safetensors file: ", error.what(), "."));
  }
}

std::vector<Safetensors::View> matched(const Safetensors& file, const std::vector<Tensor>& wanted) {
  std::set<std::string> missing, unknown;
  for (const auto& [name, view] : file.tensors()) unknown.insert(name);
  for (const Tensor& tensor : wanted)
    if (unknown.erase(tensor.name) == 0) missing.insert(tensor.name);
  if (!missing.empty() || !unknown.empty())
    throw usage(text("--inputs: the file ", difference(missing, unknown), "."),
                "the manifest's io names every input.");
  std::vector<Safetensors::View> views;
  for (const Tensor& tensor : wanted) {
    const Safetensors::View& view = file.tensors().at(tensor.name);
    if (view.tensor.dtype != tensor.dtype || view.tensor.shape != tensor.shape)
      throw usage(text("--inputs: ", tensor.name, " is ", view.tensor.described(), ", the engines take ",
                       tensor.described(), "."));
    views.push_back(view);
  }
  return views;
}

void check_writable(const fs::path& path) {
  const fs::path folder = fs::absolute(path).parent_path();
  const bool is_folder = fs::is_directory(path);
  if (access(folder.c_str(), W_OK | X_OK) != 0 || is_folder)
    throw usage(text("--outputs ", path.string(), " cannot be written: ",
                     is_folder ? "it is a folder" : std::strerror(errno), "."));
}

void write_safetensors(const fs::path& path, const std::vector<Safetensors::View>& tensors) {
  fs::path partial = path;
  partial += ".partial";
  std::ofstream out(partial, std::ios::binary | std::ios::trunc);
  if (out) write_all(out, tensors);
  out.close();
  std::error_code moved;
  if (out) fs::rename(partial, path, moved);
  if (!out || moved) {
    const std::string reason = moved ? moved.message() : std::strerror(errno);
    fs::remove(partial, moved);
    throw usage(text("--outputs ", path.string(), " cannot be written: ", reason, "."));
  }
}

}  // namespace cp_run
