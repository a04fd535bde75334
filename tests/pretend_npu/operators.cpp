// Operators of the pretend NPU: memory and views by itself, all else on the CPU by torch's fallback. What Ascend's
// devices lack is refused.
#include "npu.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/InferSize.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/ScopeExit.h>
#include <torch/library.h>

#include <utility>

namespace pretend_npu {

at::Tensor on_host(const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.is_cpu()) {
    return tensor;
  }
  const auto storage = tensor.storage(); // kept alive by the deleter
  return at::from_blob(
      tensor.mutable_data_ptr(),
      tensor.sizes(),
      tensor.strides(),
      [storage](void*) {},
      at::TensorOptions().dtype(tensor.dtype()).device(c10::kCPU));
}

namespace {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;
template <typename T>
using Maybe = std::optional<T>;

// -- memory

c10::Device device_of(Maybe<c10::Device> device) {
  const auto index = device.has_value() && device->has_index() ? device->index() : current_device();
  return c10::Device(kType, index);
}

at::ScalarType checked_dtype(Maybe<at::ScalarType> dtype) {
  const auto type = dtype.value_or(at::ScalarType::Float);
  // Ascend's devices compute nothing in fp64; torch_npu would go on in fp32 behind a warning.
  TORCH_CHECK(type != at::ScalarType::Double, "the pretend NPU has no float64");
  return type;
}

Tensor empty_memory_format(
    at::IntArrayRef size,
    Maybe<at::ScalarType> dtype,
    Maybe<at::Layout>,
    Maybe<c10::Device> device,
    Maybe<bool>,
    Maybe<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(device_of(device));
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, device_memory(), keys, checked_dtype(dtype), format);
}

Tensor empty_strided(
    at::IntArrayRef size,
    at::IntArrayRef stride,
    Maybe<at::ScalarType> dtype,
    Maybe<at::Layout>,
    Maybe<c10::Device> device,
    Maybe<bool>) {
  const c10::DeviceGuard guard(device_of(device));
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, device_memory(), keys, checked_dtype(dtype));
}

const Tensor& resize(const Tensor& tensor, SymIntArrayRef size, Maybe<at::MemoryFormat>) {
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  const auto elements = c10::multiply_integers(sizes) + tensor.storage_offset();
  const auto needed = static_cast<size_t>(elements) * tensor.itemsize();
  if (tensor.storage().nbytes() < needed) {
    at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(tensor.storage(), needed);
  }
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return tensor;
}

std::string place(const Tensor& tensor) {
  if (!tensor.is_cpu()) {
    return "device";
  }
  return is_pinned(tensor.storage().data()) ? "pinned" : "host";
}

// While an operator runs on the CPU: the copies that this takes are no copies that the program asked for.
thread_local bool falling_back = false;

Tensor copy_from(const Tensor& source, const Tensor& target, bool) {
  if (source.is_cpu() != target.is_cpu() && !falling_back) {
    note("copy " + place(source) + " to " + place(target) + " " + std::to_string(source.nbytes()));
  }
  on_host(target).copy_(on_host(source));
  return target;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  if (target.sizes() != source.sizes()) {
    target.resize_(source.sizes());
  }
  on_host(target).copy_(on_host(source));
  return target;
}

at::Scalar local_scalar(const Tensor& tensor) {
  return on_host(tensor).item();
}

void record_stream(Tensor&, c10::Stream stream) {
  note("memory is kept for stream " + std::to_string(stream.id()));
}

// -- views

