// torch.ops.dflare.append_context_kv on the CPU.

#include <algorithm>
#include <vector>

#include "contract/append_context_kv.h"
#include "cpu/checks.h"
#include "cpu/isa.h"
#include "cpu/team.h"
#include "stable_torch.h"

namespace dflare::cpu {
namespace {

constexpr const char* kOp = "append_context_kv";

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
std::vector<int64_t> valid_rows(const AppendContextKv<at::Tensor>& x) {
  std::vector<int64_t> valid;
  valid.reserve(x.rows);
  if (!x.commit_lens) {
    for (int64_t row = 0; row < x.rows; ++row) valid.push_back(row);
    return valid;
  }
  const Indices lengths(*x.commit_lens);
  for (int64_t b = 0; b < x.commit_lens->size(0); ++b) {
    TORCH_CHECK(lengths[b] >= 0 && lengths[b] <= x.block_size, kOp, ": commit_lens[", b, "] is ",
                lengths[b], ", expected 0 to block_size = ", x.block_size);
    for (int64_t i = 0; i < lengths[b]; ++i) valid.push_back(b * x.block_size + i);
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
void append_as(const AppendContextKv<at::Tensor>& x, const std::vector<int64_t>& rows) {
  AppendParams<T> p{};
  static_cast<ContextWeights<T>&>(p) = x.weights<T>();
  p.layers = x.layers;
  p.taps = x.taps;
  p.hidden = x.hidden;
  p.kv_heads = x.kv_heads;
  p.head_dim = x.head_dim;
  p.rope = x.rope;

  std::vector<T*> pools;
  std::vector<int64_t> strides;
  int64_t slots = x.k_pools[0].size(0);
  for (const auto* list : {&x.k_pools, &x.v_pools}) {
    for (const at::Tensor& pool : *list) {
      pools.push_back(static_cast<T*>(pool.mutable_data_ptr()));
      strides.push_back(pool.stride(0));
      slots = std::min(slots, pool.size(0));
    }
  }
  p.pools = pools.data();
  p.slot_strides = strides.data();
  p.cache_loc = x.cache_loc.const_data_ptr<int64_t>();
  for (int64_t row : rows) {
    check_position(kOp, p.rope, row, x.cos_sin_cache.size(0));
    TORCH_CHECK(p.cache_loc[row] >= 0 && p.cache_loc[row] < slots, kOp, ": cache_loc[", row,
                "] is ", p.cache_loc[row], ", but the pools have ", slots, " slots");
  }
  if (rows.empty()) return;

  p.target_hidden = static_cast<const T*>(x.target_hidden.const_data_ptr());
  p.target_hidden_stride = x.target_hidden.stride(0);
  p.fused_stride = (p.hidden + 31) / 32 * 32;
  const int64_t num_rows = rows.size();
  const at::Tensor fused = at::empty({p.layers, std::min(num_rows, kPanelRows), p.fused_stride},
                                     at::kFloat, x.target_hidden);
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

void append(AppendContextKv<at::Tensor> x) {
  x.check(Checker(kOp, kLimits, x.target_hidden));
  const std::vector<int64_t> rows = valid_rows(x);
  with_element_type(x.target_hidden, [&](auto element) { append_as<decltype(element)>(x, rows); });
}

}  // namespace
}  // namespace dflare::cpu

STABLE_TORCH_LIBRARY_IMPL(dflare, CPU, m) {
  m.impl("append_context_kv",
         TORCH_BOX((&dflare::append_context_kv<dflare::at::Tensor, dflare::cpu::append>)));
}
