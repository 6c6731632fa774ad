#include "weights.h"

#include "sha256.h"

namespace cp_run {
namespace {

// Weights of one source are tied, and are one on the device too.
Weights::Source source(const Weight& weight) {
  return {weight.path.string(), weight.offset, weight.tensor.bytes()};
}

}  // namespace

Weights::Weights(const std::vector<Weight>& weights) {
  for (const Weight& weight : weights) add(weight);
}

void Weights::add(const Weight& weight) {
  const std::string path = weight.path.string();
  auto& file = files_[path];
  if (file == nullptr) file = std::make_unique<MappedFile>(path, Error::Kind::damaged);
  if (weight.offset > file->size() || weight.tensor.bytes() > file->size() - weight.offset)
    throw damaged(text(path, " ends before ", weight.tensor.name, "."),
                  "the file is not the one that was converted.");
  if (!by_source_.try_emplace(source(weight), pieces_.size()).second) return;
  pieces_.push_back({&weight, file->data() + weight.offset, bytes_});
  bytes_ += aligned(weight.tensor.bytes());
}

void Weights::verify(std::size_t first, std::size_t step) const {
  for (std::size_t i = first; i < pieces_.size(); i += step) {
    const Weight& weight = *pieces_[i].weight;
    if (sha256(pieces_[i].data, weight.tensor.bytes()) != weight.sha256)
      throw damaged(text(weight.path.string(), ": SHA-256 of ", weight.tensor.name,
                         " differs from the manifest's."),
                    "the file was changed after the conversion: bring it back, or convert again.");
  }
}

void Weights::upload(Upload& upload, std::byte* to) const {
  for (const Piece& piece : pieces_)
    upload.copy(to + piece.place, piece.data, piece.weight->tensor.bytes());
}

std::size_t Weights::place(const Weight& weight) const {
  return pieces_[by_source_.at(source(weight))].place;
}

}  // namespace cp_run
