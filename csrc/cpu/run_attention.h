// Attention of a batch of requests: splits the work over torch's threads and merges the pieces.
#pragma once

#include <vector>

#include "contract/paged_context.h"
#include "cpu/checks.h"
#include "cpu/params.h"

namespace dflare::cpu {

// Fills the pool's part of `p`.
template <typename T>
void set_pools(const PagedContext<at::Tensor>& context, int64_t q_heads, AttentionParams<T>& p);

// The row of `req_to_token` of request b, with room for `length` context indices.
const int32_t* request_slots(const char* op, const at::Tensor& req_to_token,
                             const at::Tensor& req_pool_indices, int64_t b, int64_t length);

// Runs all requests. `p` is complete but for `requests` and `bad_slot`; `op` is for messages.
template <typename T>
void run_attention(const char* op, AttentionParams<T>& p, const std::vector<Request>& requests);

}  // namespace dflare::cpu
