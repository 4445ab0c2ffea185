"""The context of a batch in paged K/V pools, as the attention operators read it."""

from typing import NamedTuple

from torch import Tensor


class PagedContext(NamedTuple):
    """Where the keys and values of each request lie.

    Attributes:
        k_pool, v_pool: [slots, KV, hd], last two dimensions contiguous.
        req_to_token: [rows, max_len] int32, slot of each context index of a request.
        req_pool_indices: [bs] int64, row of `req_to_token` of each request.
        seq_lens: [bs] int64 or int32, tokens of each request.
    """

    k_pool: Tensor
    v_pool: Tensor
    req_to_token: Tensor
    req_pool_indices: Tensor
    seq_lens: Tensor

    def slots(self, request: int, length: int) -> Tensor:
        """[length] int64: the slots of a request's first tokens."""
        return self.req_to_token[self.req_pool_indices[request], :length].long()
