// torch.ops.dflare.append_context_kv on the CPU.

#include <algorithm>
#include <vector>

#include "cpu/checks.h"
#include "cpu/isa.h"
#include "cpu/team.h"
#include "stable_torch.h"

namespace dflare::cpu {
namespace {

constexpr Checker kCheck{"append_context_kv"};

// Fused rows of a projection task: they pass by every cached block of weights, from the second- or
// third-level cache. Against 256 KiB, which fits the second level, 2 MiB was 1.3 times as fast at
// hidden size 2560, where weights come from memory, and equal at 576 (Zen 5, 1 MiB second level).
constexpr int64_t kChunkBytes = 2 << 20;
constexpr int64_t kMaxChunkRows = 192;
// Rows fused before they are projected: bounds the scratch of a long prompt.
constexpr int64_t kPanelRows = 4 * kMaxChunkRows;
// Multiply-adds that are worth waking a thread for: a few microseconds.
constexpr int64_t kThreadCost = 1 << 17;

// Indices of the rows that count.
std::vector<int64_t> valid_rows(int64_t rows, const std::optional<at::Tensor>& commit_lens,
                                int64_t block_size) {
  std::vector<int64_t> valid;
  valid.reserve(rows);
  if (!commit_lens) {
    for (int64_t row = 0; row < rows; ++row) valid.push_back(row);
    return valid;
  }
  kCheck.device("commit_lens", *commit_lens);
  kCheck.dtype("commit_lens", *commit_lens, at::kInt);
  kCheck.shape("commit_lens", *commit_lens, {kAny}, "[bs]");
  const int64_t bs = commit_lens->size(0);
  TORCH_CHECK(block_size > 0 && rows == bs * block_size, "append_context_kv: target_hidden has ",
              rows, " rows, expected bs * block_size = ", bs, " * ", block_size);
  const Indices lengths(*commit_lens);
  for (int64_t b = 0; b < bs; ++b) {
    TORCH_CHECK(lengths[b] >= 0 && lengths[b] <= block_size, "append_context_kv: commit_lens[", b,
                "] is ", lengths[b], ", expected 0 to block_size = ", block_size);
    for (int64_t i = 0; i < lengths[b]; ++i) valid.push_back(b * block_size + i);
  }
  return valid;
}

// Rows a projection task: many, so that weights are read rarely, but few enough that every thread
// finds several tasks.
int64_t choose_chunk_rows(int64_t rows, int64_t row_bytes, int64_t tasks_per_chunk) {
  int64_t chunk = std::clamp<int64_t>(kChunkBytes / row_bytes, 12, kMaxChunkRows);
  while (chunk > 12 && (rows + chunk - 1) / chunk * tasks_per_chunk < 4 * at::get_num_threads()) {
    chunk /= 2;
  }
  return std::min(chunk, rows);
}

template <typename T>
void append_context_kv_as(const at::Tensor& target_hidden, const at::Tensor& fusion_probs,
                          const at::Tensor& norm_weight, double eps, const at::Tensor& kv_weight,
                          const std::optional<at::Tensor>& kv_bias, const at::Tensor& k_norm_weight,
                          double k_norm_eps, const at::Tensor& cos_sin_cache,
                          const at::Tensor& positions, const at::Tensor& cache_loc,
                          const std::vector<int64_t>& rows, at::TensorList k_pools,
                          at::TensorList v_pools) {
  AppendParams<T> p{};
  p.layers = fusion_probs.size(0);
  p.taps = fusion_probs.size(1);
  p.hidden = norm_weight.size(0);
  p.kv_heads = k_pools[0].size(1);
  p.head_dim = k_pools[0].size(2);
  p.rope = make_rope(kCheck, cos_sin_cache, positions, target_hidden.size(0), p.head_dim);

  std::vector<T*> pools;
  std::vector<int64_t> strides;
  int64_t slots = k_pools[0].size(0);
  for (const auto* list : {&k_pools, &v_pools}) {
    for (const at::Tensor& pool : *list) {
      pools.push_back(static_cast<T*>(pool.mutable_data_ptr()));
      strides.push_back(pool.stride(0));
      slots = std::min(slots, pool.size(0));
    }
  }
  p.pools = pools.data();
  p.slot_strides = strides.data();
  p.cache_loc = cache_loc.const_data_ptr<int64_t>();
  for (int64_t row : rows) {
    check_position(kCheck, p.rope, row, cos_sin_cache.size(0));
    TORCH_CHECK(p.cache_loc[row] >= 0 && p.cache_loc[row] < slots, "append_context_kv: cache_loc[",
                row, "] is ", p.cache_loc[row], ", but the pools have ", slots, " slots");
  }
  if (rows.empty()) return;

  p.target_hidden = static_cast<const T*>(target_hidden.const_data_ptr());
  p.target_hidden_stride = target_hidden.stride(0);
  p.fusion_probs = fusion_probs.const_data_ptr<float>();
  p.norm_weight = static_cast<const T*>(norm_weight.const_data_ptr());
  p.eps = static_cast<float>(eps);
  p.kv_weight = static_cast<const T*>(kv_weight.const_data_ptr());
  p.kv_bias = kv_bias ? static_cast<const T*>(kv_bias->const_data_ptr()) : nullptr;
  p.k_norm_weight = static_cast<const T*>(k_norm_weight.const_data_ptr());
  p.k_norm_eps = static_cast<float>(k_norm_eps);
  p.fused_stride = (p.hidden + 31) / 32 * 32;
  const int64_t num_rows = rows.size();
  const at::Tensor fused = at::empty({p.layers, std::min(num_rows, kPanelRows), p.fused_stride},
                                     at::kFloat, target_hidden);
  p.fused = fused.mutable_data_ptr();

  const KernelsFor<T>& kernel = kernels().get<T>();
  const int64_t heads = 2 * p.kv_heads;
  const int64_t grain = std::max<int64_t>(1, kThreadCost / (p.layers * p.taps * p.hidden));
  for (int64_t first = 0; first < num_rows; first += kPanelRows) {
    p.rows = rows.data() + first;
    p.num_rows = std::min(kPanelRows, num_rows - first);
    p.chunk_rows = choose_chunk_rows(p.num_rows, p.fused_stride * 4, p.layers * heads);
    parallel_for(at::get_num_threads(), p.num_rows, grain,
                 [&](int64_t begin, int64_t end) { kernel.fuse_norm(p, begin, end); });
    const int64_t chunks = (p.num_rows + p.chunk_rows - 1) / p.chunk_rows;
    const int64_t task_cost = p.chunk_rows * p.head_dim * p.hidden;
    parallel_for(at::get_num_threads(), p.layers * chunks * heads,
                 std::max<int64_t>(1, kThreadCost / task_cost),
                 [&](int64_t begin, int64_t end) { kernel.project(p, begin, end); });
  }
}

void append_context_kv(const at::Tensor& target_hidden, const at::Tensor& fusion_probs,
                       const at::Tensor& norm_weight, double eps, const at::Tensor& kv_weight,
                       const std::optional<at::Tensor>& kv_bias, const at::Tensor& k_norm_weight,
                       double k_norm_eps, const at::Tensor& cos_sin_cache,
                       const at::Tensor& positions, const at::Tensor& cache_loc,
                       const std::optional<at::Tensor>& commit_lens, int64_t block_size,
                       at::TensorList k_pools, at::TensorList v_pools) {
  const at::ScalarType dtype = target_hidden.scalar_type();
  kCheck.shape("fusion_probs", fusion_probs, {kAny, kAny}, "[layers, taps]");
  kCheck.shape("norm_weight", norm_weight, {kAny}, "[hidden]");
  const int64_t layers = fusion_probs.size(0), taps = fusion_probs.size(1);
  const int64_t hidden = norm_weight.size(0);
  TORCH_CHECK(layers > 0 && taps > 0 && hidden > 0, "append_context_kv: fusion_probs has shape ",
              fusion_probs.sizes(), " and norm_weight ", norm_weight.sizes(),
              ", expected at least one layer, one tap and one channel");
  const std::pair<const char*, at::TensorList> pools[] = {{"k_pools", k_pools},
                                                          {"v_pools", v_pools}};
  for (const auto& [name, list] : pools) {
    TORCH_CHECK(static_cast<int64_t>(list.size()) == layers, "append_context_kv: ", name, " has ",
                list.size(), " tensors, expected one for each of the ", layers,
                " layers of fusion_probs");
  }
  kCheck.shape("k_pools[0]", k_pools[0], {kAny, kAny, kAny}, "[slots, kv_heads, head_dim]");
  const int64_t kv_heads = k_pools[0].size(1), head_dim = k_pools[0].size(2);
  kCheck.heads(kv_heads, head_dim);
  for (const auto& [name, list] : pools) {
    for (const at::Tensor& pool : list) {
      kCheck.shape(name, pool, {kAny, kv_heads, head_dim}, "[slots, kv_heads, head_dim]");
      kCheck.dtype(name, pool, dtype);
      kCheck.device(name, pool);
      kCheck.packed(name, pool, 2);
    }
  }
  const int64_t rows = target_hidden.dim() > 0 ? target_hidden.size(0) : 0;
  kCheck.shape("target_hidden", target_hidden, {kAny, taps * hidden}, "[N, taps * hidden]");
  kCheck.packed("target_hidden", target_hidden, 1);
  kCheck.shape("kv_weight", kv_weight, {layers, 2 * kv_heads * head_dim, hidden},
               "[layers, 2 * kv_heads * head_dim, hidden]");
  kCheck.shape("k_norm_weight", k_norm_weight, {layers, head_dim}, "[layers, head_dim]");
  kCheck.shape("cache_loc", cache_loc, {rows}, "[N]");
  kCheck.device("cache_loc", cache_loc);
  kCheck.dtype("cache_loc", cache_loc, at::kLong);
  kCheck.contiguous("cache_loc", cache_loc);
  kCheck.device("fusion_probs", fusion_probs);
  kCheck.dtype("fusion_probs", fusion_probs, at::kFloat);
  kCheck.contiguous("fusion_probs", fusion_probs);
  auto check_weight = [&](const char* name, const at::Tensor& x) {
    kCheck.device(name, x);
    kCheck.dtype(name, x, dtype);
    kCheck.contiguous(name, x);
  };
  check_weight("norm_weight", norm_weight);
  check_weight("kv_weight", kv_weight);
  check_weight("k_norm_weight", k_norm_weight);
  if (kv_bias) {
    kCheck.shape("kv_bias", *kv_bias, {layers, 2 * kv_heads * head_dim},
                 "[layers, 2 * kv_heads * head_dim]");
    check_weight("kv_bias", *kv_bias);
  }
  const std::vector<int64_t> valid = valid_rows(rows, commit_lens, block_size);
  with_element_type(kCheck, "target_hidden", target_hidden, [&](auto element) {
    append_context_kv_as<decltype(element)>(
        target_hidden, fusion_probs, norm_weight, eps, kv_weight, kv_bias, k_norm_weight,
        k_norm_eps, cos_sin_cache, positions, cache_loc, valid, k_pools, v_pools);
  });
}

}  // namespace
}  // namespace dflare::cpu

STABLE_TORCH_LIBRARY_IMPL(dflare, CPU, m) {
  m.impl("append_context_kv", TORCH_BOX(&dflare::cpu::append_context_kv));
}
