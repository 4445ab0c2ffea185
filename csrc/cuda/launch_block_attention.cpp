// torch.ops.dflare.block_attention and block_attention_schedule on CUDA.

#include <algorithm>

#include "checks.h"
#include "params.h"
#include "stable_torch.h"

namespace dflare::cuda {
namespace {

AttentionPlan plan(const Checker& check, int64_t batch_size, int64_t block_size, int64_t num_heads,
                   int64_t kv_heads, int64_t head_dim) {
  check.head_dim(head_dim);
  check.block_size(block_size);
  TORCH_CHECK(kv_heads > 0 && num_heads > 0 && num_heads % kv_heads == 0, check.op, ": ", num_heads,
              " query heads are no multiple of ", kv_heads, " KV heads");
  TORCH_CHECK(num_heads / kv_heads * block_size <= kMaxQueryRows, check.op, ": ",
              num_heads / kv_heads, " query heads a KV head times block_size ", block_size,
              " exceeds ", kMaxQueryRows);
  const DeviceLimits limits{device_attribute(check, cudaDevAttrMultiProcessorCount),
                            device_attribute(check, cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
  return plan_attention(static_cast<int>(batch_size), static_cast<int>(block_size),
                        static_cast<int>(num_heads), static_cast<int>(kv_heads),
                        static_cast<int>(head_dim), limits);
}

int clamp_window(int64_t window) {
  return static_cast<int>(std::clamp<int64_t>(window, -1, std::numeric_limits<int>::max() / 2));
}

at::Tensor block_attention_schedule(const at::Tensor& seq_lens, int64_t block_size,
                                    int64_t num_heads, int64_t kv_heads, int64_t head_dim,
                                    int64_t window) {
  const Checker check{"block_attention_schedule", seq_lens.device()};
  const DeviceGuard guard(check.device.index());
  overlaps_launches(check);
  AttentionScheduleParams p{};
  p.seq_lens_64bit = check.indices("seq_lens", seq_lens, kAny, "[bs]");
  p.seq_lens = seq_lens.const_data_ptr();
  p.batch_size = static_cast<int>(seq_lens.size(0));
  p.head_dim = static_cast<int>(head_dim);
  p.window = clamp_window(window);
  p.plan = plan(check, p.batch_size, block_size, num_heads, kv_heads, head_dim);
  const at::Tensor schedule = at::empty({attention_schedule_size(p.plan)}, at::kInt, seq_lens);
  p.schedule = schedule.mutable_data_ptr<int32_t>();
  check_status(check.op, run_block_attention_schedule(p, current_stream(check.device)));
  return schedule;
}

at::Tensor block_attention(const at::Tensor& qkv, const at::Tensor& q_norm_weight,
                           const at::Tensor& k_norm_weight, double eps,
                           const at::Tensor& cos_sin_cache, const at::Tensor& positions,
                           const at::Tensor& k_pool, const at::Tensor& v_pool,
                           const at::Tensor& req_to_token, const at::Tensor& req_pool_indices,
                           const at::Tensor& seq_lens, int64_t block_size, int64_t window,
                           bool causal, double scale, const std::optional<at::Tensor>& schedule) {
  const Checker check{"block_attention", qkv.device()};
  const DeviceGuard guard(check.device.index());
  BlockAttentionParams p{};
  p.overlap_launch = overlaps_launches(check);
  p.element = check.element("qkv", qkv);
  const at::ScalarType dtype = qkv.scalar_type();

  check.tensor("k_pool", k_pool, dtype, {kAny, kAny, kAny}, "[slots, kv_heads, head_dim]");
  const int64_t kv_heads = k_pool.size(1), head_dim = k_pool.size(2);
  check.tensor("v_pool", v_pool, dtype, {kAny, kv_heads, head_dim}, "[slots, kv_heads, head_dim]");
  p.k_stride = check.packed_rows("k_pool", k_pool);
  p.v_stride = check.packed_rows("v_pool", v_pool);

  p.seq_lens_64bit = check.indices("seq_lens", seq_lens, kAny, "[bs]");
  const int64_t batch_size = seq_lens.size(0), rows = batch_size * block_size;
  check.tensor("qkv", qkv, dtype, {rows, kAny}, "[bs * B, (HQ + 2 * KV) * hd]");
  p.qkv_stride = check.packed_rows("qkv", qkv);
  const int64_t num_heads = qkv.size(1) / std::max<int64_t>(head_dim, 1) - 2 * kv_heads;
  TORCH_CHECK(num_heads > 0 && qkv.size(1) == (num_heads + 2 * kv_heads) * head_dim, check.op,
              ": qkv has ", qkv.size(1),
              " columns, expected (HQ + 2 * KV) * hd with KV = ", kv_heads, " and hd = ", head_dim,
              " of the pools");
  p.plan = plan(check, batch_size, block_size, num_heads, kv_heads, head_dim);

  for (const bool query : {true, false}) {
    const at::Tensor& weight = query ? q_norm_weight : k_norm_weight;
    const char* name = query ? "q_norm_weight" : "k_norm_weight";
    check.tensor(name, weight, dtype, {head_dim}, "[hd]");
    check.contiguous(name, weight);
  }
  p.rotary = check.rope(cos_sin_cache, positions, rows, head_dim);
  check.tensor("req_to_token", req_to_token, at::kInt, {kAny, kAny}, "[rows, max_len]");
  TORCH_CHECK(req_to_token.size(1) <= 1 || req_to_token.stride(1) == 1, check.op,
              ": req_to_token has strides ", req_to_token.strides(), ", expected contiguous rows");
  check.tensor("req_pool_indices", req_pool_indices, at::kLong, {batch_size}, "[bs]");
  check.contiguous("req_pool_indices", req_pool_indices);
  TORCH_CHECK(scale > 0, check.op, ": scale is ", scale, ", expected a positive number");
  TORCH_CHECK(schedule.has_value(), check.op,
              ": schedule is None; on CUDA, make one a step with block_attention_schedule");
  check.tensor("schedule", *schedule, at::kInt, {attention_schedule_size(p.plan)},
               "the size that block_attention_schedule gives for these shapes");
  check.contiguous("schedule", *schedule);

  const at::Tensor out = at::empty({rows, num_heads * head_dim}, qkv);
  if (rows == 0) return out;
  const at::Tensor partials =
      at::empty({attention_partials_size(p.plan, static_cast<int>(head_dim))}, at::kFloat, qkv);
  p.qkv = qkv.const_data_ptr();
  p.q_norm_weight = q_norm_weight.const_data_ptr();
  p.k_norm_weight = k_norm_weight.const_data_ptr();
  p.eps = static_cast<float>(eps);
  p.cos_sin = cos_sin_cache.const_data_ptr<float>();
  p.positions = positions.const_data_ptr<int64_t>();
  p.k_pool = k_pool.const_data_ptr();
  p.v_pool = v_pool.const_data_ptr();
  p.req_to_token = req_to_token.const_data_ptr<int32_t>();
  p.req_to_token_stride = req_to_token.stride(0);
  p.req_pool_indices = req_pool_indices.const_data_ptr<int64_t>();
  p.seq_lens = seq_lens.const_data_ptr();
  p.batch_size = static_cast<int>(batch_size);
  p.block_size = static_cast<int>(block_size);
  p.num_heads = static_cast<int>(num_heads);
  p.kv_heads = static_cast<int>(kv_heads);
  p.head_dim = static_cast<int>(head_dim);
  p.window = clamp_window(window);
  p.causal = causal;
  p.scale = static_cast<float>(scale);
  // Tickets are drawn in the schedule and put back: its contents are the same before and after.
  p.schedule = const_cast<int32_t*>(schedule->const_data_ptr<int32_t>());
  p.partials = partials.mutable_data_ptr<float>();
  p.out = out.mutable_data_ptr();
  check_status(check.op, run_block_attention(p, current_stream(check.device)));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dflare, CUDA, m) {
  m.impl("block_attention", TORCH_BOX(&block_attention));
  m.impl("block_attention_schedule", TORCH_BOX(&block_attention_schedule));
}

}  // namespace dflare::cuda
