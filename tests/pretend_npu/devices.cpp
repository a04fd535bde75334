// Devices, streams, memory and generators of the pretend NPU. Work is done at once, so that streams and events have
// nothing to wait for; what was asked of them is noted down.
#include "npu.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <sstream>
#include <unordered_set>

namespace pretend_npu {
namespace {

constexpr size_t kMostDevices = 8;

thread_local c10::DeviceIndex current = 0;
thread_local std::array<c10::StreamId, kMostDevices> current_streams{}; // 0 is a device's default stream
std::atomic<c10::StreamId> last_stream{0};

std::mutex notes_lock;
std::vector<std::string> noted;

// -- memory

struct Counter {
  std::atomic<int64_t> now{0};
  std::atomic<int64_t> peak{0};

  void add(int64_t bytes) {
    const int64_t sum = now += bytes;
    int64_t seen = peak;
    while (sum > seen && !peak.compare_exchange_weak(seen, sum)) {
    }
  }
};

std::array<Counter, kMostDevices> counters;

struct Block {
  void* data;
  int64_t bytes;
  c10::DeviceIndex device;
};

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device(kType, current);
    if (bytes == 0) {
      return {nullptr, device};
    }
    void* data = nullptr;
    TORCH_CHECK(posix_memalign(&data, 64, bytes) == 0, "the pretend NPU is out of memory");
    counters[current].add(static_cast<int64_t>(bytes));
    auto* block = new Block{data, static_cast<int64_t>(bytes), current};
    return {data, block, &free_block, device};
  }

  static void free_block(void* context) {
    auto* block = static_cast<Block*>(context);
    counters[block->device].add(-block->bytes);
    std::free(block->data);
    delete block;
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

std::mutex pinned_lock;
std::unordered_set<const void*> pinned;

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = nullptr;
    TORCH_CHECK(bytes == 0 || posix_memalign(&data, 64, bytes) == 0, "no host memory");
    if (data != nullptr) {
      std::lock_guard<std::mutex> guard(pinned_lock);
      pinned.insert(data);
    }
    return {data, data, &unpin, c10::Device(c10::DeviceType::CPU)};
  }

  static void unpin(void* data) {
    {
      std::lock_guard<std::mutex> guard(pinned_lock);
      pinned.erase(data);
    }
    std::free(data);
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return &unpin;
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

DeviceMemory the_device_memory;
PinnedMemory the_pinned_memory;

// -- streams and events

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = kType;

  Guard() = default;
  explicit Guard(c10::DeviceType) {}

  c10::DeviceType type() const override {
    return kType;
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before(kType, current);
    set_device(device.index());
    return before;
  }
  c10::Device getDevice() const override {
    return c10::Device(kType, current);
  }
  void setDevice(c10::Device device) const override {
    set_device(device.index());
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    current = device.index();
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return device_count();
  }

  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::UNSAFE, device, current_streams.at(device.index()));
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return c10::Stream(c10::Stream::UNSAFE, device, ++last_stream);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::Stream before = getStream(stream.device());
    current_streams.at(stream.device_index()) = stream.id();
    return before;
  }
  bool queryStream(const c10::Stream&) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    note("the host waits for stream " + std::to_string(stream.id()));
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    note("the host waits for the device");
  }

  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) {
      *event = new c10::StreamId;
    }
    *static_cast<c10::StreamId*>(*event) = stream.id();
    note("stream " + std::to_string(stream.id()) + " records an event");
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event != nullptr) { // an event that was never recorded holds nobody up
      const auto origin = *static_cast<c10::StreamId*>(event);
      note("stream " + std::to_string(stream.id()) + " waits for stream " + std::to_string(origin));
    }
  }
  bool queryEvent(void*) const override {
    return true;
  }
  void synchronizeEvent(void*) const override {
    note("the host waits for an event");
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<c10::StreamId*>(event);
  }
};

// -- generators

struct Generator final : at::CPUGeneratorImpl {
  explicit Generator(c10::DeviceIndex index) {
    device_ = c10::Device(kType, index);
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};

// -- hooks

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return device_count() > 0;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return device_count();
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return current;
  }
  void setCurrentDevice(c10::DeviceIndex index) const override {
    set_device(index);
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    const auto before = current;
    set_device(index);
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
    return index < 0 ? current : exchangeDevice(index);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override {
    return default_generator(index < 0 ? current : index);
  }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return at::make_generator<Generator>(index < 0 ? current : index);
  }
  bool isPinnedPtr(const void* data) const override {
    return is_pinned(data);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return &the_pinned_memory;
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto* kept = storage.unsafeGetStorageImpl();
    auto fresh = the_device_memory.allocate(bytes);
    const size_t common = std::min(bytes, kept->nbytes());
    if (common > 0 && kept->data() != nullptr) {
      std::memcpy(fresh.get(), kept->data(), common);
    }
    kept->set_data_ptr_noswap(std::move(fresh));
    kept->set_nbytes(bytes);
  }
};

} // namespace

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);
REGISTER_ALLOCATOR(kType, &the_device_memory);

c10::DeviceIndex device_count() {
  static const c10::DeviceIndex count = [] {
    // The driver's variable, which says what a process may see of the machine's two devices.
    const char* visible = std::getenv("ASCEND_RT_VISIBLE_DEVICES");
    if (visible == nullptr) {
      return 2;
    }
    int found = 0;
    std::stringstream parts(visible);
    for (std::string part; std::getline(parts, part, ',');) {
      found += (part == "0" || part == "1") ? 1 : 0;
    }
    return found;
  }();
  return count;
}

c10::DeviceIndex current_device() {
  return current;
}

void set_device(c10::DeviceIndex index) {
  TORCH_CHECK(index >= 0 && index < device_count(), "invalid device ordinal ", static_cast<int>(index));
  current = index;
}

c10::Allocator* device_memory() {
  return &the_device_memory;
}

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> guard(pinned_lock);
  return pinned.count(data) > 0;
}

std::array<int64_t, 2> memory_bytes(c10::DeviceIndex index) {
  return {counters.at(index).now, counters.at(index).peak};
}

void reset_peak_memory(c10::DeviceIndex index) {
  counters.at(index).peak = counters.at(index).now.load();
}

const at::Generator& default_generator(c10::DeviceIndex index) {
  static const std::vector<at::Generator> generators = [] {
    std::vector<at::Generator> made;
    for (size_t i = 0; i < kMostDevices; ++i) {
      made.push_back(at::make_generator<Generator>(static_cast<c10::DeviceIndex>(i)));
    }
    return made;
  }();
  return generators.at(index);
}

at::Generator generator_or_default(const std::optional<at::Generator>& given) {
  return given.has_value() && given->defined() ? *given : default_generator(current);
}

void note(std::string what) {
  std::lock_guard<std::mutex> guard(notes_lock);
  noted.push_back(std::move(what));
}

std::vector<std::string> notes() {
  std::lock_guard<std::mutex> guard(notes_lock);
  return noted;
}

void clear_notes() {
  std::lock_guard<std::mutex> guard(notes_lock);
  noted.clear();
}

void register_hooks() {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
}

} // namespace pretend_npu
