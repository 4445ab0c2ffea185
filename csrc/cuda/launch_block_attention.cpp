// torch.ops.dflare.block_attention and block_attention_schedule on CUDA.

#include "../contract/block_attention.h"
#include "checks.h"
#include "params.h"

namespace dflare::cuda {
namespace {

// Whether DFLARE_CLUSTER=1 asks for clusters, on a device that has them: the consumer parts (12.x)
// are left out, whose SMs hold one block each.
bool wants_clusters(const Checker& check) {
  const int major = device_attribute(check, cudaDevAttrComputeCapabilityMajor);
  return asked_for("DFLARE_CLUSTER") && (major == 9 || major == 10);
}

AttentionPlan plan(const Checker& check, int64_t batch_size, int64_t block_size, int64_t num_heads,
                   int64_t kv_heads, int64_t head_dim) {
  const DeviceLimits limits{device_attribute(check, cudaDevAttrMultiProcessorCount),
                            device_attribute(check, cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                            wants_clusters(check), wants_wgmma(check)};
  return plan_attention(static_cast<int>(batch_size), static_cast<int>(block_size),
                        static_cast<int>(num_heads), static_cast<int>(kv_heads),
                        static_cast<int>(head_dim), limits);
}

at::Tensor block_attention_schedule(const at::Tensor& seq_lens, int64_t block_size,
                                    int64_t num_heads, int64_t kv_heads, int64_t head_dim,
                                    int64_t window) {
  const Checker check("block_attention_schedule", kLimits, seq_lens);
  const DeviceGuard guard(check.device().index());
  overlaps_launches(check);
  check.integers("seq_lens", seq_lens, {kAny}, "[bs]");
  check.heads(kv_heads, head_dim);
  check.block(block_size);
  check.require(num_heads > 0 && num_heads % kv_heads == 0, num_heads,
                " query heads are no multiple of ", kv_heads, " KV heads");
  check.query_rows(num_heads / kv_heads, block_size);
  AttentionScheduleParams p{};
  p.seq_lens_64bit = seq_lens.scalar_type() == at::kLong;
  p.seq_lens = seq_lens.const_data_ptr();
  p.batch_size = static_cast<int>(seq_lens.size(0));
  p.head_dim = static_cast<int>(head_dim);
  p.window = clamp_window(window);
  p.plan = plan(check, p.batch_size, block_size, num_heads, kv_heads, head_dim);
  const at::Tensor schedule = empty({attention_schedule_size(p.plan)}, at::kInt, seq_lens);
  p.schedule = schedule.mutable_data_ptr<int32_t>();
  check_status(check.op, run_block_attention_schedule(p, current_stream(check.device())));
  return schedule;
}

at::Tensor attend(BlockAttention<at::Tensor> x) {
  const Checker check("block_attention", kLimits, x.qkv);
  const DeviceGuard guard(check.device().index());
  BlockAttentionParams p{};
  p.overlap_launch = overlaps_launches(check);
  x.check(Checker(check));
  const PagedContext<at::Tensor>& context = x.context;
  p.plan =
      plan(check, context.batch, x.block_size, x.num_heads, context.kv_heads, context.head_dim);
  check.require(x.schedule.has_value(),
                "schedule is None; on CUDA, make one a step with block_attention_schedule");
  check.int32s("schedule", *x.schedule, {attention_schedule_size(p.plan)},
               "the size that block_attention_schedule gives for these shapes");

  const at::Tensor out = empty({x.rows, x.num_heads * context.head_dim}, x.qkv);
  if (x.rows == 0) return out;
  p.head_dim = static_cast<int>(context.head_dim);
  const at::Tensor partials =
      empty({attention_partials_size(p.plan, p.head_dim)}, at::kFloat, x.qkv);
  static_cast<BlockAttentionInputs<void>&>(p) = x.inputs<void>();
  p.element = element_type(x.qkv);
  p.qkv = x.qkv.const_data_ptr();
  p.qkv_stride = static_cast<int>(x.qkv.stride(0));
  p.k_pool = context.k_pool.const_data_ptr();
  p.v_pool = context.v_pool.const_data_ptr();
  p.k_stride = static_cast<int>(context.k_pool.stride(0));
  p.v_stride = static_cast<int>(context.v_pool.stride(0));
  p.req_to_token = context.req_to_token.const_data_ptr<int32_t>();
  p.req_to_token_stride = context.req_to_token.stride(0);
  p.req_pool_indices = context.req_pool_indices.const_data_ptr<int64_t>();
  p.seq_lens = context.seq_lens.const_data_ptr();
  p.seq_lens_64bit = context.seq_lens.scalar_type() == at::kLong;
  p.batch_size = static_cast<int>(context.batch);
  p.block_size = static_cast<int>(x.block_size);
  p.num_heads = static_cast<int>(x.num_heads);
  p.kv_heads = static_cast<int>(context.kv_heads);
  // Tickets are drawn in the schedule and put back: its contents are the same before and after.
  p.schedule = const_cast<int32_t*>(x.schedule->const_data_ptr<int32_t>());
  p.partials = partials.mutable_data_ptr<float>();
  p.out = out.mutable_data_ptr();
  check_status(check.op, run_block_attention(p, current_stream(check.device())));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dflare, CUDA, m) {
  m.impl("block_attention", TORCH_BOX((&block_attention<at::Tensor, attend>)));
  m.impl("block_attention_schedule", TORCH_BOX(&block_attention_schedule));
}

}  // namespace dflare::cuda
