// aten::copy_: what is asynchronous, what waits, what a capture refuses.
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/copy.h>
#include <c10/cuda/CUDAStream.h>

#include "fallback.h"

namespace testdevice {

namespace {

void add_host_access(const at::Tensor& x, bool write, std::vector<Access>& accesses) {
  const auto begin = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  const int64_t span =
      x.numel() == 0 ? 0 : at::detail::computeStorageNbytes(x.sizes(), x.strides(), x.itemsize());
  accesses.push_back({begin, begin + static_cast<uintptr_t>(span), write});
}

}  // namespace

void copy_on_device(const c10::OperatorHandle& op, Stack* stack) {
  const auto args = torch::jit::pop(*stack, 3);
  const at::Tensor to = args[0].toTensor(), from = args[1].toTensor();
  const bool non_blocking = args[2].toBool();
  stack->push_back(to);
  if (to.numel() == 0) return;

  const auto stream = c10::cuda::getCurrentCUDAStream();
  const bool from_host = !from.is_cuda(), to_host = !to.is_cuda();
  const at::Tensor& host = from_host ? from : to;
  const bool pinned = (from_host || to_host) && is_pinned(host.storage().data());
  const bool pageable = (from_host || to_host) && !pinned;
  at::Tensor source = host_alias(from), target = host_alias(to);
  std::vector<Access> accesses;
  add_accesses(from, false, accesses);
  add_accesses(to, true, accesses);
  if (pinned) add_host_access(host, to_host, accesses);
  if (pageable && capturing(stream)) refuse_call(op, "pageable host memory in a captured copy");
  if (pageable && from_host) source = from.clone();  // the driver stages it before it returns

  const char* name = from_host ? "copy to device" : to_host ? "copy to host" : "copy";
  const auto work = [target, source] {
    KernelGuard guard;
    at::Tensor(target).copy_(source);
  };
  check(enqueue(stream, {.name = name, .run = work, .accesses = std::move(accesses)}), op);
  if (pinned && non_blocking) {  // the pinned block may not be reused before this has run
    at::getHostAllocator(at::kCUDA)->record_event(
        host.data_ptr(), host.storage().data_ptr().get_context(), stream.unwrap());
  }
  const bool asynchronous = non_blocking && (pinned || from_host);
  if ((from_host || to_host) && !asynchronous) check(wait(stream, name), op);
}

}  // namespace testdevice
