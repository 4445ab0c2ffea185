// torch.ops.dflare.lookup_continuations on the CPU.

#include <algorithm>
#include <atomic>
#include <memory>

#include "contract/lookup_continuations.h"
#include "cpu/checks.h"
#include "cpu/run_attention.h"
#include "cpu/team.h"

namespace dflare::cpu {
namespace {

constexpr const char* kOp = "lookup_continuations";
constexpr int64_t kStride = 64;  // tokens that are passed over at once where none is the last one

struct Match {
  int64_t length = 0, end = 0;  // the text before `end` ends as the whole text does
};

bool holds(const int32_t* text, int32_t token) {
  int found = 0;
  for (int64_t i = 0; i < kStride; ++i) found |= text[i] == token;
  return found;
}

// Of text[0 .. last], from its end to its beginning: what comes first is the most recent.
Match find(const int32_t* text, int64_t last, int64_t least, int64_t longest) {
  Match best{least - 1, 0};
  int64_t end = last;
  while (end > best.length && best.length < longest) {
    if (end >= kStride && !holds(text + end - kStride, text[last])) {
      end -= kStride;
      continue;
    }
    for (const int64_t stop = std::max<int64_t>(end - kStride, 0); end > stop; --end) {
      // Only one that is longer than the best so far.
      if (end <= best.length || text[end - 1 - best.length] != text[last - best.length]) continue;
      const int64_t most = std::min(end, longest);
      int64_t length = 0;
      while (length < most && text[end - 1 - length] == text[last - length]) ++length;
      if (length > best.length) best = {length, end};
      if (best.length == longest) break;
    }
  }
  return best.end ? best : Match{};
}

Continuations<at::Tensor> look_up(LookupContinuations<at::Tensor> x) {
  x.check(Checker(kOp, kLimits, x.tokens));
  at::Tensor found = at::empty({x.batch, x.count}, at::kLong, x.anchors);
  at::Tensor lengths = at::empty({x.batch}, at::kInt, x.anchors);
  const Indices prefixes(x.seq_lens);
  const int32_t* known = x.tokens.const_data_ptr<int32_t>();
  const int64_t* anchor = x.anchors.const_data_ptr<int64_t>();
  int64_t* out = found.mutable_data_ptr<int64_t>();
  int32_t* out_lengths = lengths.mutable_data_ptr<int32_t>();
  parallel_for(at::get_num_threads(), x.batch, 1, [&](int64_t first, int64_t stop) {
    for (int64_t b = first; b < stop; ++b) {
      const int64_t last = prefixes[b];
      const int32_t* places = request_slots(kOp, x.req_to_token, x.req_pool_indices, b, last);
      const std::unique_ptr<int32_t[]> text(new int32_t[last + 1]);
      for (int64_t i = 0; i < last; ++i) {
        TORCH_CHECK(places[i] >= 0 && places[i] < x.slots, kOp, ": token ", i, " of request ", b,
                    " is in slot ", places[i], ", expected 0 to ", x.slots - 1);
        text[i] = known[places[i]];
      }
      text[last] = static_cast<int32_t>(anchor[b]);
      const Match match = find(text.get(), last, x.least_match, x.longest_match);
      const int64_t period = last + 1 - match.end;
      for (int64_t i = 0; i < x.count; ++i) {
        out[b * x.count + i] = match.length ? text[match.end + i % period] : 0;
      }
      out_lengths[b] = static_cast<int32_t>(match.length);
    }
  });
  return {found, lengths};
}

}  // namespace
}  // namespace dflare::cpu

STABLE_TORCH_LIBRARY_IMPL(dflare, CPU, m) {
  m.impl("lookup_continuations",
         TORCH_BOX((&dflare::lookup_continuations<dflare::at::Tensor, dflare::cpu::look_up>)));
}
