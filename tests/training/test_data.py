"""Corpora, batches and anchors."""

import gzip
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflare.training.data.batches import draw_anchors, epoch_batches, make_batch
from dflare.training.data.corpus import Corpus, check_mask_token, load_corpus, split
from dflare.training.errors import ConfigError, DataError
from dflare.training.loss.vocabulary import LossVocabulary

HEADER = {"dflare_data": 1, "target": "t", "vocab_size": 100}


def write(path, *records, header=HEADER):
    lines = [json.dumps(record) for record in (header, *records)]
    path.write_text("\n".join(lines) + "\n")
    return path


def corpus_of(*sequences: tuple[list[int], list[int]]) -> Corpus:
    ids = [np.array(tokens, dtype=np.int32) for tokens, _ in sequences]
    offsets = np.cumsum([0] + [len(part) for part in ids])
    masks = np.concatenate([np.array(mask, dtype=bool) for _, mask in sequences])
    return Corpus(np.concatenate(ids), masks, offsets)


def test_a_file_gives_tokens_and_what_is_supervised(tmp_path):
    path = write(tmp_path / "d.jsonl", {"ids": [5, 6, 7, 8, 9], "loss": [[1, 3], [4, 5]]})
    corpus = load_corpus([path], 100, max_length=4)
    assert corpus.tokens(0).tolist() == [5, 6, 7, 8]
    assert corpus.mask(0).tolist() == [False, True, True, False]


def test_compressed_files_are_read(tmp_path):
    plain = write(tmp_path / "d.jsonl", {"ids": [5, 6], "loss": [[0, 2]]})
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write(plain.read_text())
    packed = load_corpus([tmp_path / "d.jsonl.gz"], 100, 8)
    assert packed.fingerprint() == load_corpus([plain], 100, 8).fingerprint()


def test_a_line_cut_short_by_an_interruption_is_left_out(tmp_path):
    path = write(tmp_path / "d.jsonl", {"ids": [5, 6], "loss": [[0, 2]]})
    path.write_text(path.read_text() + '{"ids": [1, 2')
    assert len(load_corpus([path], 100, 8)) == 1


@pytest.mark.parametrize(
    ("records", "hint"),
    [
        ([{"ids": [5, 6, 7], "loss": []}], "nothing to learn"),
        ([{"ids": [5, 6, 7], "loss": [[0, 1], [2, 3]]}], "nothing to learn"),
        ([{"ids": [5, 600], "loss": [[0, 2]]}], "vocabulary of 100"),
        ([{"ids": [5, -1], "loss": [[0, 2]]}], "vocabulary of 100"),
        ([{"tokens": [5]}], r"d.jsonl:2.*\"ids\""),
    ],
)
def test_data_that_cannot_be_learned_from_is_refused(tmp_path, records, hint):
    path = write(tmp_path / "d.jsonl", *records)
    with pytest.raises(DataError, match=hint):
        load_corpus([path], 100, 8)


def test_data_of_another_vocabulary_is_refused(tmp_path):
    path = write(tmp_path / "d.jsonl", {"ids": [5, 6], "loss": [[0, 2]]})
    with pytest.raises(DataError, match=r"vocabulary of 100 .*the target has 200"):
        load_corpus([path], 200, 8)


@pytest.mark.parametrize("content", ["", "not json\n{}\n", '{"ids": [1]}\n'])
def test_a_file_of_another_format_is_refused(tmp_path, content):
    (tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"d\.jsonl"):
        load_corpus([tmp_path / "d.jsonl"], 100, 8)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl"):
        load_corpus([tmp_path / "none.jsonl"], 100, 8)


def test_a_mask_token_in_the_text_is_refused_with_a_proposal():
    corpus = corpus_of(([0, 1, 3, 3], [1, 1, 1, 1]))
    with pytest.raises(ConfigError, match=r"3 occurs 2 times.*\(2, 4 do not occur\)"):
        check_mask_token(3, corpus, 5)
    check_mask_token(4, corpus, 5)


