import json
from pathlib import Path

import pytest
from bench.serving import plan
from bench.serving import sweep as sweep_script
from bench.serving.random_drafter import config_for, write_random_drafter
from checkpoints import write_random_target
from sglang.benchmark.datasets.custom import sample_custom_requests
from sweep_cells import make_sweep, record
from transformers import AutoTokenizer

from dflare.checkpoint import check_pair
from dflare.demo import demo_target

PLANS = sorted((Path(plan.__file__).parent / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_shipped_plans_are_valid_and_compare_an_adaptive_arm(path):
    sweep = plan.Sweep.load(path)
    kinds = [arm.kind for arm in sweep.arms]
    assert kinds.count("adaptive") == 1
    assert kinds.count("none") == 2  # the second one shows the noise
    assert sweep.rivals[0] == sweep.baseline == "none"
    assert "none again" not in sweep.rivals
    assert len(plan.cells(sweep)) == len(set(plan.cells(sweep)))


@pytest.mark.parametrize("keep_alive", [True, False])
def test_every_cell_is_measured_once_and_arms_take_turns(keep_alive):
    sweep = make_sweep(keep_alive=keep_alive, repeats=4)
    order = plan.cells(sweep)
    assert len(set(order)) == len(order) == 4 * 2 * 2 * 4
    none, fixed, *others = names = [arm.name for arm in sweep.arms]
    arms = [[c.arm for c in order if c.repeat == repeat] for repeat in range(4)]
    orders = [list(dict.fromkeys(repeat)) for repeat in arms]
    shifted = [fixed, *others, none]
    assert orders == [names, names[::-1], shifted, shifted[::-1]]


def test_one_server_at_a_time_is_started_once_a_repeat():
    arms = [cell.arm for cell in plan.cells(make_sweep())]
    starts = sum(a != b for a, b in zip([None, *arms], arms, strict=False))
    assert starts == 4 + 3, "a repeat goes on with the server that ended the one before"


def test_prompts_are_mixed_and_repeated_to_the_number_needed(tmp_path):
    dataset = plan.Dataset(name="mix", prompts=["easy", "hard"])
    flags = dataset.flags(200, 64, tmp_path)
    lines = (tmp_path / "mix.jsonl").read_text().splitlines()
    assert len(lines) >= 200
    assert all(json.loads(line)["conversations"][0]["content"] for line in lines)
    assert flags[flags.index("--num-prompts") + 1] == "200"


def test_answers_of_different_lengths_are_what_the_generator_reads(tmp_path):
    dataset = plan.Dataset(name="mix", prompts=["easy", "hard"])
    flags = dataset.flags(100, 80, tmp_path, range_ratio=0.5)
    assert "--sharegpt-output-len" not in flags
    tokenizer = AutoTokenizer.from_pretrained(demo_target())
    rows = sample_custom_requests(
        str(tmp_path / "mix.jsonl"), 100, tokenizer, apply_chat_template=True
    )
    lengths = [row.output_len for row in rows]
    assert len(lengths) == 100
    assert min(lengths) >= 40 and max(lengths) <= 80
    assert len(set(lengths)) > 20
    assert not any(" the the" in row.prompt for row in rows)


@pytest.mark.parametrize("requests", [1, 4, 7, 48])
def test_shared_prefixes_are_shared_by_at_least_four_requests(tmp_path, requests):
    flags = plan.Dataset(name="shared", shared_prefixes=4).flags(requests, 64, tmp_path)
    groups, each = (int(flags[flags.index(name) + 1]) for name in flags if name.startswith("--gsp"))
    assert each >= 4 and 1 <= groups <= 4
    assert groups * each >= requests


def test_prompts_of_another_model_have_another_seed():
    assert make_sweep().seed_of(0) != make_sweep(model="other").seed_of(0)
    assert make_sweep().seed_of(0) != make_sweep().seed_of(1)


def test_records_survive_a_line_cut_off_by_a_crash(tmp_path):
    path = tmp_path / "cells.jsonl"
    path.write_text(json.dumps(record("none")) + "\n" + '{"arm": "none", "conc')
    assert [plan.cell_of(r).arm for r in plan.read_records(path)] == ["none"]


@pytest.mark.parametrize("text", ["{}", "no JSON", make_sweep().model_dump_json()])
def test_another_plan_does_not_continue_a_sweep(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(SystemExit, match="holds another plan"):
        sweep_script.main(["--quick", "--out", str(tmp_path)])


def test_a_plan_written_before_a_setting_was_known_is_the_same(tmp_path):
    sweep = make_sweep()
    (tmp_path / "plan.json").write_text(sweep.model_dump_json(exclude={"minutes"}))
    assert sweep_script.holds(tmp_path / "plan.json", sweep)
    assert not sweep_script.holds(tmp_path / "plan.json", make_sweep(minutes=14))


def test_unknown_arms_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        sweep_script.parse(["--quick", "--out", str(tmp_path), "--arms", "eagle"])
    assert "unknown arms ['eagle']" in capsys.readouterr().err


@pytest.mark.parametrize("layers", [4, 16])
def test_a_random_drafter_fits_its_target(tmp_path, layers):
    target = write_random_target(tmp_path / "target", num_layers=layers)
    config = config_for(target)
    check_pair(config, target)
    assert (config.num_hidden_layers, config.block_size) == (7, 16)
    write_random_drafter(tmp_path / "draft", config)
    assert (tmp_path / "draft" / "model.safetensors").exists()


def test_a_model_without_a_drafter_needs_a_simulated_acceptance(tmp_path, capsys):
    target = write_random_target(tmp_path / "target", num_layers=4)
    argv = ["--quick", "--out", str(tmp_path), "--model", str(target)]
    with pytest.raises(SystemExit):
        sweep_script.parse(argv)
    assert "no drafter for" in capsys.readouterr().err
    sweep, _ = sweep_script.parse([*argv, "--simulate-acc-len", "4.5"])
    _, draft = sweep.pair(tmp_path)
    assert (Path(draft) / "config.json").exists()
    assert sweep.pair(tmp_path) == (str(target), draft)


def test_simulated_answers_have_their_full_length(tmp_path):
    dataset = plan.Dataset(name="mix", prompts=["easy"])
    assert "--disable-ignore-eos" in dataset.flags(4, 64, tmp_path)
    assert "--disable-ignore-eos" not in dataset.flags(4, 64, tmp_path, ignore_eos=True)
