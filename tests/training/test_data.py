"""Corpora, batches and anchors."""

import itertools
import lzma

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflare.training.data.batches import draw_anchors, epoch_batches, make_batch
from dflare.training.data.corpus import Corpus, check_mask_token, load_corpus, split
from dflare.training.data.files import (
    FORMAT,
    DataFile,
    Record,
    read_header,
    read_records,
    write_records,
)
from dflare.training.errors import ConfigError, DataError
from dflare.training.loss.vocabulary import LossVocabulary


def write(path, *sequences, vocab_size=100):
    """Write sequences, each its ids and the ranges that are answers."""
    header = {"target": "t", "vocab_size": vocab_size}
    write_records(path, header, [Record(ids, answers) for ids, answers in sequences])
    return path


def corpus_of(*sequences: tuple[list[int], list[int]]) -> Corpus:
    ids = [np.array(tokens, dtype=np.int32) for tokens, _ in sequences]
    offsets = np.cumsum([0] + [len(part) for part in ids])
    masks = np.concatenate([np.array(mask, dtype=bool) for _, mask in sequences])
    return Corpus(np.concatenate(ids), masks, offsets)


def test_a_file_gives_tokens_and_what_is_supervised(tmp_path):
    path = write(tmp_path / "d.xz", ([5, 6, 7, 8, 9], [(1, 3), (4, 5)]))
    corpus = load_corpus([path], 100, max_length=4)
    assert corpus.tokens(0).tolist() == [5, 6, 7, 8]
    assert corpus.mask(0).tolist() == [False, True, True, False]


@pytest.mark.parametrize("vocab_size", [100, 2**16, 200_000])
def test_what_is_written_is_read(tmp_path, vocab_size):
    last = vocab_size - 1
    records = [
        Record([1, last, 3], [(1, 2), (2, 3)], key=2**64 - 1, cut=True),
        Record([], []),
        Record([last], [(0, 1)], key=5),
    ]
    header = {"target": "t", "vocab_size": vocab_size, "generation": {"seed": 3}}
    write_records(tmp_path / "d.xz", header, records)
    assert read_header(tmp_path / "d.xz") == {"dflare_data": FORMAT, **header}
    read = list(read_records(tmp_path / "d.xz"))
    assert [(list(r.ids), r.answers, r.key, r.cut) for r in read] == [
        (r.ids, r.answers, r.key, r.cut) for r in records
    ]


def test_a_file_that_grows_survives_an_interruption_at_any_byte(tmp_path, monkeypatch):
    monkeypatch.setattr("dflare.training.data.files._STREAM_SEQUENCES", 2)
    header, path = {"target": "t", "vocab_size": 100}, tmp_path / "d.xz"
    file = DataFile(path, header)
    for number in range(4):
        file.add(Record([5, 6, number], [(0, 3)], key=number))
    whole = path.read_bytes()
    sizes = set()
    for cut in range(len(whole), len(whole) - 60, -7):
        path.write_bytes(whole[:cut])
        again = DataFile(path, header)
        sizes.add(len(again.keys))
        again.add(Record([5, 6, 9], [(0, 3)], key=9))
        again.close()
        assert {r.key for r in read_records(path)} == again.keys
    assert sizes == {4, 2}


def test_a_closed_file_is_one_stream_and_small(tmp_path, monkeypatch):
    monkeypatch.setattr("dflare.training.data.files._STREAM_SEQUENCES", 8)
    file = DataFile(tmp_path / "d.xz", {"target": "t", "vocab_size": 49152})
    rng = np.random.default_rng(0)
    for number in range(64):
        file.add(Record(rng.integers(256, size=200), [(0, 200)], key=number))
    grown = (tmp_path / "d.xz").stat().st_size
    file.close()
    assert (tmp_path / "d.xz").stat().st_size < 0.95 * grown
    assert (tmp_path / "d.xz").stat().st_size < 1.2 * 64 * 200  # a byte of entropy each


@pytest.mark.parametrize(
    ("sequences", "hint"),
    [
        ([([5, 6, 7], [])], "nothing to learn"),
        ([([5, 6, 7], [(0, 1), (2, 3)])], "nothing to learn"),
        ([([5, 600], [(0, 2)])], "vocabulary of 100"),
    ],
)
def test_data_that_cannot_be_learned_from_is_refused(tmp_path, sequences, hint):
    path = write(tmp_path / "d.xz", *sequences)
    with pytest.raises(DataError, match=hint):
        load_corpus([path], 100, 8)


def test_data_of_another_vocabulary_is_refused(tmp_path):
    path = write(tmp_path / "d.xz", ([5, 6], [(0, 2)]))
    with pytest.raises(DataError, match=r"vocabulary of 100 .*the target has 200"):
        load_corpus([path], 200, 8)


@pytest.mark.parametrize("content", [b"", b"not xz", lzma.compress(b"[]"), lzma.compress(b"{}")])
def test_a_file_of_another_format_is_refused(tmp_path, content):
    (tmp_path / "d.xz").write_bytes(content)
    with pytest.raises(DataError, match=r"d\.xz"):
        load_corpus([tmp_path / "d.xz"], 100, 8)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.xz"):
        load_corpus([tmp_path / "none.xz"], 100, 8)


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
    rows, log_weight = vocabulary.rows(np.array([1, 2]), step=4)
    assert {1, 2, 90, 91, 81} <= set(rows)
    assert (np.diff(rows) > 0).all() and len(rows) <= 8
    again = vocabulary.rows(np.array([1, 2]), step=4)
    assert (rows == again[0]).all() and (log_weight == again[1]).all()


def test_drawn_rows_stand_for_all_tokens_that_are_left_out():
    """Their weights make the estimate of the softmax's denominator unbiased."""
    corpus = corpus_of(([1, 1, 2, 2, 3], [1] * 5))
    vocabulary = LossVocabulary(corpus, vocab_size=500, frequent=2, random=40, seed=0)
    exponentials = np.random.default_rng(0).lognormal(size=500)
    estimates = []
    for step in range(300):
        rows, log_weight = vocabulary.rows(np.array([0]), step)
        assert (log_weight[np.isin(rows, [1, 2, 3])] == 0).all()
        estimates.append((exponentials[rows] * np.exp(log_weight)).sum())
    assert np.mean(estimates) == pytest.approx(exponentials.sum(), rel=0.02)
