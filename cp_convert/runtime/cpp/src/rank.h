// One rank: its GPU, its engine, its memory and its stream. Used by one thread.
#pragma once

#include <functional>
#include <memory>

#include "safetensors.h"
#include "tensorrt.h"
#include "weights.h"

namespace cp_run {

// What all ranks share and nobody changes while they run.
struct Shared {
  const Manifest& manifest;
  const Cuda& cuda;
  const TensorRt& tensorrt;
  const Weights& weights;
  const std::vector<Safetensors::View>& inputs;  // in the manifest's order
  bool verify;
};

class Rank {
 public:
  Rank(const Shared& shared, int rank, int device);

  // Checks the engine's file, deserialises it and checks its bindings.
  void load();
  // Weights and inputs to the device; every binding gets its address.
  void upload();
  void set_communicator(void* communicator) { session_->set_communicator(communicator); }
  void enqueue() { session_->enqueue(lane_->stream()); }
  void wait() { shared_.cuda.wait(lane_->stream()); }
  // All outputs, one after another as the manifest has them.
  std::vector<std::byte> outputs();
  // The context, then the engine: before the communicator.
  void close_session() { session_.reset(); }
  void close_memory();

 private:
  void check_memory() const;
  std::size_t bytes_of_io() const;

  const Shared& shared_;
  const int rank_;
  std::unique_ptr<Session> session_;
  std::unique_ptr<Lane> lane_;
  std::unique_ptr<DeviceMemory> weights_;
  std::unique_ptr<DeviceMemory> io_;  // inputs, then outputs
};

}  // namespace cp_run
