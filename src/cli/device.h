// --device and what belongs to it on the command line; api/device.h chooses.
#pragma once

#include <memory>
#include <string>

#include "api/device.h"

namespace CLI {
class App;
}  // namespace CLI

namespace refrag {

// --device, -t/--threads, --deterministic, --gpu-memory-fraction, --weights, --lora.
void add_device_options(CLI::App& app, DeviceOptions& options);

// choose_device() with this build's runtime; a warning goes to standard error. `choice`: takes why, where
// given.
std::unique_ptr<Device> make_device(const DeviceOptions& options, std::string* choice = nullptr);

}  // namespace refrag
