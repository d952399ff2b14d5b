"""Two processes learn what one learns."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPT, make_rows, read_rows, run_command, tiny_config, write_rows

import train_sft_l4

# `accelerate launch --cpu` starts several processes through MPI only; on GPUs it uses this launcher of torch's.
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
NOTING_WRITES = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train_sft_l4
original = train_sft_l4.atomic_file

def noting(path):
    with open("writes.txt", "a") as file:
        file.write(os.environ["RANK"] + " " + path.name + "\\n")
    return original(path)

train_sft_l4.atomic_file = noting
sys.exit(train_sft_l4.main())
"""
ON_CPU = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}


def test_two_processes_learn_what_one_learns_and_write_it_once(llama, data, tmp_path):
    alone, both = (tiny_config(llama, data, tmp_path / name) | {
        "lora_dropout": 0.0, "head_dropout": 0.0, "max_train_examples": 33, "max_tokens_per_micro_batch": 120,
    } for name in ("alone", "both"))
    (tmp_path / "config.json").write_text(json.dumps(both))
    (tmp_path / "command.py").write_text(NOTING_WRITES)
    process = run_command("command.py", "--config", "config.json", cwd=tmp_path, program=LAUNCHER,
                          env=os.environ | ON_CPU)
    assert process.returncode == 0, process.stderr
    train_sft_l4.train(alone)

    found, expected = (torch.load(f"{config['output_dir']}/best_model.pt") for config in (both, alone))
    assert found["val_mae"] == pytest.approx(expected["val_mae"], rel=1e-4)
    assert found["epoch"] == expected["epoch"]
    for name, tensor in expected["model_state_dict"].items():
        torch.testing.assert_close(found["model_state_dict"][name], tensor, rtol=1e-4, atol=1e-4, msg=name)

    histories = [json.loads(Path(config["log_dir"], "training_history.json").read_text()) for config in (both, alone)]
    steps, expected_steps = ([[step[key] for key in ("step", "examples", "tokens")] for step in history["steps"]]
                             for history in histories)
    assert steps == expected_steps
    assert [examples for _, examples, _ in steps] == 2 * [8, 8, 8, 8, 1]  # in the last, one process has no example
    losses, expected_losses = ([step["loss"] for step in history["steps"]] for history in histories)
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    norms, expected_norms = ([step["grad_norm"] for step in history["steps"]] for history in histories)
    assert norms == pytest.approx(expected_norms, rel=1e-3)

    assert process.stdout.count("Budget model: ") == 1
    assert "processes: 2" in process.stdout
    assert process.stdout.count("Best Val MAE: ") == 1
    names = [sorted(str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*") if path.is_file())
             for name in ("both", "alone")]
    assert names[0] == names[1]
    writes = [line.split() for line in (tmp_path / "writes.txt").read_text().splitlines()]
    assert {rank for rank, _ in writes} == {"0"}
    assert {name for _, name in writes} == {Path(name).name for name in names[0]}


def test_two_processes_predict_what_one_predicts_into_one_file(trained, tmp_path):
    rows = [row | {"number": number} for number, row in enumerate(make_rows(41, seed=9))]
    write_rows(tmp_path / "queries.jsonl", rows)
    arguments = ("predict", "--checkpoint", trained.best, "--input", "queries.jsonl", "--max_tokens_per_micro_batch",
                 "100", "--output")
    programs = {"both.jsonl": [*LAUNCHER, SCRIPT], "alone.jsonl": (sys.executable, SCRIPT)}
    processes = [run_command(*arguments, output, cwd=tmp_path, program=program, env=os.environ | ON_CPU)
                 for output, program in programs.items()]
    assert [process.returncode for process in processes] == [0, 0], processes[0].stderr
    assert processes[0].stderr.count("Written: both.jsonl, 41 rows") == 1
    both, alone = (read_rows(tmp_path / f"{name}.jsonl") for name in ("both", "alone"))
    assert both == alone
    assert [row["number"] for row in both] == list(range(41))
    assert len({row["predicted_budget"] for row in both}) > 10
