#include "fallback.h"

#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <unordered_map>
#include <unordered_set>

namespace testdevice {

namespace {

// Their CUDA kernels copy something to the host and wait for it.
const std::unordered_set<std::string> kWaiting = {"aten::_local_scalar_dense",
                                                  "aten::_unique",
                                                  "aten::_unique2",
                                                  "aten::bincount",
                                                  "aten::equal",
                                                  "aten::is_nonzero",
                                                  "aten::masked_select",
                                                  "aten::nonzero",
                                                  "aten::unique_consecutive",
                                                  "aten::unique_dim"};

bool has_mask(const c10::IValue& indices) {
  if (!indices.isOptionalTensorList()) return false;
  for (const std::optional<at::Tensor>& x : indices.toOptionalTensorList()) {
    if (!x || !x->defined()) continue;
    if (x->scalar_type() == at::kBool || x->scalar_type() == at::kByte) return true;
  }
  return false;
}

bool waits(const c10::OperatorHandle& op, const std::vector<c10::IValue>& args) {
  const std::string& name = op.schema().name();
  if (name == "aten::repeat_interleave") return args.size() > 1 && args.back().isNone();
  if (name == "aten::index") return has_mask(args[1]);
  if (name == "aten::index_put_" || name == "aten::_index_put_impl_") {
    // With one value it becomes masked_fill.
    return has_mask(args[1]) && args[2].toTensor().numel() != 1;
  }
  return kWaiting.contains(name);
}

std::unordered_map<std::string, c10::OperatorHandle>& redirects() {
  static auto* all = new std::unordered_map<std::string, c10::OperatorHandle>;
  return *all;
}

std::string full_name(const c10::OperatorHandle& op) {
  return op.schema().name() + "." + op.schema().overload_name();
}

const c10::OperatorHandle& stand_in_of(const c10::OperatorHandle& op) {
  const auto found = redirects().find(full_name(op));
  return found == redirects().end() ? op : found->second;
}

void run(const c10::OperatorHandle& op, Stack& stack) {
  KernelGuard guard;
  op.callBoxed(stack);
}

at::Tensor empty_like_on_device(const at::Tensor& x) {
  if (!x.defined()) return x;
  return at::empty_strided(x.sizes(), x.strides(),
                           x.options().device(c10::Device(c10::kCUDA, 0)).pinned_memory(false));
}

bool is_written(const c10::Argument& argument) {
  return argument.alias_info() && argument.alias_info()->isWrite();
}

struct Call {
  c10::OperatorHandle op;
  const c10::FunctionSchema& schema = op.schema();
  c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
  std::vector<c10::IValue> args;

  // The arguments for a CPU kernel. A kernel takes the value of a host tensor when it is launched.
  Stack host_args(bool snapshot) const {
    Stack mapped;
    for (const c10::IValue& arg : args) {
      mapped.push_back(map_tensors(arg, c10::kCPU, [&](const at::Tensor& x) {
        if (!x.defined()) return x;
        if (x.is_cuda()) return host_alias(x);
        return snapshot ? x.clone() : x;
      }));
    }
    return mapped;
  }

  // The argument that result `i` is, or null if it is a new tensor.
  const c10::IValue* returned_argument(size_t i) const {
    const auto* result = schema.returns()[i].alias_info();
    if (!result || !result->isWrite()) return nullptr;
    for (size_t a = 0; a < args.size(); ++a) {
      const c10::Argument& argument = schema.arguments()[a];
      if (is_written(argument) && argument.alias_info()->beforeSets() == result->beforeSets()) {
        return &args[a];
      }
    }
    return nullptr;
  }

  bool has_out_arguments() const {
    return std::ranges::any_of(schema.arguments(), [](const c10::Argument& argument) {
      return argument.kwarg_only() && is_written(argument);
    });
  }

  // What the operator returns on the device for results of these shapes; the new tensors in order.
  Stack make_results(const Stack& like, std::vector<at::Tensor>& made) const {
    Stack results;
    for (size_t i = 0; i < schema.returns().size(); ++i) {
      const c10::IValue* same = returned_argument(i);
      results.push_back(same ? *same : map_tensors(like[i], c10::kCPU, [&](const at::Tensor& x) {
        made.push_back(empty_like_on_device(x));
        return made.back();
      }));
    }
    return results;
  }

  std::vector<bool> new_results() const {
    std::vector<bool> is_new;
    for (size_t i = 0; i < schema.returns().size(); ++i) is_new.push_back(!returned_argument(i));
    return is_new;
  }

