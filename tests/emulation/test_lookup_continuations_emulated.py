"""The look-up kernel against the plain search, in every order of its threads."""

import sys
from pathlib import Path

import torch
from emulated import LookupParams, emulator
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from op_cases import lookup_case

from dflare.ops import lookup_continuations_reference


def look_up(case, count: int, least: int, longest: int, seed: int):
    emu = emulator(torch.bfloat16, 128)
    batch = len(case["seq_lens"])
    with emu.memory() as memory:
        x = {name: memory.copy(name, tensor) for name, tensor in case.items()}
        found = memory.empty("found", (batch, count), torch.int64)
        lengths = memory.empty("lengths", (batch,), torch.int32)
        params = LookupParams(
            **{name: tensor.data_ptr() for name, tensor in x.items()},
            req_to_token_stride=x["req_to_token"].stride(0),
            seq_lens_64bit=x["seq_lens"].dtype == torch.int64,
            batch_size=batch,
            count=count,
            least_match=least,
            longest_match=longest,
            found=found.data_ptr(),
            lengths=lengths.data_ptr(),
        )
        emu.launch("lookup_continuations", params)
        emu.synchronize(seed)
        return found.clone(), lengths.clone()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_equals_the_reference_for_any_texts(data):
    case = lookup_case(
        data.draw(st.integers(0, 1 << 20)),
        data.draw(st.lists(st.integers(0, 700), min_size=1, max_size=3)),
        vocabulary=data.draw(st.sampled_from([1, 2, 3, 20])),
        repeat=data.draw(st.sampled_from([0, 1, 7, 90])),
        long=data.draw(st.booleans()),
    )
    least, longest = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([3, 8, 64, 300]))
    count = data.draw(st.sampled_from([1, 5, 300]))
    found, lengths = look_up(case, count, least, longest, data.draw(st.integers(0, 1 << 20)))
    expected, expected_lengths = lookup_continuations_reference(
        **case, count=count, least_match=least, longest_match=longest
    )
    assert torch.equal(lengths, expected_lengths)
    assert torch.equal(found, expected)
