"""Compiled training does what eager training does; on a GPU, with flex attention and bfloat16."""

import json
from functools import partial

import pytest
import torch
from tiny_models import tiny_causal_lm, train_config, write_data

from dflare.training.data.generate import Generator, Sampling
from dflare.training.data.slot_cache import ATTENTION
from dflare.training.data.target import Target
from dflare.training.run.loop import train
from dflare.training.run.trainer import Trainer

STEPS = 4
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def target(device: str, dtype: torch.dtype = torch.float32) -> Target:
    """Heads of 64, which flex attention on CUDA takes."""
    model = tiny_causal_lm(vocab_size=512, hidden_size=128, num_attention_heads=2, head_dim=64)
    model.set_attn_implementation(ATTENTION)
    return Target(model.to(device, dtype), (0, 1, 2))


def some_steps(tmp_path, device: str, compiled: bool, **changes) -> tuple[Trainer, list[float]]:
    """Some steps; their losses. Compiled code must do after the first step without more of it."""
    torch._dynamo.reset()
    config = train_config(
        tmp_path,
        data__anchors=32,
        optimizer__eps=1e-4,
        run__output=str(tmp_path / f"{compiled}"),
        run__device=device,
        run__compile=compiled,
        **changes,
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    trainer = Trainer(config, target(device, dtype))
    trainer.drafter.train()
    losses = []
    for step in range(STEPS):
        stance = "fail_on_recompile" if compiled and step else "default"
        with torch.compiler.set_stance(stance):
            trainer.train_step()
        losses.append(trainer.take_window().loss)
    return trainer, losses


def moved(trainer: Trainer, start: dict[str, torch.Tensor]) -> torch.Tensor:
    """How training changed all weights, as one vector."""
    state = trainer.drafter.state_dict()
    return torch.cat([(state[name].cpu() - start[name]).flatten() for name in start])


def starts(tmp_path) -> dict[str, torch.Tensor]:
    """The weights before the first step: they do not depend on the device."""
    config = train_config(tmp_path, run__output=str(tmp_path / "start"))
    return Trainer(config, target("cpu")).drafter.state_dict()


REDUCED = {"objective__frequent": 100, "objective__random": 30, "objective__soft_labels": 0.5}
LEAN = {"run__checkpoint_activations": True, "run__accumulate": 2}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_a_reduced_vocabulary_is_compiled_once(tmp_path, monkeypatch, backend):
    """Each step has another number of rows; recomputing and micro-batches are part of it.

    Dynamo alone, which decides what is compiled anew, is quick; its backend takes minutes.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    write_data(tmp_path / "data.xz", 40, vocab_size=512)
    (eager, losses), (compiled, same) = (
        some_steps(tmp_path, "cpu", compiled, **REDUCED, **LEAN) for compiled in (False, True)
    )
    assert same == pytest.approx(losses, rel=1e-5)
    for name, tensor in eager.drafter.state_dict().items():
        torch.testing.assert_close(compiled.drafter.state_dict()[name], tensor, atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.slow
@needs_gpu
@pytest.mark.parametrize("vocabulary", [{}, REDUCED], ids=["all", "reduced"])
@pytest.mark.parametrize("memory", [{}, LEAN], ids=["plain", "lean"])
@pytest.mark.parametrize("window", [None, 16], ids=["full", "sliding"])
def test_compiled_training_is_eager_training(tmp_path, window, memory, vocabulary):
    write_data(tmp_path / "data.xz", 40, vocab_size=512)
    changes = {"drafter__sliding_window": window, **memory, **vocabulary}
    start = starts(tmp_path)
    (eager, losses), (compiled, same) = (
        some_steps(tmp_path, "cuda", compiled, **changes) for compiled in (False, True)
    )
    assert same == pytest.approx(losses, rel=1e-2)  # products in bfloat16, in another order
    a, b = moved(eager, start), moved(compiled, start)
    assert a.norm() > 0.0 and (a - b).norm() <= 0.2 * a.norm()


@pytest.mark.gpu
@pytest.mark.slow
@needs_gpu
def test_a_whole_run_on_a_gpu_learns_saves_and_goes_on(tmp_path):
    write_data(tmp_path / "data.xz", 40, vocab_size=512)
    changes = {
        "data__anchors": 32,
        "optimizer__learning_rate": 5e-3,
        "run__device": "cuda",
        "run__max_minutes": 30.0,
    }
    bfloat16 = torch.bfloat16
    train(Trainer(train_config(tmp_path, run__steps=3, **changes), target("cuda", bfloat16)))
    config = train_config(tmp_path, run__steps=60, **changes)
    resumed = Trainer(config, target("cuda", bfloat16), resume=True)
    acceptance = train(resumed)
    assert resumed.steps_done == 60 and acceptance is not None
    assert 0.0 < resumed.clock.cold_minutes <= resumed.minutes
    log = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in log if line["kind"] == "train"]
    assert losses[-1] < 0.8 * losses[0]
    assert (tmp_path / "run" / "drafter" / "model.safetensors").exists()


@pytest.mark.gpu
@needs_gpu
def test_decoding_by_graphs_is_decoding():
    prompts = [[5, 6, 7], [9] * 20, [11, 12], [8] * 70, [4, 30, 31, 32]]
    answers = []
    for graphs in (False, True):
        sampling = Sampling(max_new_tokens=80, stop_ids=(2, 7, 11))
        generator = Generator(target("cuda"), 2, 128, sampling, cuda_graphs=graphs)
        answers.append({a.prompt: (a.ids, a.finish) for a in generator.run(prompts)})
        assert bool(generator._graphs) == graphs, "capturing must not fall back to plain steps"
    assert answers[0] == answers[1] and len(answers[0]) == len(prompts)
