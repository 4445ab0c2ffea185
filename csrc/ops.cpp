// Schemas of torch.ops.dflare.*; implementations register themselves per device (csrc/cpu,
// csrc/cuda). The contract of each argument is the docstring of the Python function of the same
// name (python/dflare/ops).
#include "build_info.h"
#include "stable_torch.h"

STABLE_TORCH_LIBRARY(dflare, m) {
  m.def(
      "append_context_kv(Tensor target_hidden, Tensor fusion_probs, Tensor norm_weight, float eps,"
      " Tensor kv_weight, Tensor? kv_bias, Tensor k_norm_weight, float k_norm_eps,"
      " Tensor cos_sin_cache, Tensor positions, Tensor cache_loc, Tensor? commit_lens,"
      " int block_size, Tensor(a!)[] k_pools, Tensor(b!)[] v_pools) -> ()");
  m.def(
      "block_attention(Tensor qkv, Tensor q_norm_weight, Tensor k_norm_weight, float eps,"
      " Tensor cos_sin_cache, Tensor positions, Tensor k_pool, Tensor v_pool,"
      " Tensor req_to_token, Tensor req_pool_indices, Tensor seq_lens, int block_size, int window,"
      " bool causal, float scale, Tensor? schedule=None) -> Tensor");
  // CUDA only: a CPU has nothing to schedule.
  m.def(
      "block_attention_schedule(Tensor seq_lens, int block_size, int num_heads, int kv_heads,"
      " int head_dim, int window) -> Tensor");
  m.def(
      "paged_attention(Tensor q, Tensor k_pool, Tensor v_pool, Tensor req_to_token,"
      " Tensor req_pool_indices, Tensor seq_lens, Tensor query_start, int window, bool causal,"
      " float scale, float logit_cap, Tensor? parents=None) -> Tensor");
  m.def(
      "lookup_continuations(Tensor tokens, Tensor req_to_token, Tensor req_pool_indices,"
      " Tensor seq_lens, Tensor anchors, int count, int least_match, int longest_match)"
      " -> (Tensor, Tensor)");
  // CPU only: the rest of a target's layers.
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor(a!)? residual, Tensor weight, float eps) -> Tensor");
  m.def("silu_and_mul(Tensor x) -> Tensor");
  m.def("rotate_heads(Tensor(a!) x, Tensor cos_sin_cache, Tensor positions, int head_dim) -> ()");
  // CPU only: draft trees, from marginals to committed rows of the cache.
  m.def(
      "build_draft_tree(Tensor anchors, Tensor tokens, Tensor log_probs, int nodes,"
      " Tensor? branch=None, Tensor? branch_log_probs=None, Tensor? branch_lens=None)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "walk_draft_tree(Tensor tokens, Tensor parents, Tensor target_tokens, int stride)"
      " -> (Tensor, Tensor, Tensor)");
  m.def("move_tree_path(Tensor path, Tensor commit_lens, Tensor slots, Tensor(a!)[] pools) -> ()");
  // Instruction set that the CPU kernels run with: "baseline", "avx2", "avx512" or "avx512bf16".
  m.def("cpu_isa() -> str");
  // What was compiled, as JSON: see dflare/ops/library.py.
  m.def("build_info() -> str");
}

namespace dflare {

std::string build_info() { return DFLARE_BUILD_INFO; }

}  // namespace dflare

STABLE_TORCH_LIBRARY_IMPL(dflare, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&dflare::build_info));
}
