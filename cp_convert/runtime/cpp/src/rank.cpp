#include "rank.h"

#include "errors.h"
#include "sha256.h"

namespace cp_run {

Rank::Rank(const Shared& shared, int rank, int device) : shared_(shared), rank_(rank) {
  shared.cuda.use(device);  // for this thread, which does everything of this rank
}

void Rank::load() {
  const EngineFile& engine = shared_.manifest.engines[rank_];
  const MappedFile file(engine.path, Error::Kind::damaged);
  if (file.size() != engine.bytes)
    throw damaged(text(engine.path.string(), " has ", file.size(), " bytes, expected ", engine.bytes, "."));
  if (shared_.verify && sha256(file.data(), file.size()) != engine.sha256)
    throw damaged(text(engine.path.string(), ": SHA-256 differs from the manifest's."));
  check_memory();
  session_ = std::make_unique<Session>(shared_.tensorrt, rank_, file.data(), file.size());
  session_->check_bindings(shared_.manifest, rank_);
}

void Rank::check_memory() const {
  const EngineFile& engine = shared_.manifest.engines[rank_];
  const std::size_t needed =
      engine.bytes + engine.activation_bytes + shared_.weights.bytes(rank_) + bytes_of_io();
  const std::size_t free = shared_.cuda.free_bytes();
  if (free < needed)
    throw usage(text("its GPU has ", free, " bytes free; engine, activations, weights "
                     "and tensors take ", needed, "."),
                "free some, choose other --devices, or convert for a larger --world.");
}

std::size_t Rank::bytes_of_io() const {
  std::size_t bytes = 0;
  for (const auto* side : {&shared_.manifest.inputs, &shared_.manifest.outputs})
    for (const Tensor& tensor : *side) bytes += aligned(tensor.bytes());
  return bytes;
}

void Rank::upload() {
  const Manifest& manifest = shared_.manifest;
  lane_ = std::make_unique<Lane>(shared_.cuda, 0);
  weights_ = std::make_unique<DeviceMemory>(shared_.cuda, shared_.weights.bytes(rank_));
  io_ = std::make_unique<DeviceMemory>(shared_.cuda, bytes_of_io());
  Upload upload(shared_.cuda);
  const auto places = shared_.weights.upload(upload, rank_, weights_->data());
  for (const Weight& weight : manifest.weights)
    if (weight.is_of(rank_)) session_->bind(weight.tensor.name, places.at(Weights::source(weight)));
  std::byte* at = io_->data();
  for (const auto& [tensor, data] : shared_.inputs) {
    upload.copy(at, data, tensor.bytes());
    session_->bind(tensor.name, at);
    at += aligned(tensor.bytes());
  }
  for (const Tensor& output : manifest.outputs) {
    session_->bind(output.name, at);
    at += aligned(output.bytes());
  }
  upload.finish();
}

std::vector<std::byte> Rank::outputs() {
  std::size_t bytes = 0, before = 0;
  for (const Tensor& input : shared_.manifest.inputs) before += aligned(input.bytes());
  for (const Tensor& output : shared_.manifest.outputs) bytes += output.bytes();
  std::vector<std::byte> all(bytes);
  std::byte* to = all.data();
  const std::byte* from = io_->data() + before;
  for (const Tensor& output : shared_.manifest.outputs) {
    shared_.cuda.copy(to, from, output.bytes(), lane_->stream());
    to += output.bytes();
    from += aligned(output.bytes());
  }
  wait();
  return all;
}

void Rank::close_memory() {
  io_.reset();
  weights_.reset();
  lane_.reset();
}

}  // namespace cp_run
