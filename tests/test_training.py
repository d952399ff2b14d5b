"""Training: gradients, losses, schedule and optimizer, what moves, when it ends, what it writes and prints."""

import copy
import dataclasses
import itertools
import json
import math
import re
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_rows, read_rows, save_llama, write_rows

import train_sft_l4
from train_sft_l4 import UserError, huber_sum, lr_factor, warmup_length

WITHOUT_DROPOUT = {"lora_dropout": 0.0, "head_dropout": 0.0}


def set_up(config) -> train_sft_l4.Run:
    """Return a run before its first step."""
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="no")
    return train_sft_l4.set_up(config, accelerator, train_sft_l4.RunLog(accelerator, config["log_dir"]))


def shake(model) -> None:
    """Move everything that is trained, so that no gradient is zero because a matrix starts at zero."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def gradients(run, indices) -> dict[str, torch.Tensor]:
    run.optimizer.zero_grad()
    train_sft_l4.accumulate_gradients(run, indices)
    return {name: parameter.grad.clone() for name, parameter in run.model.named_parameters() if parameter.requires_grad}


def assert_close(found: dict, expected: dict, rtol: float = 1e-4) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert tensor.abs().max() > 0, name
        torch.testing.assert_close(found[name], tensor, rtol=rtol, atol=rtol * float(tensor.abs().max()), msg=name)


def history_of(config) -> dict:
    return json.loads((Path(config["log_dir"]) / "training_history.json").read_text())


@pytest.mark.parametrize("attention", ["packed", "padded"])
@pytest.mark.parametrize("target_transform", ["tokens", "log"])
def test_gradients_are_those_of_the_mean_loss_however_the_examples_are_cut(config, target_transform, attention):
    run = set_up(config | WITHOUT_DROPOUT | {"target_transform": target_transform, "attention": attention})
    plain = set_up(config | WITHOUT_DROPOUT | {"target_transform": target_transform, "attention": "padded",
                                               "overwrite": True})
    shake(plain.model)
    shake(run.model)
    run.model.train()
    examples, indices = run.examples["train"], list(range(32))
    assert examples.censored[indices].any()

    losses = []
    for i in indices:  # one by one, with torch's own loss
        predicted = plain.model(torch.tensor([examples.ids[i]]), torch.ones(1, len(examples.ids[i])), scaled=True)
        target = run.model.to_scaled(torch.tensor([examples.budget[i]], dtype=torch.float32))
        loss = torch.nn.functional.huber_loss(predicted, target)
        losses.append(0 * loss if examples.censored[i] and predicted > target else loss)
    torch.stack(losses).mean().backward()
    expected = {name: p.grad.clone() for name, p in plain.model.named_parameters() if p.requires_grad}

    counts, forward_passes = [], itertools.count()
    run.model.backbone.register_forward_hook(lambda *_: next(forward_passes) and None)
    for max_tokens in (1, 90, 180, 350, 10**6):
        run.progress.token_limit = max_tokens
        before = next(forward_passes)
        assert_close(gradients(run, indices), expected)
        counts.append(next(forward_passes) - before - 1)
    assert counts[0] == 32
    assert counts[-1] == 1 or attention == "padded"  # padding may cost more than another micro-batch
    assert sorted(set(counts), reverse=True) == counts


@pytest.mark.parametrize("lora_r", [4, 0])
def test_activation_checkpointing_does_not_change_the_gradients(config, lora_r):
    found = []
    for switch in ("off", "on"):
        run = set_up(config | WITHOUT_DROPOUT | {"activation_checkpointing": switch, "lora_r": lora_r})
        shake(run.model)
        run.model.train()
        layers = [m for m in run.model.backbone.modules() if type(m).__name__ == "LlamaDecoderLayer"]
        assert [layer.gradient_checkpointing for layer in layers] == [switch == "on"] * 2
        found.append(gradients(run, range(16)))
    assert_close(found[1], found[0], rtol=1e-6)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "down_proj"], ["query", "value"]])
def test_recomputed_layers_draw_the_same_dropout_masks(config, bert, targets):
    """BERT's query and value read a layer's input itself, which is the same tensor when the layer is recomputed."""
    found = []
    config |= {"model_name": bert if "query" in targets else config["model_name"], "lora_target_modules": targets}
    for switch in ("off", "on"):
        run = set_up(config | {"lora_dropout": 0.3, "activation_checkpointing": switch, "overwrite": True})
        shake(run.model)
        run.model.train()
        torch.manual_seed(8)
        found.append(gradients(run, range(16)))
    assert_close(found[1], found[0], rtol=1e-6)


def test_the_loss_is_huber_in_units_of_delta():
    torch.manual_seed(0)
    predicted, target = 3 * torch.randn(200), 3 * torch.randn(200)
    expected = torch.nn.functional.huber_loss(1000 * predicted, 1000 * target, delta=1000.0, reduction="sum") / 1000**2
    found = huber_sum(predicted, target, torch.zeros(200, dtype=torch.bool))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    error = np.abs(predicted.numpy() - target.numpy())
    assert found.item() == pytest.approx(np.where(error < 1, error**2 / 2, error - 0.5).sum(), rel=1e-5)


def test_the_loss_of_a_censored_row_counts_only_what_is_missing():
    predicted = torch.tensor([1.5, 0.5, 4.0, -3.0], requires_grad=True)
    loss = huber_sum(predicted, torch.ones(4), torch.tensor([True, True, True, True]))
    assert loss.item() == pytest.approx(0.5 * 0.25 + (4 - 0.5))
    loss.backward()
    assert predicted.grad.tolist() == pytest.approx([0.0, -0.5, 0.0, -1.0])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 7), (1, 10), (10, 100)])
def test_the_learning_rate_peaks_after_the_warm_up_and_ends_low(schedule, warmup, total):
    factors = [lr_factor(step, warmup, total, schedule) for step in range(total)]
    assert factors[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    assert factors[warmup] == max(factors) == 1.0
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    assert min(factors) > 0
    if schedule == "constant":
        assert set(factors[warmup:]) == {1.0}
    else:
        assert lr_factor(total, warmup, total, schedule) == pytest.approx(0.0, abs=1e-12)
    if schedule == "cosine" and total == 100:
        assert factors[40] == pytest.approx(0.75)


@pytest.mark.parametrize(("overrides", "total_steps", "expected"), [
    ({"warmup_steps": 500}, 24, (2, 500)),
    ({"warmup_steps": 500}, 10_000, (500, 500)),
    ({"warmup_steps": 500}, 5, (0, 500)),
    ({"warmup_steps": 0}, 10_000, (0, 0)),
    ({"warmup_ratio": 0.05}, 1000, (50, 50)),
    ({"warmup_ratio": 0.3}, 1000, (100, 300)),
    ({"warmup_ratio": 0.03, "warmup_steps": 7}, 1000, (30, 30)),
])
def test_the_warm_up_is_at_most_a_tenth_of_the_run(overrides, total_steps, expected):
    assert warmup_length(train_sft_l4.CONFIG | overrides, total_steps) == expected


def test_the_optimizer_decays_matrices_only(config):
    model = train_sft_l4.BudgetRegressionModel(config)
    optimizer = train_sft_l4.build_optimizer(model, 3e-4, 0.02)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, other = ({names[id(parameter)] for parameter in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.02, 0.0]
    assert [group["lr"] for group in optimizer.param_groups] == [3e-4, 3e-4]
    norms = {"head.1.weight", "head.5.weight"}
    biases = {name for name in names.values() if name.startswith("head.") and name.endswith(".bias")}
    assert other == norms | biases
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert decayed == trained - other
    assert len(decayed) == 12 + 3


def test_a_step_is_adamw_with_clipped_gradients(config):
    run = set_up(config | WITHOUT_DROPOUT | {"max_grad_norm": 1e-3, "lr_schedule": "constant", "warmup_steps": 0})
    shake(run.model)
    run.model.train()
    twin = copy.deepcopy(run.model)
    mean_gradients = gradients(run, range(8))
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in mean_gradients.values()))
    assert norm > 1e-2
    run.optimizer.zero_grad()
    train_sft_l4.train_step(run, list(range(8)))
    optimizer = train_sft_l4.build_optimizer(twin, config["learning_rate"], config["weight_decay"])
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            parameter.grad = mean_gradients[name] * 1e-3 / norm
    optimizer.step()
    for (name, found), (_, expected) in zip(run.model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=name)
    assert run.log.history["steps"][0]["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_every_step_starts_from_no_gradient(config):
    run = set_up(config | WITHOUT_DROPOUT | {"learning_rate": 1e-30})
    shake(run.model)
    run.model.train()
    for _ in range(3):
        train_sft_l4.train_step(run, list(range(8)))
    norms = [step["grad_norm"] for step in run.log.history["steps"]]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)


def test_a_validation_uses_no_dropout_and_training_goes_on_with_it(config):
    run = set_up(config | {"lora_dropout": 0.5, "head_dropout": 0.5})
    shake(run.model)
    run.model.train()
    first, again = (train_sft_l4.predict_split(run, "val") for _ in range(2))
    assert np.array_equal(first, again)
    assert run.model.training


def test_what_is_trained_moves_and_what_is_frozen_does_not(config):
    run = set_up(config)
    run.model.train()
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    train_sft_l4.train_epoch(run)
    moved = {name for name, parameter in run.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}


def test_eight_examples_can_be_learnt_by_heart(config, tmp_path):
    rows = [row | {"optimal_budget": 100 * (3 * i % 8 + 1)} for i, row in enumerate(make_rows(8, seed=5))]
    path = write_rows(tmp_path / "eight.jsonl", [row | {"censored": False} for row in rows])
    run = set_up(config | WITHOUT_DROPOUT | {
        "train_path": path, "val_path": path, "test_path": "", "allow_leakage": True, "num_epochs": 120,
        "learning_rate": 3e-3, "huber_delta": 200.0, "lr_schedule": "cosine"})
    run.model.train()
    for _ in range(120):
        train_sft_l4.train_step(run, list(range(8)))
    losses = [step["loss"] for step in run.log.history["steps"]]
    assert losses[0] > 0.3
    assert losses[-1] < 1e-3
    assert train_sft_l4.predict_split(run, "val") == pytest.approx(run.examples["val"].budget, abs=30)


@pytest.mark.parametrize("target_transform", ["tokens", "log"])
def test_both_target_transforms_learn(config, target_transform):
    train_sft_l4.train(config | {"target_transform": target_transform, "num_epochs": 4, "test_path": ""})
    history = history_of(config)
    losses = [validation["train_loss"] for validation in history["validations"]]
    assert losses[-1] < 0.9 * losses[0]
    assert math.isfinite(history["val"]["mae"])


def test_early_stopping_ends_the_run(config, capsys):
    train_sft_l4.train(config | {
        "num_epochs": 50, "early_stopping_patience": 2, "learning_rate": 1e-9, "eval_every": 3, "test_path": ""})
    history = history_of(config)
    maes = [validation["mae"] for validation in history["validations"]]
    best = maes.index(min(maes))
    assert len(maes) == best + 1 + 2
    assert len(maes) < 50
    assert torch.load(f"{config['output_dir']}/last.pt")["progress"]["finished"]
    assert "Best Val MAE:" in capsys.readouterr().out


def test_eval_every_validates_between_epochs_and_once_at_each_end(config):
    train_sft_l4.train(config | {"eval_every": 5})
    assert [each["step"] for each in history_of(config)["validations"]] == [5, 10, 13, 15, 20, 25, 26]


def test_a_damaged_backbone_ends_the_run_with_a_message(config, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(config["model_name"], tmp_path / "damaged")
    weights = load_file(folder / "model.safetensors")
    weights["layers.1.mlp.down_proj.weight"][3, 3] = math.inf
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert train_sft_l4.main(flags(config | {"model_name": str(folder)})) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: step 1: the loss is nan, the gradient's norm nan")
    assert "Traceback" not in error


def flags(config) -> list[str]:
    """Return the command line that sets every key."""
    return [f"--{key}={','.join(value) if isinstance(value, list) else value}" for key, value in config.items()]


def test_a_loss_that_explodes_ends_the_run_and_leaves_the_last_checkpoint_whole(config, capsys):
    code = train_sft_l4.main(flags(config | {"learning_rate": 1e30, "save_every_minutes": 0.0}))
    error = capsys.readouterr().err
    assert code == 2
    step = int(re.match(r"error: step (\d+): the loss is (nan|inf), the gradient's norm (nan|inf);", error).group(1))
    assert step > 1
    checkpoint = torch.load(f"{config['output_dir']}/last.pt")
    assert checkpoint["progress"]["step"] == step - 1
    assert len(checkpoint["history"]["steps"]) == step - 1
    assert all(tensor.isfinite().all() for tensor in checkpoint["model_state_dict"].values())


def test_predictions_that_are_not_finite_end_the_run(config, monkeypatch):
    run = set_up(config)
    with torch.no_grad():
        run.model.head[-1].bias.fill_(math.nan)
    with pytest.raises(UserError, match="val: 24 predictions are not finite: lower --learning_rate"):
        train_sft_l4.predict_split(run, "val")


def test_the_printed_train_loss_is_the_mean_over_every_example_of_the_epoch(trained):
    steps, validations = trained.history["steps"], trained.history["validations"]
    assert [step["examples"] for step in steps] == 2 * [*[8] * 12, 2]
    for epoch, validation in enumerate(validations):
        of_epoch = steps[13 * epoch : 13 * (epoch + 1)]
        mean = sum(step["loss"] * step["examples"] for step in of_epoch) / 98
        assert validation["train_loss"] == pytest.approx(mean, rel=1e-6)
        assert validation["train_loss"] != pytest.approx(np.mean([step["loss"] for step in of_epoch]), rel=1e-6)
        assert (f"Epoch {epoch + 1}/2  Train Loss: {mean:.4f}  Val MAE: {validation['mae']:,.2f} tokens"
                in trained.process.stdout)


def test_the_first_loss_is_that_of_predicting_the_median(trained):
    rows = read_rows(trained.config["train_path"])
    budgets = np.array([row["optimal_budget"] for row in rows])
    first = train_sft_l4.epoch_order(98, seed=42, epoch=0)[:8]
    error = (np.median(budgets) - budgets[first]) / 1000
    censored = np.array([rows[i].get("censored", False) for i in first])
    error = np.abs(np.where(censored, np.minimum(error, 0), error))
    expected = np.where(error < 1, error**2 / 2, error - 0.5).mean()
    assert trained.history["steps"][0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_the_history_holds_every_step_and_validation(trained):
    history = trained.history
    assert history["config"] == trained.config
    assert {"python", "torch", "transformers", "peft", "accelerate", "numpy"} <= set(history["versions"])
    assert [step["step"] for step in history["steps"]] == list(range(1, 27))
    assert [step["epoch"] for step in history["steps"]][12::13] == [1.0, 2.0]
    warmup = 2
    rates = [1e-3 * lr_factor(step, warmup, 26, "linear") for step in range(26)]
    assert [step["learning_rate"] for step in history["steps"]] == pytest.approx(rates)
    assert all(step["tokens"] > 0 and step["seconds"] > 0 and step["grad_norm"] > 0 for step in history["steps"])
    assert [validation["step"] for validation in history["validations"]] == [13, 26]
    best = min(validation["mae"] for validation in history["validations"])
    assert history["val"]["mae"] == pytest.approx(best, rel=1e-6)
    assert set(history["val"]["baselines"]) == {"training median", "tf-idf + ridge", "tf-idf + trees"}
    assert history["test"]["rows"] == 24


def test_a_run_writes_these_files_and_no_others(trained):
    files = {str(path.relative_to(trained.folder)) for path in trained.folder.rglob("*") if path.is_file()}
    checkpoints = {f"checkpoints/{name}.pt" for name in ("best_model", "epoch_1", "epoch_2", "last")}
    reports = {f"logs/{split}_{kind}" for split in ("val", "test") for kind in ("metrics.json", "predictions.jsonl")}
    assert files == {"config.json", "logs/training_history.json"} | checkpoints | reports


def test_the_checkpoints_say_where_they_are_from(trained):
    maes = [validation["mae"] for validation in trained.history["validations"]]
    for name, epoch in (("epoch_1", 1), ("epoch_2", 2)):
        checkpoint = torch.load(trained.folder / f"checkpoints/{name}.pt")
        assert checkpoint["epoch"] == epoch
        assert checkpoint["val_mae"] == maes[epoch - 1] == checkpoint["val_metrics"]["mae"]
        assert checkpoint["config"] == trained.config
    best = torch.load(trained.best)
    assert best["val_mae"] == min(maes)
    winner = torch.load(trained.folder / f"checkpoints/epoch_{1 + maes.index(min(maes))}.pt")["model_state_dict"]
    assert all(torch.equal(tensor, winner[name]) for name, tensor in best["model_state_dict"].items())


def test_the_last_checkpoint_holds_the_last_weights_though_an_earlier_epoch_was_best(config):
    train_sft_l4.train(config | {"learning_rate": 0.05, "num_epochs": 3, "test_path": "", "seed": 5})
    maes = [validation["mae"] for validation in history_of(config)["validations"]]
    assert maes.index(min(maes)) < 2
    last, newest = (torch.load(f"{config['output_dir']}/{name}.pt") for name in ("last", "epoch_3"))
    assert last["val_mae"] == newest["val_mae"] == maes[2]
    weights = last["model_state_dict"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in newest["model_state_dict"].items())


def test_the_console_of_a_piped_run(trained):
    out, error = trained.process.stdout, trained.process.stderr
    assert not error
    for character in ("\r", "\x1b"):
        assert character not in out
    lines = out.split("\n")
    assert lines[0] == "=" * 80
    assert lines[1].startswith("Budget model")
    long = [line for line in lines if len(line) > 80 and str(trained.folder) not in line and "/data" not in line]
    assert not long
    assert "Plan   26 steps, 2 of them warm-up (a tenth of the run, not 500)" in lines
    rows = next(line for line in lines if line.startswith("  train: "))
    budgets = [row["optimal_budget"] for row in read_rows(trained.config["train_path"])]
    low, middle, high, most = np.quantile(budgets, [0, 0.5, 0.9, 1])
    assert rows.startswith(f"  train: 98 rows, budget {low:,.0f} / {middle:,.0f} / {high:,.0f} / {most:,.0f}")
    assert "Val MAE: " in out
    assert "tokens  <- New best!" in out
    best = min(validation["mae"] for validation in trained.history["validations"])
    assert f"Best Val MAE: {best:,.2f} tokens, after epoch " in out


@pytest.mark.parametrize(("mae", "underrun", "words"), [
    (499.9, 0.599, ("excellent", "excellent")), (500.0, 0.6, ("good", "good")), (749.9, 0.699, ("good", "good")),
    (750.0, 0.7, ("fair", "fair")), (1500.0, 0.8, ("needs improvement", "needs improvement")),
])
def test_the_success_criteria_are_said(config, capsys, mae, underrun, words):
    run = set_up(config | {"test_path": "", "num_epochs": 1})
    below = round(underrun * 1000)
    budgets, predicted = np.full(1000, 5000.0), np.full(1000, 5000.0 + mae)
    predicted[:below] = 5000.0 - mae
    row = run.splits["val"][1]
    run.splits["val"] = [dataclasses.replace(row, budget=budget) for budget in budgets]
    run.progress.best_mae = mae
    run.save("best_model.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_sft_l4, "predict_split", lambda run, split: predicted)
        patch.setattr(train_sft_l4, "fit_baselines", lambda rows: lambda others: {})
        train_sft_l4.report_run(run)
    out = capsys.readouterr().out
    assert f"  MAE {mae:,.1f}: {words[0]} (excellent < 500, good < 750, poor >= 1500)\n" in out
    assert f"  Underrun % {100 * underrun:.1f}: {words[1]} (excellent < 60, good < 70, poor >= 80)\n" in out


@pytest.mark.parametrize(("overrides", "plan"), [
    ({"warmup_steps": 1}, "26 steps, 1 of them warm-up"),
    ({"warmup_ratio": 0.05}, "26 steps, 1 of them warm-up"),
    ({"warmup_ratio": 0.5}, "26 steps, 2 of them warm-up (a tenth of the run, not 13)"),
    ({"warmup_steps": 1000, "num_epochs": 100}, "1,300 steps, 130 of them warm-up (a tenth of the run, not 1,000)"),
])
def test_a_shortened_warm_up_is_said(config, capsys, overrides, plan):
    set_up(config | overrides)
    assert f"\nPlan   {plan}\n" in capsys.readouterr().out


def test_the_number_of_cut_queries_is_said(config, capsys):
    set_up(config | {"max_length": 32})
    assert re.search(r"^  train: 98 rows, budget [\d,/ ]+; [1-9]\d* cut$", capsys.readouterr().out, re.MULTILINE)


def test_a_disk_that_is_too_small_is_refused_before_training(config, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    with pytest.raises(UserError, match=r"checkpoints: the checkpoints need \d+ MB, the disk has 1 MB free"):
        train_sft_l4.train(config)


def out_of_memory_above(model, limit: int, monkeypatch) -> list[int]:
    """Let the model run out of memory on more tokens than `limit`; return the list of what it is asked for."""
    forward, asked = model.forward, []

    def with_little_memory(input_ids, **options):
        asked.append(input_ids.numel())
        output = forward(input_ids, **options)
        if model.training and input_ids.numel() > limit:
            output.sum().backward(retain_graph=True)  # it is noticed half-way, with gradients there already
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return output

    monkeypatch.setattr(model, "forward", with_little_memory)
    return asked


def test_out_of_memory_halves_the_limit_and_changes_nothing_else(config, tmp_path, monkeypatch, capsys):
    config |= WITHOUT_DROPOUT | {"max_tokens_per_micro_batch": 400, "num_epochs": 1}
    run, plain = (set_up(config | {"output_dir": f"{tmp_path}/{name}", "max_tokens_per_micro_batch": limit})
                  for name, limit in (("run", 400), ("plain", 100)))
    asked = out_of_memory_above(run.model, 100, monkeypatch)
    for each in (run, plain):
        each.model.train()
        train_sft_l4.train_epoch(each)
    assert run.progress.token_limit == 100
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("Out of GPU memory")] == [
        "Out of GPU memory: max_tokens_per_micro_batch is 200 from here on, was 400",
        "Out of GPU memory: max_tokens_per_micro_batch is 100 from here on, was 200"]
    assert sum(tokens > 100 for tokens in asked) == 2  # once each
    for (name, found), expected in zip(run.model.state_dict().items(), plain.model.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7, msg=name)
    assert run.log.history["steps"][0]["loss"] == pytest.approx(plain.log.history["steps"][0]["loss"], rel=1e-6)

    assert torch.load(f"{tmp_path}/run/last.pt")["progress"]["token_limit"] == 100
    resumed = set_up(config | {"output_dir": f"{tmp_path}/run"})
    assert resumed.progress.token_limit == 100
    resumed = set_up(config | {"output_dir": f"{tmp_path}/run", "max_tokens_per_micro_batch": 300})
    assert resumed.progress.token_limit == 300  # asked for since


@pytest.mark.parametrize(("switch", "recomputes"), [("auto", True), ("off", False), ("on", False)])
def test_out_of_memory_with_nothing_left_to_shrink_ends_with_advice(config, monkeypatch, capsys, switch, recomputes):
    run = set_up(config | {"activation_checkpointing": switch})
    run.model.train()
    before = copy.deepcopy(run.model.state_dict())
    out_of_memory_above(run.model, 0, monkeypatch)
    with pytest.raises(UserError, match="out of GPU memory, though every micro-batch is one example of at most"):
        train_sft_l4.train_step(run, range(8))
    assert ("every layer is recomputed from here on" in capsys.readouterr().out) == recomputes
    assert run.progress.step == 0
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_run_out_of_memory_goes_on_where_it_was(config, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(train_sft_l4, "accumulate_gradients", full)
        patch.setattr(train_sft_l4, "parse_train_arguments", lambda _: config)
        assert train_sft_l4.main([]) == 2
    assert "--quantization nf4, a smaller --max_length" in capsys.readouterr().err
    train_sft_l4.train(config | {"max_tokens_per_micro_batch": 100})
    assert torch.load(f"{config['output_dir']}/last.pt")["progress"]["finished"]


def test_weights_that_do_not_fit_end_with_advice(config, monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5.88 GiB. GPU 0 has a total of 4 GiB.")

    monkeypatch.setattr(train_sft_l4, "parse_train_arguments", lambda _: config)
    monkeypatch.setattr(train_sft_l4.BudgetRegressionModel, "to", full)
    assert train_sft_l4.main([]) == 2
    assert "out of GPU memory (CUDA out of memory): --quantization nf4" in capsys.readouterr().err


@pytest.mark.parametrize(("share", "limit", "every"), [(2, 256, 0), (0.9, 256, 4), (0.65, 256, 2), (0.4, 256, 1),
                                                       (0.24, 128, 1)])
def test_layers_are_recomputed_as_memory_asks(config, tmp_path, monkeypatch, capsys, share, limit, every):
    """Memory is what the layers keep for the backward pass; as much as `share` of what they keep at 256 tokens fits."""
    folder = save_llama(tmp_path / "deep", seed=1, num_hidden_layers=8)
    run = set_up(config | {"model_name": folder})  # its backbone is in eval mode, as it was loaded
    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    forward, room, peaks, alive = run.model.forward, [math.inf], [], []

    def counting(*args, **options):
        kept = 0

        def keep(tensor):
            nonlocal kept
            kept += tensor.nbytes
            if kept > room[0]:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = forward(*args, **options)
        peaks.append(kept)
        alive.append(weakref.ref(output))
        return output

    monkeypatch.setattr(run.model, "forward", counting)
    train_sft_l4.fit_memory(run)
    assert (run.checkpoint_every, run.progress.token_limit) == (0, 256)
    room[0] = share * max(peaks)
    train_sft_l4.fit_memory(run)
    assert (run.checkpoint_every, run.progress.token_limit) == (every, limit)
    what = {0: "no layer", 1: "every layer"}.get(every, f"every {every} layers")
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(rf"Memory 3\.0 GiB at most for \d+ tokens, the largest micro-batch; recomputing {what}", last)
    layers = [m for m in run.model.modules() if type(m).__name__ == "LlamaDecoderLayer"]
    assert [layer.gradient_checkpointing for layer in layers] == [every > 0 and i % every == 0 for i in range(8)]
    assert all(parameter.grad is None for parameter in run.model.parameters())
    assert not any(each() is not None for each in alive)
    assert all(module.latest is None for module in run.model.modules() if type(module).__name__ == "SharedDropout")


def test_the_noise_floor_stands_beside_the_error_where_there_is_a_card(config, tmp_path, capsys):
    for name in ("train", "val", "test"):
        shutil.copy(config[f"{name}_path"], tmp_path / f"{name}.jsonl")
        config[f"{name}_path"] = f"{tmp_path}/{name}.jsonl"
    (tmp_path / "data_card.json").write_text('{"noise": {"noise_floor": {"mae": 123.45}}}')
    train_sft_l4.train(config | {"num_epochs": 1, "balance_by": "domain"})
    expected = "Noise floor: the median of a query's other traces misses one more trace by 123.5 tokens in the mean\n"
    assert expected in capsys.readouterr().out
    for broken in ("{", '{"noise": null}', "[]", '{"all": {}}'):
        (tmp_path / "data_card.json").write_text(broken)
        assert train_sft_l4.noise_floor(config["train_path"]) == ""
