// Who asks and what they see: the requests of paged attention, as its kernels take them.
#pragma once

#include <optional>
#include <vector>

#include "contract/paged_context.h"
#include "cpu/params.h"
#include "stable_torch.h"

namespace dflare::cpu {

// Depths and paths of the nodes of all requests' trees, as Request has them.
struct Trees {
  std::vector<int32_t> depths, paths;
  int64_t stride = 0;
};

struct PagedQueries {
  Trees trees;
  std::vector<Request> requests;  // those that have queries; what they point to lies in `trees`
  int64_t used = 0;               // rows that belong to requests; the others are padding
};

// `context` was checked, `query_start` is [bs + 1] and `parents` [rows] if there are any. Their
// values are checked here; `op` is for messages.
PagedQueries paged_queries(const char* op, const PagedContext<at::Tensor>& context,
                           const at::Tensor& query_start, const std::optional<at::Tensor>& parents,
                           int64_t rows);

}  // namespace dflare::cpu
