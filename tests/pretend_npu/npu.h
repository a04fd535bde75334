// A pretend NPU: a PrivateUse1 device whose memory is the host's, for tests of code that serves several devices.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/Allocator.h>
#include <c10/core/DeviceType.h>
#include <c10/core/Stream.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace pretend_npu {

constexpr c10::DeviceType kType = c10::DeviceType::PrivateUse1;

// devices.cpp: devices, streams, memory, generators.

c10::DeviceIndex device_count();
c10::DeviceIndex current_device();
void set_device(c10::DeviceIndex index);

// Memory of the current device. Its data pointers can be read by the host; only `on_host` may make use of it.
c10::Allocator* device_memory();

// Whether `data` lies in page-locked (that is: pretended to be so) host memory.
bool is_pinned(const void* data);

// Bytes of a device that tensors hold: now, and at most since the last reset.
std::array<int64_t, 2> memory_bytes(c10::DeviceIndex index);
void reset_peak_memory(c10::DeviceIndex index);

// The given generator, or the default one of the current device.
at::Generator generator_or_default(const std::optional<at::Generator>& given);
const at::Generator& default_generator(c10::DeviceIndex index);

// What was asked of the device, in order: "stream 3 waits for an event", "copy device to pinned 4096", "allreduce SUM".
void note(std::string what);
std::vector<std::string> notes();
void clear_notes();

// Tell torch of the device's hooks. Once in a process, after the device got its name.
void register_hooks();

// operators.cpp

// A CPU tensor over the memory of a device's tensor.
at::Tensor on_host(const at::Tensor& tensor);

} // namespace pretend_npu
