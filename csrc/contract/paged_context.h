// The context of a batch in paged K/V pools, as the attention operators take it.
#pragma once

#include "arguments.h"

namespace dflare {

template <class Tensor>
struct PagedContext {
  const Tensor& k_pool;
  const Tensor& v_pool;
  const Tensor& req_to_token;
  const Tensor& req_pool_indices;
  const Tensor& seq_lens;
  // What `check` reads from them.
  int64_t batch = 0, slots = 0, kv_heads = 0, head_dim = 0;

  template <class Checker>
  void check(const Checker& check) {
    check.rows("k_pool", k_pool, {kAny, kAny, kAny}, "[slots, kv_heads, head_dim]");
    slots = k_pool.size(0), kv_heads = k_pool.size(1), head_dim = k_pool.size(2);
    check.heads(kv_heads, head_dim);
    check.rows("v_pool", v_pool, {slots, kv_heads, head_dim}, "shape of k_pool");
    batch = check.page_table(req_to_token, req_pool_indices, seq_lens);
  }
};

}  // namespace dflare
