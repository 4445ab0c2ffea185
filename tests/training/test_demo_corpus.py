"""The corpus that the repository carries is what its README says, and fits the demo drafter."""

import re
from pathlib import Path

import numpy as np

from dflare.training.data.corpus import check_mask_token, load_corpus
from dflare.training.data.files import read_header, read_records
from dflare.training.run.config import load_config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "assets/demo-corpus"
FILES = sorted(FOLDER.glob("*.xz"))


def test_the_readme_counts_what_is_there():
    rows = re.findall(
        r"^\| (\S+\.xz) \| (\d+) \| (\d+) \|", (FOLDER / "README.md").read_text(), re.M
    )
    counts = []
    for file in FILES:
        records = list(read_records(file))
        answers = sum(end - start for record in records for start, end in record.answers)
        counts.append((file.name, str(len(records)), str(answers)))
    assert sorted(rows) == counts


def test_the_corpus_is_small_and_trains_the_demo_drafter():
    assert sum(file.stat().st_size for file in FILES) < 8e6
    config = load_config(ROOT / "configs/demo/cpu-train.yaml")
    vocab_size = read_header(FILES[0])["vocab_size"]
    corpus = load_corpus(FILES, vocab_size, config.data.max_length)
    check_mask_token(config.drafter.mask_token_id, corpus, vocab_size)
    keys = [record.key for file in FILES for record in read_records(file)]
    assert len(set(keys)) == len(keys), "a prompt is answered twice"
    assert np.median(corpus.lengths) > 100
