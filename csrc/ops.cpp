// Schemas of torch.ops.dflare.*; implementations register themselves per device (csrc/cpu,
// csrc/cuda). What an operator computes stands in the Python function of the same name
// (python/dflare/ops), what must hold for its arguments in csrc/contract or beside its code.
#include "build_info.h"
#include "contract/append_context_kv.h"
#include "contract/block_attention.h"
#include "contract/draft_tree.h"
#include "contract/head_argmax.h"
#include "contract/lookup_continuations.h"
#include "stable_torch.h"

STABLE_TORCH_LIBRARY(dflare, m) {
  m.def(dflare::kAppendContextKv);
  m.def(dflare::kBlockAttention);
  m.def(dflare::kBlockAttentionSchedule);  // CUDA only: a CPU has nothing to schedule
  m.def(dflare::kHeadArgmax);
  m.def(
      "paged_attention(Tensor q, Tensor k_pool, Tensor v_pool, Tensor req_to_token,"
      " Tensor req_pool_indices, Tensor seq_lens, Tensor query_start, int window, bool causal,"
      " float scale, float logit_cap, Tensor? parents=None) -> Tensor");
  m.def(dflare::kLookupContinuations);
  // CPU only: the rest of a target's layers.
  m.def(
      "decoder_layers(Tensor(a!) residual, Tensor[] norms, Tensor[] matrices, Tensor[] biases,"
      " Tensor[] head_norms, float eps, Tensor cos_sin_cache, Tensor positions,"
      " Tensor(b!)[] pools, Tensor cache_loc, Tensor req_to_token, Tensor req_pool_indices,"
      " Tensor seq_lens, Tensor query_start, int window, float scale, float logit_cap,"
      " Tensor? parents, int[] taps) -> (Tensor, Tensor)");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor(a!)? residual, Tensor weight, float eps) -> Tensor");
  m.def("silu_and_mul(Tensor x) -> Tensor");
  m.def("rotate_heads(Tensor(a!) x, Tensor cos_sin_cache, Tensor positions, int head_dim) -> ()");
  // Draft trees, from marginals to committed rows of the cache. On CUDA SGLang has what moves
  // slots, and its attention takes masks; on a CPU ours takes parents.
  m.def(dflare::kBuildDraftTree);
  m.def(dflare::kWalkDraftTree);
  m.def(
      "cut_draft_tree(Tensor tokens, Tensor parents, Tensor depths, Tensor counts)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("write_tree_mask(Tensor parents, Tensor seq_lens, Tensor(a!) mask) -> ()");
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
