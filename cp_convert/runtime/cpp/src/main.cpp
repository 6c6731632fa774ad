// Runs a bundle of cp-convert; README.md tells how, this file in which order.

#include <algorithm>
#include <cstdio>
#include <numeric>

#include "arguments.h"
#include "compare.h"
#include "report.h"
#include "world.h"

namespace cp_run {
namespace {

// Whether a GPU is among what the engines were built for: "8.9", or "12.0+" and all later.
bool is_target(const std::string& capability, const std::string& target) {
  if (target.empty() || target.back() != '+') return capability == target;
  return std::stod(capability) >= std::stod(target);
}

std::vector<int> devices_of(const Arguments& arguments, int world) {
  std::vector<int> devices(world);
  std::iota(devices.begin(), devices.end(), 0);
  if (arguments.devices) devices = *arguments.devices;
  if (devices.size() != static_cast<std::size_t>(world))
    throw usage(text("--devices names ", devices.size(), " GPUs for ", world, " ranks."));
  for (auto one = devices.begin(); one != devices.end(); ++one)
    if (std::find(devices.begin(), one, *one) != one)
      throw usage(text("--devices names GPU ", *one, " twice; NCCL wants one GPU a rank."));
  return devices;
}

void check_devices(const Cuda& cuda, const std::vector<int>& devices, const Manifest& manifest) {
  const int count = cuda.device_count();
  const int last = *std::max_element(devices.begin(), devices.end());
  if (last >= count)
    throw usage(text("the bundle has ", manifest.world, " ranks and needs GPU ", last, "; here ",
                     count == 1 ? "is 1 GPU." : text("are ", count, " GPUs.")),
                "one GPU a rank: convert for a smaller --world, or choose --devices.");
  const auto& targets = manifest.compute_capabilities;
  for (const int device : devices) {
    const std::string capability = cuda.compute_capability(device);
    const bool fits = std::any_of(targets.begin(), targets.end(), [&](const std::string& target) {
      return is_target(capability, target);
    });
    // A backend that builds for the GPU it finds names none.
    if (!targets.empty() && !fits)
      throw usage(text("GPU ", device, " has compute capability ", capability,
                       "; the engines were built for others."),
                  "cp-convert inspect tells which; convert again for this GPU.");
  }
}

void run(const Arguments& arguments) {
  if (arguments.outputs) check_writable(*arguments.outputs);
  const Manifest manifest = read_manifest(arguments.bundle);
  const std::vector<int> devices = devices_of(arguments, manifest.world);
  const Safetensors file(arguments.inputs);
  const auto inputs = matched(file, manifest.inputs);
  const Weights weights(manifest.weights);
  const Cuda cuda;
  check_devices(cuda, devices, manifest);
  std::optional<Nccl> nccl;  // before TensorRT, which then finds the same one
  if (manifest.world > 1) nccl.emplace();
  const TensorRt tensorrt(manifest, arguments.library);
  const Shared shared{manifest, cuda, tensorrt, weights, inputs, arguments.verify};
  const Ran ran = run_world(shared, nccl ? &*nccl : nullptr, devices, arguments.repeat,
                            Seconds(arguments.timeout));
  const double apart = check_outputs(manifest, ran.outputs);
  report(manifest, devices, weights.bytes(0), ran, apart);
  if (!arguments.outputs) return;
  std::vector<Safetensors::View> outputs;
  const std::byte* at = ran.outputs[0].data();
  for (const Tensor& output : manifest.outputs) {
    outputs.push_back({output, at});
    at += output.bytes();
  }
  write_safetensors(*arguments.outputs, outputs);
  std::printf("%s was written.\n", arguments.outputs->c_str());
}

}  // namespace
}  // namespace cp_run

int main(int count, char** words) {
  try {
    cp_run::run(cp_run::parse(count, words));
  } catch (const cp_run::Error& error) {
    cp_run::end_with(error);
  } catch (const std::exception& error) {
    cp_run::end_with(cp_run::failed(cp_run::text(error.what(), ".")));
  }
  return 0;
}
