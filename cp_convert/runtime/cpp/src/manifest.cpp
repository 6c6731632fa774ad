#include "manifest.h"

#include <nlohmann/json.hpp>

#include "errors.h"
#include "mapped_file.h"

namespace cp_run {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

Tensor tensor_of(const json& entry) {
  const auto name = entry.at("name").get<std::string>();
  const auto dtype = entry.at("dtype").get<std::string>();
  const DType* known = dtype_named(dtype);
  if (known == nullptr) throw usage(text(name, " is of type ", dtype, ", which cp_run lacks."));
  return {name, known, entry.at("shape").get<std::vector<std::int64_t>>()};
}

EngineFile engine_of(const json& entry, const fs::path& folder) {
  const json& activations = entry.at("activation_bytes");
  return {folder / entry.at("file").get<std::string>(), entry.at("bytes").get<std::size_t>(),
          entry.at("sha256").get<std::string>(),
          activations.is_null() ? 0 : activations.get<std::size_t>()};
}

// The file is a name in the bundle or a path of the user's: an absolute one replaces the folder.
Weight weight_of(const json& entry, const fs::path& folder) {
  Weight weight{tensor_of(entry), folder / entry.at("file").get<std::string>(),
                entry.at("offset").get<std::size_t>(), entry.at("sha256").get<std::string>(),
                entry.at("ranks").get<std::vector<int>>()};
  if (entry.at("bytes").get<std::size_t>() != weight.tensor.bytes())
    throw damaged(text("weight ", weight.tensor.name, " is ", weight.tensor.described(),
                       ", but has ", entry.at("bytes"), " bytes."));
  return weight;
}

std::vector<EngineFile> engines_of(const json& entries, const fs::path& folder, int world) {
  std::vector<EngineFile> engines;
  for (const json& entry : entries) {
    if (entry.at("rank").get<std::size_t>() != engines.size())
      throw damaged(text(folder.string(), ": the manifest's engines are not in order of ranks."));
    engines.push_back(engine_of(entry, folder));
  }
  if (engines.size() != static_cast<std::size_t>(world) || world < 1)
    throw damaged(text(folder.string(), ": ", engines.size(), " engines for a world of ", world, "."));
  return engines;
}

Manifest manifest_of(const json& all, const fs::path& folder) {
  Manifest found;
  found.model = all.at("model").at("name").get<std::string>();
  const json& backend = all.at("backend");
  found.backend = backend.at("name").get<std::string>();
  found.version = backend.at("version").get<std::string>();
  found.compute_capabilities = backend.at("compute_capabilities").get<std::vector<std::string>>();
  found.world = all.at("world").get<int>();
  for (const json& entry : all.at("io"))
    (entry.at("mode") == "input" ? found.inputs : found.outputs).push_back(tensor_of(entry));
  if (all.contains("pieces") && !all.at("pieces").empty())
    throw usage(text(folder.string(), ": every rank has ", all.at("pieces").size(),
                     " engines, one after another, and cp_run runs one; convert without --split-after."));
  if (all.contains("dynamic") && !all.at("dynamic").is_null())
    throw usage(text(folder.string(), ": the engines are for a range of sizes, and cp_run runs engines of one; "
                     "convert without --dynamic."));
  found.engines = engines_of(all.at("engines"), folder, found.world);
  for (const json& entry : all.at("weights")) found.weights.push_back(weight_of(entry, folder));
  const json& bound = all.at("proof").at("bound");
  if (!bound.is_null()) found.bound = bound.at("max").get<double>();
  return found;
}

}  // namespace

Manifest read_manifest(const fs::path& bundle) {
  const fs::path path = fs::is_directory(bundle) ? bundle / "manifest.json" : bundle;
  const MappedFile file(path, Error::Kind::damaged);
  const char* text_of_it = reinterpret_cast<const char*>(file.data());
  try {
    return manifest_of(json::parse(text_of_it, text_of_it + file.size()), path.parent_path());
  } catch (const json::exception& error) {
    throw damaged(text(path.string(), " is not a manifest: ", error.what(), "."),
                  "name a folder that cp-convert wrote.");
  }
}

}  // namespace cp_run