  std::vector<Access> accesses(const std::vector<at::Tensor>& made) const {
    std::vector<Access> all;
    for (size_t a = 0; a < args.size(); ++a) {
      add_accesses(args[a], is_written(schema.arguments()[a]), all);
    }
    for (const at::Tensor& x : made) add_accesses(x, true, all);
    return all;
  }
};

// Moves what a CPU kernel returned as new tensors to `to`, in order.
void copy_results(const Stack& returned, const std::vector<bool>& is_new,
                  const std::vector<at::Tensor>& to) {
  KernelGuard guard;
  size_t next = 0;
  for (size_t i = 0; i < is_new.size(); ++i) {
    if (!is_new[i]) continue;
    map_tensors(returned[i], c10::kCPU, [&](const at::Tensor& x) {
      const at::Tensor& target = to[next++];
      if (target.defined() && target.numel() > 0) target.copy_(x);
      return x;
    });
  }
}

// Runs the operator without memory; also gives tensors in `out` the size of what they receive.
Stack infer_results(const Call& call) {
  Stack shapes;
  for (const c10::IValue& arg : call.args) {
    shapes.push_back(map_tensors(arg, c10::kMeta, meta_alias));
  }
  const Stack metas = shapes;
  try {
    run(call.op, shapes);
  } catch (const std::exception& error) {
    if (!redirects().contains(full_name(call.op))) {
      refuse_call(call.op, std::string("no shapes without running it: ") + error.what());
    }
    shapes.clear();
    for (const c10::IValue& arg : call.args) {
      shapes.push_back(map_tensors(arg, c10::kCPU, [](const at::Tensor& x) {
        return x.defined() ? at::zeros(x.sizes(), x.options().device(at::kCPU)) : x;
      }));
    }
    run(stand_in_of(call.op), shapes);
    return shapes;
  }
  for (size_t a = 0; a < call.args.size(); ++a) {
    if (!is_written(call.schema.arguments()[a]) || !call.args[a].isTensor()) continue;
    const at::Tensor &x = call.args[a].toTensor(), &meta = metas[a].toTensor();
    if (x.defined() && x.sizes() != meta.sizes()) x.resize_(meta.sizes());
  }
  return shapes;
}

// Addresses, not tensors: memory that is freed before a kernel runs may belong to another tensor.
std::vector<at::Tensor> host_aliases(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> aliases;
  for (const at::Tensor& x : tensors) aliases.push_back(host_alias(x));
  return aliases;
}

// What the call reads is there: the CPU's kernel runs at once, and its results are moved in order.
Stack run_now(const Call& call, bool waited) {
  if (call.has_out_arguments() && !waited) infer_results(call);  // an alias cannot be resized
  Stack returned = call.host_args(false);
  run(stand_in_of(call.op), returned);
  std::vector<at::Tensor> made;
  Stack results = call.make_results(returned, made);
  const auto work = [returned, is_new = call.new_results(), targets = host_aliases(made)] {
    copy_results(returned, is_new, targets);
  };
  check(enqueue(call.stream,
                {.name = call.schema.name(), .run = work, .accesses = call.accesses(made)}),
        call.op);
  return results;
}

Stack run_later(const Call& call) {
  Stack like;
  const std::vector<bool> is_new = call.new_results();
  const bool has_new = std::ranges::find(is_new, true) != is_new.end();
  if (has_new || call.has_out_arguments()) like = infer_results(call);
  std::vector<at::Tensor> made;
  Stack results = call.make_results(like, made);
  const auto work = [op = call.op, args = call.host_args(true), is_new,
                     targets = host_aliases(made)] {
    Stack returned = args;
    run(stand_in_of(op), returned);
    copy_results(returned, is_new, targets);
  };
  check(enqueue(call.stream,
                {.name = call.schema.name(), .run = work, .accesses = call.accesses(made)}),
        call.op);
  return results;
}

}  // namespace

void refuse_call(const c10::OperatorHandle& op, const std::string& why) {
  TORCH_CHECK(false, "test device: ", full_name(op), ": ", why);
}

void check(cudaError_t error, const c10::OperatorHandle& op) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  refuse_call(op, cudaGetErrorString(error));
}

void redirect(const std::string& name, const std::string& overload, const std::string& stand_in) {
  const auto found =
      c10::Dispatcher::singleton().findSchemaOrThrow(stand_in.c_str(), overload.c_str());
  redirects().insert_or_assign(name + "." + overload, found);
}

void launch_on_device(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const size_t before = count_enqueued(stream);
  // Before the call: a kernel of torch's stable ABI empties the lists that it is given.
  std::vector<Access> accesses;
  const auto args = stack->end() - static_cast<ptrdiff_t>(arguments.size());
  for (size_t a = 0; a < arguments.size(); ++a) {
    add_accesses(args[static_cast<ptrdiff_t>(a)], is_written(arguments[a]), accesses);
  }
  stand_in_of(op).callBoxed(stack);
  if (count_enqueued(stream) == before) return;
  const auto results = static_cast<ptrdiff_t>(op.schema().returns().size());
  for (auto result = stack->end() - results; result != stack->end(); ++result) {
    add_accesses(*result, true, accesses);
  }
  add_accesses(stream, accesses);
}

void run_on_device(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  if (op.schema().name() == "aten::copy_") return copy_on_device(op, stack);
  Call call{.op = op, .args = torch::jit::pop(*stack, op.schema().arguments().size())};
  const bool must_wait = waits(op, call.args);
  if (must_wait) check(wait(call.stream, call.schema.name().c_str()), op);
  const bool deferred = lazy() || has_work_limit() || capturing(call.stream);
  Stack results = must_wait || !deferred ? run_now(call, must_wait) : run_later(call);
  for (c10::IValue& result : results) stack->push_back(std::move(result));
}

}  // namespace testdevice