Tensor as_strided(const Tensor& tensor, SymIntArrayRef size, SymIntArrayRef stride, Maybe<SymInt> offset) {
  const auto start = offset.has_value() ? Maybe<int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(
      tensor, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

Tensor view(const Tensor& tensor, SymIntArrayRef size) {
  return at::native::view(tensor, C10_AS_INTARRAYREF_SLOW(size));
}

Tensor reshape_alias(const Tensor& tensor, SymIntArrayRef size, SymIntArrayRef stride) {
  return as_strided(tensor, size, stride, std::nullopt);
}

Tensor& set_storage_offset(Tensor& tensor, at::Storage from, SymInt offset, SymIntArrayRef size, SymIntArrayRef stride) {
  return at::native::set_storage_cpu_(
      tensor, std::move(from), offset.expect_int(), C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& set_storage(Tensor& tensor, at::Storage from) {
  const auto elements = static_cast<int64_t>(from.nbytes() / tensor.itemsize());
  return at::native::set_storage_cpu_(tensor, std::move(from), 0, {elements}, {1});
}

// -- convolution, which torch hands to a PrivateUse1 device whole

Tensor to_device(const Tensor& tensor) {
  if (!tensor.defined()) {
    return tensor;
  }
  auto moved = at::empty(tensor.sizes(), tensor.options().device(c10::Device(kType, current_device())));
  moved.copy_(tensor);
  return moved;
}

void check_convolution(const Tensor& input) {
  TORCH_CHECK(
      !(input.dim() == 5 && input.scalar_type() == at::ScalarType::BFloat16),
      "the pretend NPU has no three-dimensional convolution in bfloat16");
}

Tensor convolution(
    const Tensor& input,
    const Tensor& weight,
    const Maybe<Tensor>& bias,
    SymIntArrayRef stride,
    SymIntArrayRef padding,
    SymIntArrayRef dilation,
    bool transposed,
    SymIntArrayRef output_padding,
    SymInt groups) {
  check_convolution(input);
  const auto host_bias = bias.has_value() && bias->defined() ? Maybe<Tensor>(on_host(*bias)) : std::nullopt;
  return to_device(at::convolution_symint(
      on_host(input), on_host(weight), host_bias, stride, padding, dilation, transposed, output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient,
    const Tensor& input,
    const Tensor& weight,
    SymIntArrayRef stride,
    SymIntArrayRef padding,
    SymIntArrayRef dilation,
    bool transposed,
    SymIntArrayRef output_padding,
    SymInt groups,
    std::array<bool, 3> wanted) {
  check_convolution(input);
  const std::vector<SymInt> bias_size{transposed ? weight.sym_size(1) * groups : weight.sym_size(0)};
  const auto parts = at::convolution_backward_symint(
      on_host(gradient.contiguous()),
      on_host(input),
      on_host(weight),
      SymIntArrayRef(bias_size),
      stride,
      padding,
      dilation,
      transposed,
      output_padding,
      groups,
      wanted);
  return {to_device(std::get<0>(parts)), to_device(std::get<1>(parts)), to_device(std::get<2>(parts))};
}

// -- random numbers, which come from the device's own generators

// Run `draw` with a host generator in the state of the device's, and keep what it becomes.
template <typename Draw>
Tensor& drawn(Tensor& tensor, const Maybe<at::Generator>& given, Draw draw) {
  auto of_device = generator_or_default(given);
  auto of_host = at::make_generator<at::CPUGeneratorImpl>();
  of_host.set_state(of_device.get_state());
  auto values = on_host(tensor);
  draw(values, of_host);
  of_device.set_state(of_host.get_state());
  return tensor;
}

Tensor& normal(Tensor& tensor, double mean, double std, Maybe<at::Generator> generator) {
  return drawn(tensor, generator, [&](Tensor& t, at::Generator g) { t.normal_(mean, std, std::move(g)); });
}

Tensor& uniform(Tensor& tensor, double from, double to, Maybe<at::Generator> generator) {
  return drawn(tensor, generator, [&](Tensor& t, at::Generator g) { t.uniform_(from, to, std::move(g)); });
}

Tensor& bernoulli(Tensor& tensor, double p, Maybe<at::Generator> generator) {
  return drawn(tensor, generator, [&](Tensor& t, at::Generator g) { t.bernoulli_(p, std::move(g)); });
}

Tensor& random(Tensor& tensor, Maybe<at::Generator> generator) {
  return drawn(tensor, generator, [&](Tensor& t, at::Generator g) { t.random_(std::move(g)); });
}

Tensor& random_to(Tensor& tensor, int64_t to, Maybe<at::Generator> generator) {
  return drawn(tensor, generator, [&](Tensor& t, at::Generator g) { t.random_(to, std::move(g)); });
}

Tensor& random_from(Tensor& tensor, int64_t from, Maybe<int64_t> to, Maybe<at::Generator> generator) {
  return drawn(tensor, generator, [&](Tensor& t, at::Generator g) { t.random_(from, to, std::move(g)); });
}

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto before = std::exchange(falling_back, true);
  const auto restore = c10::make_scope_exit([before] { falling_back = before; });
  at::native::cpu_fallback(op, stack);
}

} // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty_memory_format);
  library.impl("empty_strided", empty_strided);
  library.impl("resize_", resize);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", local_scalar);
  library.impl("record_stream", record_stream);
  library.impl("as_strided", as_strided);
  library.impl("view", view);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("set_.source_Storage_storage_offset", set_storage_offset);
  library.impl("set_.source_Storage", set_storage);
  library.impl("convolution_overrideable", convolution);
  library.impl("convolution_backward_overrideable", convolution_backward);
  library.impl("normal_", normal);
  library.impl("uniform_", uniform);
  library.impl("bernoulli_.float", bernoulli);
  library.impl("random_", random);
  library.impl("random_.to", random_to);
  library.impl("random_.from", random_from);
}

} // namespace pretend_npu
