// torch.ops.dflare.append_context_kv on CUDA.

#include <algorithm>

#include "../contract/append_context_kv.h"
#include "checks.h"
#include "params.h"

namespace dflare::cuda {
namespace {

using Arguments = AppendContextKv<at::Tensor>;

FuseNormParams fuse_norm_params(const Arguments& x) {
  FuseNormParams p{};
  static_cast<ContextWeights<void>&>(p) = x.weights<void>();
  p.element = element_type(x.target_hidden);
  p.target_hidden_stride = x.target_hidden.stride(0);
  p.block_size = static_cast<int>(x.block_size);
  p.num_taps = static_cast<int>(x.taps);
  p.num_layers = static_cast<int>(x.layers);
  p.hidden = static_cast<int>(x.hidden);
  return p;
}

ContextKvOutput output_params(const Arguments& x) {
  ContextKvOutput out{};
  static_cast<ContextWeights<void>&>(out) = x.weights<void>();
  out.rope = x.rope;
  out.num_layers = static_cast<int>(x.layers);
  out.kv_heads = static_cast<int>(x.kv_heads);
  for (int64_t layer = 0; layer < x.layers; ++layer) {
    out.k_pools[layer] = x.k_pools[layer].mutable_data_ptr();
    out.v_pools[layer] = x.v_pools[layer].mutable_data_ptr();
    out.k_strides[layer] = static_cast<int>(x.k_pools[layer].stride(0));
    out.v_strides[layer] = static_cast<int>(x.v_pools[layer].stride(0));
  }
  return out;
}

// Projects `fused` and writes it to the pools, in one kernel or by way of a GEMM.
void project_and_write(const Arguments& x, const Checker& check, const at::Tensor& fused,
                       const ContextKvOutput& out, bool overlap) {
  const cudaStream_t stream = current_stream(check.device());
  const Projection way =
      choose_projection(static_cast<int>(x.rows), x.commit_lens.has_value(), wants_wgmma(check));
  if (way != Projection::kGemm) {
    KvProjectWriteParams p{};
    p.element = element_type(fused);
    p.head_dim = static_cast<int>(x.head_dim);
    p.hidden = static_cast<int>(x.hidden);
    p.fused = fused.const_data_ptr();
    p.overlap_launch = overlap;
    p.out = out;
    const auto run = way == Projection::kWgmma ? run_kv_project_wgmma : run_kv_project_write;
    check_status(check.op, run(p, stream));
    return;
  }
  const at::Tensor kv = bmm(fused, at::transpose(x.kv_weight, 1, 2));
  NormRopeWriteParams p{};
  p.element = element_type(fused);
  p.head_dim = static_cast<int>(x.head_dim);
  p.kv = kv.const_data_ptr();
  p.out = out;
  check_status(check.op, run_norm_rope_write(p, stream));
}

void append(Arguments x) {
  const Checker check("append_context_kv", kLimits, x.target_hidden);
  const DeviceGuard guard(check.device().index());
  const bool overlap = overlaps_launches(check);
  x.check(Checker(check));
  if (x.rows == 0) return;

  FuseNormParams fuse = fuse_norm_params(x);
  fuse.tokens_ahead = 2 * device_attribute(check, cudaDevAttrMultiProcessorCount);
  fuse.overlap_launch = overlap;
  ContextKvOutput out = output_params(x);
  const int64_t panel = projection_panel_rows(x.rows, x.commit_lens ? x.block_size : 1);
  for (int64_t first = 0; first < x.rows; first += panel) {
    const int64_t rows = std::min(panel, x.rows - first);
    const at::Tensor fused = empty({x.layers, rows, x.hidden}, x.target_hidden);
    at::Tensor compact_rows;
    fuse.target_hidden = static_cast<const uint16_t*>(x.target_hidden.const_data_ptr()) +
                         first * fuse.target_hidden_stride;
    fuse.num_rows = static_cast<int>(rows);
    fuse.fused = fused.mutable_data_ptr();
    if (x.commit_lens) {
      compact_rows = empty({1 + rows}, *x.commit_lens);
      fuse.commit_lens = x.commit_lens->const_data_ptr<int32_t>() + first / x.block_size;
      fuse.compact_rows = compact_rows.mutable_data_ptr<int32_t>();
    }
    check_status(check.op, run_fuse_norm(fuse, current_stream(check.device())));

    out.rope.positions = x.rope.positions + first;
    out.cache_loc = x.cache_loc.const_data_ptr<int64_t>() + first;
    out.compact_rows = fuse.compact_rows;
    out.num_rows = static_cast<int>(rows);
    project_and_write(x, check, fused, out, overlap);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dflare, CUDA, m) {
  m.impl("append_context_kv", TORCH_BOX((&append_context_kv<at::Tensor, append>)));
}

}  // namespace dflare::cuda
