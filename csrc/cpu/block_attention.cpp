// torch.ops.dflare.block_attention on the CPU.

#include "contract/block_attention.h"

#include "cpu/run_attention.h"

namespace dflare::cpu {
namespace {

constexpr const char* kOp = "block_attention";

template <typename T>
at::Tensor attend_as(const BlockAttention<at::Tensor>& x) {
  AttentionParams<T> p{};
  static_cast<BlockAttentionInputs<T>&>(p) = x.inputs<T>();
  set_pools(x.context, x.num_heads, p);
  const int64_t max_pos = x.cos_sin_cache.size(0);
  for (int64_t row = 0; row < x.rows; ++row) check_position(kOp, p.rope, row, max_pos);

  const Indices lengths(x.context.seq_lens);
  std::vector<Request> requests(x.context.batch);
  for (int64_t b = 0; b < x.context.batch; ++b) {
    const int64_t length = lengths[b];
    requests[b] = {
        request_slots(kOp, x.context.req_to_token, x.context.req_pool_indices, b, length), length,
        b * x.block_size, x.block_size, length};
  }
  p.q = static_cast<const T*>(x.qkv.const_data_ptr());
  p.q_stride = x.qkv.stride(0);
  p.block_k = p.q + x.num_heads * p.head_dim;
  p.block_v = p.block_k + p.kv_heads * p.head_dim;
  at::Tensor out = at::empty({x.rows, x.num_heads * p.head_dim}, x.qkv);
  p.out = static_cast<T*>(out.mutable_data_ptr());
  run_attention(kOp, p, requests);
  return out;
}

at::Tensor attend(BlockAttention<at::Tensor> x) {
  x.check(Checker(kOp, kLimits, x.qkv));
  TORCH_CHECK(!x.schedule, kOp, ": schedule was given, expected None on the CPU");
  return with_element_type(x.qkv, [&](auto element) { return attend_as<decltype(element)>(x); });
}

}  // namespace
}  // namespace dflare::cpu

STABLE_TORCH_LIBRARY_IMPL(dflare, CPU, m) {
  m.impl("block_attention",
         TORCH_BOX((&dflare::block_attention<dflare::at::Tensor, dflare::cpu::attend>)));
}
