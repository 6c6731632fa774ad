#include "weights.h"

#include <algorithm>

#include "sha256.h"

namespace cp_run {

// Weights of one source are tied, and are one on the device too.
Weights::Source Weights::source(const Weight& weight) {
  return {weight.path.string(), weight.offset, weight.tensor.bytes()};
}

bool Weights::Piece::is_of(int rank) const {
  return std::any_of(weights.begin(), weights.end(),
                     [rank](const Weight* weight) { return weight->is_of(rank); });
}

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
  const auto [known, is_new] = by_source_.try_emplace(source(weight), pieces_.size());
  if (is_new) pieces_.push_back({{}, file->data() + weight.offset});
  pieces_[known->second].weights.push_back(&weight);
}

void Weights::verify(std::size_t first, std::size_t step) const {
  for (std::size_t i = first; i < pieces_.size(); i += step) {
    const Weight& weight = *pieces_[i].weights[0];
    if (sha256(pieces_[i].data, weight.tensor.bytes()) != weight.sha256)
      throw damaged(text(weight.path.string(), ": SHA-256 of ", weight.tensor.name,
                         " differs from the manifest's."),
                    "the file was changed after the conversion: bring it back, or convert again.");
  }
}

std::size_t Weights::bytes(int rank) const {
  std::size_t bytes = 0;
  for (const Piece& piece : pieces_)
    if (piece.is_of(rank)) bytes += aligned(piece.weights[0]->tensor.bytes());
  return bytes;
}

std::map<Weights::Source, std::byte*> Weights::upload(Upload& upload, int rank,
                                                      std::byte* to) const {
  std::map<Source, std::byte*> places;
  for (const Piece& piece : pieces_) {
    if (!piece.is_of(rank)) continue;
    const Weight& weight = *piece.weights[0];
    upload.copy(to, piece.data, weight.tensor.bytes());
    places.emplace(source(weight), to);
    to += aligned(weight.tensor.bytes());
  }
  return places;
}

}  // namespace cp_run
