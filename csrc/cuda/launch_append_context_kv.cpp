// torch.ops.dflare.append_context_kv on CUDA.

#include <algorithm>

#include "checks.h"
#include "params.h"
#include "stable_torch.h"

namespace dflare::cuda {
namespace {

void append_context_kv(const at::Tensor& target_hidden, const at::Tensor& fusion_probs,
                       const at::Tensor& norm_weight, double eps, const at::Tensor& kv_weight,
                       const std::optional<at::Tensor>& kv_bias, const at::Tensor& k_norm_weight,
                       double k_norm_eps, const at::Tensor& cos_sin_cache,
                       const at::Tensor& positions, const at::Tensor& cache_loc,
                       const std::optional<at::Tensor>& commit_lens, int64_t block_size,
                       at::TensorList k_pools, at::TensorList v_pools) {
  const Checker check{"append_context_kv", target_hidden.device()};
  const DeviceGuard guard(check.device.index());
  const bool overlap = overlaps_launches(check);
  const int sm_count = device_attribute(check, cudaDevAttrMultiProcessorCount);

  // Shapes, as the arguments themselves give them.
  const ElementType element = check.element("target_hidden", target_hidden);
  const at::ScalarType dtype = target_hidden.scalar_type();
  check.tensor("fusion_probs", fusion_probs, at::kFloat, {kAny, kAny}, "[D, T]");
  check.tensor("norm_weight", norm_weight, dtype, {kAny}, "[H]");
  const int64_t layers = fusion_probs.size(0), taps = fusion_probs.size(1);
  const int64_t hidden = norm_weight.size(0);
  TORCH_CHECK(layers >= 1 && layers <= kMaxLayers, check.op, ": fusion_probs has ", layers,
              " layers, expected 1 to ", kMaxLayers);
  TORCH_CHECK(taps >= 1 && taps <= kMaxTaps, check.op, ": fusion_probs has ", taps,
              " taps, expected 1 to ", kMaxTaps);
  TORCH_CHECK(hidden % 8 == 0 && hidden >= 8 && hidden <= kMaxHidden, check.op,
              ": norm_weight has ", hidden, " elements, expected a multiple of 8 of at most ",
              kMaxHidden);
  TORCH_CHECK(static_cast<int64_t>(k_pools.size()) == layers &&
                  static_cast<int64_t>(v_pools.size()) == layers,
              check.op, ": k_pools has ", k_pools.size(), " and v_pools ", v_pools.size(),
              " tensors, expected one a layer = ", layers);
  const at::Tensor& pool = k_pools[0];
  TORCH_CHECK(pool.dim() == 3 && pool.size(1) > 0, check.op, ": k_pools[0] has shape ",
              pool.sizes(), ", expected [slots, kv_heads, head_dim]");
  const int64_t kv_heads = pool.size(1), head_dim = pool.size(2);
  check.head_dim(head_dim);
  const int64_t columns = 2 * kv_heads * head_dim;

  check.tensor("target_hidden", target_hidden, dtype, {kAny, taps * hidden}, "[N, T * H]");
  const int64_t rows = target_hidden.size(0);
  const int hidden_stride = check.packed_rows("target_hidden", target_hidden);
  check.contiguous("fusion_probs", fusion_probs);
  check.contiguous("norm_weight", norm_weight);
  check.tensor("kv_weight", kv_weight, dtype, {layers, columns, hidden}, "[D, 2 * KV * hd, H]");
  check.contiguous("kv_weight", kv_weight);
  if (kv_bias) {
    check.tensor("kv_bias", *kv_bias, dtype, {layers, columns}, "[D, 2 * KV * hd]");
    check.contiguous("kv_bias", *kv_bias);
  }
  check.tensor("k_norm_weight", k_norm_weight, dtype, {layers, head_dim}, "[D, hd]");
  check.contiguous("k_norm_weight", k_norm_weight);
  const int rotary = check.rope(cos_sin_cache, positions, rows, head_dim);
  check.tensor("cache_loc", cache_loc, at::kLong, {rows}, "[N]");
  check.contiguous("cache_loc", cache_loc);
  if (commit_lens) {
    check.tensor("commit_lens", *commit_lens, at::kInt, {kAny}, "[bs]");
    check.contiguous("commit_lens", *commit_lens);
    check.block_size(block_size);
    TORCH_CHECK(rows == commit_lens->size(0) * block_size, check.op, ": target_hidden has ", rows,
                " rows, expected bs * block_size = ", commit_lens->size(0), " * ", block_size);
  }
  if (rows == 0) return;

  ContextKvOutput out{};
  out.kv_bias = kv_bias ? kv_bias->const_data_ptr() : nullptr;
  out.k_norm_weight = k_norm_weight.const_data_ptr();
  out.k_norm_eps = static_cast<float>(k_norm_eps);
  out.cos_sin = cos_sin_cache.const_data_ptr<float>();
  out.rotary = rotary;
  out.num_layers = static_cast<int>(layers);
  out.kv_heads = static_cast<int>(kv_heads);
  for (int64_t layer = 0; layer < layers; ++layer) {
    for (const bool keys : {true, false}) {
      const at::Tensor& x = keys ? k_pools[layer] : v_pools[layer];
      const char* name = keys ? "k_pools" : "v_pools";
      check.tensor(name, x, dtype, {kAny, kv_heads, head_dim}, "[slots, kv_heads, head_dim]");
      (keys ? out.k_strides : out.v_strides)[layer] = check.packed_rows(name, x);
      (keys ? out.k_pools : out.v_pools)[layer] = x.mutable_data_ptr();
    }
  }

  const cudaStream_t stream = current_stream(check.device);
  const bool fused_projection = use_fused_projection(rows, commit_lens.has_value());
  const int64_t panel = projection_panel_rows(rows, commit_lens ? block_size : 1);
  for (int64_t first = 0; first < rows; first += panel) {
    const int64_t panel_rows = std::min(panel, rows - first);
    const at::Tensor fused = at::empty({layers, panel_rows, hidden}, target_hidden);
    at::Tensor compact_rows;
    if (commit_lens) compact_rows = at::empty({1 + panel_rows}, *commit_lens);

    FuseNormParams fuse{};
    fuse.element = element;
    fuse.target_hidden =
        static_cast<const uint16_t*>(target_hidden.const_data_ptr()) + first * hidden_stride;
    fuse.target_hidden_stride = hidden_stride;
    fuse.probs = fusion_probs.const_data_ptr<float>();
    fuse.norm_weight = norm_weight.const_data_ptr();
    fuse.eps = static_cast<float>(eps);
    fuse.num_rows = static_cast<int>(panel_rows);
    fuse.block_size = static_cast<int>(block_size);
    fuse.num_taps = static_cast<int>(taps);
    fuse.num_layers = static_cast<int>(layers);
    fuse.hidden = static_cast<int>(hidden);
    fuse.fused = fused.mutable_data_ptr();
    fuse.tokens_ahead = 2 * sm_count;
    fuse.overlap_launch = overlap;
    if (commit_lens) {
      fuse.commit_lens = commit_lens->const_data_ptr<int32_t>() + first / block_size;
      fuse.compact_rows = compact_rows.mutable_data_ptr<int32_t>();
    }
    check_status(check.op, run_fuse_norm(fuse, stream));

    out.positions = positions.const_data_ptr<int64_t>() + first;
    out.cache_loc = cache_loc.const_data_ptr<int64_t>() + first;
    out.compact_rows = fuse.compact_rows;
    out.num_rows = static_cast<int>(panel_rows);
    if (fused_projection) {
      KvProjectWriteParams project{};
      project.element = element;
      project.head_dim = static_cast<int>(head_dim);
      project.hidden = static_cast<int>(hidden);
      project.fused = fused.const_data_ptr();
      project.kv_weight = kv_weight.const_data_ptr();
      project.overlap_launch = overlap;
      project.out = out;
      check_status(check.op, run_kv_project_write(project, stream));
    } else {
      const at::Tensor kv = at::bmm(fused, at::transpose(kv_weight, 1, 2));
      NormRopeWriteParams write{};
      write.element = element;
      write.head_dim = static_cast<int>(head_dim);
      write.kv = kv.const_data_ptr();
      write.out = out;
      check_status(check.op, run_norm_rope_write(write, stream));
    }
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dflare, CUDA, m) {
  m.impl("append_context_kv", TORCH_BOX(&append_context_kv));
}

}  // namespace dflare::cuda
