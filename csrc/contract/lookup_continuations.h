// lookup_continuations, once for every device: schema, arguments, and what must hold for them. What
// it computes stands in python/dflare/ops/lookup_continuations.py.
#pragma once

#include <tuple>

#include "arguments.h"

namespace dflare {

inline constexpr char kLookupContinuations[] =
    "lookup_continuations(Tensor tokens, Tensor req_to_token, Tensor req_pool_indices,"
    " Tensor seq_lens, Tensor anchors, int count, int least_match, int longest_match)"
    " -> (Tensor, Tensor)";

template <class Tensor>
struct LookupContinuations {
  const Tensor& tokens;
  const Tensor& req_to_token;
  const Tensor& req_pool_indices;
  const Tensor& seq_lens;
  const Tensor& anchors;
  int64_t count, least_match, longest_match;
  // What `check` reads from them.
  int64_t batch = 0, slots = 0;

  template <class Checker>
  void check(const Checker& check) {
    check.int32s("tokens", tokens, {kAny}, "[slots]");
    slots = tokens.size(0);
    batch = check.page_table(req_to_token, req_pool_indices, seq_lens);
    check.int64s("anchors", anchors, {batch}, "[bs]");
    check.require(count >= 1, "count is ", count, ", expected at least 1");
    check.require(count <= check.limits.continuation, "count is ", count, ", expected at most ",
                  check.limits.continuation);
    check.require(least_match >= 1 && least_match <= longest_match, "least_match is ", least_match,
                  ", expected 1 to longest_match = ", longest_match);
    check.require(longest_match <= check.limits.match, "longest_match is ", longest_match,
                  ", expected at most ", check.limits.match);
  }
};

// What follows, and how many tokens match.
template <class Tensor>
using Continuations = std::tuple<Tensor, Tensor>;

// The operator as Torch calls it, for the implementation `run` of a device.
template <class Tensor, Continuations<Tensor> (*run)(LookupContinuations<Tensor>)>
Continuations<Tensor> lookup_continuations(const Tensor& tokens, const Tensor& req_to_token,
                                           const Tensor& req_pool_indices, const Tensor& seq_lens,
                                           const Tensor& anchors, int64_t count,
                                           int64_t least_match, int64_t longest_match) {
  return run({tokens, req_to_token, req_pool_indices, seq_lens, anchors, count, least_match,
              longest_match});
}

}  // namespace dflare