def test_the_same_sequences_are_held_out_in_any_order():
    sequences = [([n, n + 1, n + 2], [1, 1, 1]) for n in range(20)]
    held = [split(corpus_of(*part), 5)[1] for part in (sequences, sequences[::-1])]
    texts = [{tuple(corpus.tokens(i)) for i in range(len(corpus))} for corpus in held]
    assert texts[0] == texts[1] and len(texts[0]) == 5


def test_training_and_held_out_sequences_are_all_of_them():
    corpus = corpus_of(*[([n, n + 1], [1, 1]) for n in range(9)])
    train, held = split(corpus, 3)
    assert sorted(np.concatenate([train.ids, held.ids])) == sorted(corpus.ids)
    assert len(split(corpus, 100)[1]) == 4  # never more than half


@settings(deadline=None, max_examples=30)
@given(count=st.integers(1, 60), batch=st.integers(1, 9), seed=st.integers(0, 99))
def test_an_epoch_uses_each_sequence_at_most_once(count, batch, seed):
    lengths = np.random.default_rng(seed).integers(2, 50, size=count)
    batches = epoch_batches(lengths, batch, seed, epoch=0)
    used = np.concatenate(batches)
    assert len(set(used)) == len(used) and count - len(used) < batch
    assert all(len(part) == min(batch, count) for part in batches)
    again = epoch_batches(lengths, batch, seed, epoch=0)
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))


def test_batches_hold_sequences_of_similar_length():
    lengths = np.random.default_rng(0).integers(10, 500, size=320)
    padded = sum(lengths[part].max() * 10 for part in epoch_batches(lengths, 10, 0, 0))
    assert padded < 1.1 * lengths.sum()


@settings(deadline=None, max_examples=40)
@given(
    mask=st.lists(st.booleans(), min_size=2, max_size=30),
    count=st.integers(1, 8),
    block=st.integers(2, 6),
    seed=st.integers(0, 99),
)
def test_slots_are_supervised_as_far_as_the_answer_goes(mask, count, block, seed):
    ids = list(range(1, len(mask) + 1))
    if not any(a and b for a, b in itertools.pairwise(mask)):
        return
    corpus = corpus_of((ids, mask))
    batch = make_batch(corpus, np.array([0]), count, block, seed, epoch=2, pad_to=4)
    assert batch.ids.shape[1] % 4 == 0
    candidates = {p for p in range(len(mask) - 1) if mask[p] and mask[p + 1]}
    anchors = batch.anchors[0].tolist()
    assert anchors == sorted(anchors)
    supervised = [a for a, row in zip(anchors, batch.supervised[0], strict=True) if row.any()]
    assert len(supervised) == len(set(supervised)) == min(count, len(candidates))
    assert set(supervised) <= candidates
    for row, anchor in enumerate(anchors):
        going = bool(batch.supervised[0, row, 0])
        for slot in range(1, block):
            going = going and anchor + slot < len(mask) and mask[anchor + slot]
            assert bool(batch.supervised[0, row, slot - 1]) == going
            if going:
                assert batch.labels[0, row, slot - 1] == ids[anchor + slot]


def test_anchors_change_from_epoch_to_epoch_alone():
    mask = np.ones(200, dtype=bool)
    first, same, other = (draw_anchors(mask, 10, [0, epoch, 7]) for epoch in (0, 0, 1))
    assert (first == same).all() and (first != other).any()


def test_the_loss_vocabulary_holds_frequent_tokens_and_every_label():
    corpus = corpus_of(([1, 1, 1, 2, 2, 3], [1] * 6), ([90, 91], [1, 1]), ([80, 81], [0, 1]))
    vocabulary = LossVocabulary(corpus, vocab_size=100, frequent=2, random=3, seed=0)
    rows = vocabulary.rows(np.array([1, 2]), step=4)
    assert {1, 2, 90, 91, 81} <= set(rows)
    assert (np.diff(rows) > 0).all() and len(rows) <= 8
    assert (rows == vocabulary.rows(np.array([1, 2]), step=4)).all()
