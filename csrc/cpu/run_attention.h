// Attention of a batch of requests: splits the work over torch's threads and merges the pieces.
#pragma once

#include <vector>

#include "cpu/checks.h"
#include "cpu/params.h"
#include "stable_torch.h"

namespace dflare::cpu {

// Checks what block_attention and paged_attention have in common and fills the pool's part of `p`.
template <typename T>
void set_pools(const Checker& check, const at::Tensor& k_pool, const at::Tensor& v_pool,
               AttentionParams<T>& p);

// The row of `req_to_token` of request b, with room for `length` context indices.
const int32_t* request_slots(const Checker& check, const at::Tensor& req_to_token,
                             const Indices& req_pool_indices, int64_t b, int64_t length);

void check_page_table(const Checker& check, const at::Tensor& req_to_token,
                      const at::Tensor& req_pool_indices, const at::Tensor& seq_lens);

// Runs all requests. `p` is complete but for `requests` and `bad_slot`.
template <typename T>
void run_attention(const Checker& check, AttentionParams<T>& p,
                   const std::vector<Request>& requests);

}  // namespace dflare::cpu
