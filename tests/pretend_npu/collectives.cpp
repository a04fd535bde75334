// The pretend HCCL: gloo over the memory of the pretend NPU, less what HCCL does not know. And what Python sees of the
// device.
#include "npu.h"

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/python.h>

#include <set>

namespace pretend_npu {
namespace {

using c10d::Work;
using Tensors = std::vector<at::Tensor>;
using WorkPtr = c10::intrusive_ptr<Work>;
using BackendPtr = c10::intrusive_ptr<c10d::Backend>;

std::string name_of(const c10d::ReduceOp& op) {
  switch (op.op_) {
    case c10d::ReduceOp::SUM:
      return "SUM";
    case c10d::ReduceOp::AVG:
      return "AVG";
    case c10d::ReduceOp::PRODUCT:
      return "PRODUCT";
    case c10d::ReduceOp::MIN:
      return "MIN";
    case c10d::ReduceOp::MAX:
      return "MAX";
    case c10d::ReduceOp::PREMUL_SUM:
      return "PREMUL_SUM";
    default:
      return "a bitwise operation";
  }
}

Tensors on_host(const Tensors& tensors) {
  Tensors hosts;
  hosts.reserve(tensors.size());
  for (const auto& tensor : tensors) {
    TORCH_CHECK(tensor.device().type() == kType, "HCCL moves tensors of NPUs, not of ", tensor.device());
    hosts.push_back(pretend_npu::on_host(tensor));
  }
  return hosts;
}

std::vector<Tensors> on_host(const std::vector<Tensors>& lists) {
  std::vector<Tensors> hosts;
  for (const auto& tensors : lists) {
    hosts.push_back(on_host(tensors));
  }
  return hosts;
}

// Reductions that HCCL knows; torch_npu computes a mean for some calls, and nobody a pre-multiplied sum.
void check_reduction(const std::string& call, const c10d::ReduceOp& op, const Tensors& tensors) {
  static const std::set<at::ScalarType> types = {
      at::kChar, at::kShort, at::kInt, at::kLong, at::kHalf, at::kBFloat16, at::kFloat};
  const auto name = name_of(op);
  note(call + " " + name);
  TORCH_CHECK(
      name == "SUM" || name == "PRODUCT" || name == "MIN" || name == "MAX", "Cannot use ReduceOp.", name, " with HCCL");
  for (const auto& tensor : tensors) {
    TORCH_CHECK(types.count(tensor.scalar_type()) > 0, "HCCL ", call, ": unsupported data type ", tensor.scalar_type());
  }
}

WorkPtr done(WorkPtr work) {
  work->wait();
  return work;
}

class Hccl final : public c10d::Backend {
 public:
  Hccl(BackendPtr gloo, int rank, int size) : Backend(rank, size), gloo_(std::move(gloo)) {}

  const std::string getBackendName() const override {
    return "hccl";
  }
  void setSequenceNumberForGroup() override {
    gloo_->setSequenceNumberForGroup();
  }
  uint64_t getSequenceNumberForGroup() override {
    return gloo_->getSequenceNumberForGroup();
  }

  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    note("broadcast");
    auto hosts = on_host(tensors);
    return done(gloo_->broadcast(hosts, options));
  }
  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    check_reduction("allreduce", options.reduceOp, tensors);
    auto hosts = on_host(tensors);
    return done(gloo_->allreduce(hosts, options));
  }
  WorkPtr allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) override {
    check_reduction("allreduce_coalesced", options.reduceOp, tensors);
    auto hosts = on_host(tensors);
    return done(gloo_->allreduce_coalesced(hosts, options));
  }
  WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    check_reduction("reduce", options.reduceOp, tensors);
    auto hosts = on_host(tensors);
    return done(gloo_->reduce(hosts, options));
  }
  WorkPtr allgather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    note("allgather");
    auto to = on_host(outputs);
    auto from = on_host(inputs);
    return done(gloo_->allgather(to, from, options));
  }
  WorkPtr _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override {
    note("allgather_into_tensor");
    auto pair = on_host(Tensors{output, input});
    return done(gloo_->_allgather_base(pair[0], pair[1], options));
  }
  WorkPtr gather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::GatherOptions& options) override {
    note("gather");
    auto to = on_host(outputs);
    auto from = on_host(inputs);
    return done(gloo_->gather(to, from, options));
  }
  WorkPtr scatter(Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ScatterOptions& options) override {
    note("scatter");
    auto to = on_host(outputs);
    auto from = on_host(inputs);
    return done(gloo_->scatter(to, from, options));
  }
  WorkPtr reduce_scatter(
      Tensors& outputs,
      std::vector<Tensors>& inputs,
      const c10d::ReduceScatterOptions& options) override {
    check_reduction("reduce_scatter", options.reduceOp, outputs);
    auto to = on_host(outputs);
    auto from = on_host(inputs);
    return done(gloo_->reduce_scatter(to, from, options));
  }
  WorkPtr _reduce_scatter_base(
      at::Tensor& output,
      at::Tensor& input,
      const c10d::ReduceScatterOptions& options) override {
    check_reduction("reduce_scatter_tensor", options.reduceOp, {output});
    auto pair = on_host(Tensors{output, input});
    return done(gloo_->_reduce_scatter_base(pair[0], pair[1], options));
  }
  WorkPtr alltoall_base(
      at::Tensor& output,
      at::Tensor& input,
      std::vector<int64_t>& output_splits,
      std::vector<int64_t>& input_splits,
      const c10d::AllToAllOptions& options) override {
    note("alltoall_single");
    auto pair = on_host(Tensors{output, input});
    return done(gloo_->alltoall_base(pair[0], pair[1], output_splits, input_splits, options));
  }
  WorkPtr alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& options) override {
    note("alltoall");
    auto to = on_host(outputs);
    auto from = on_host(inputs);
    return done(gloo_->alltoall(to, from, options));
  }
  WorkPtr send(Tensors& tensors, int rank, int tag) override {
    note("send");
    auto hosts = on_host(tensors);
    return done(gloo_->send(hosts, rank, tag));
  }
  WorkPtr recv(Tensors& tensors, int rank, int tag) override {
    note("recv");
    auto hosts = on_host(tensors);
    return done(gloo_->recv(hosts, rank, tag));
  }
  WorkPtr barrier(const c10d::BarrierOptions& options) override {
    note("barrier");
    return done(gloo_->barrier(options));
  }

 private:
  BackendPtr gloo_;
};

} // namespace
} // namespace pretend_npu

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using namespace pretend_npu;
  module.def("register_hooks", &register_hooks);
  module.def("device_count", [] { return static_cast<int>(device_count()); });
  module.def("current_device", [] { return static_cast<int>(current_device()); });
  module.def("set_device", [](int index) { set_device(static_cast<c10::DeviceIndex>(index)); });
  module.def("memory_bytes", [](int index) { return memory_bytes(static_cast<c10::DeviceIndex>(index)); });
  module.def("reset_peak_memory", [](int index) { reset_peak_memory(static_cast<c10::DeviceIndex>(index)); });
  module.def("default_generator", [](int index) { return default_generator(static_cast<c10::DeviceIndex>(index)); });
  module.def("notes", &notes);
  module.def("clear_notes", &clear_notes);
  module.def("hccl", [](BackendPtr gloo, int rank, int size) -> BackendPtr {
    return c10::make_intrusive<Hccl>(std::move(gloo), rank, size);
  });
}
