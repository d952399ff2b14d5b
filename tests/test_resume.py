"""Resuming: a stopped run ends as if it had not been stopped; unfinished, finished and foreign runs; failing disks."""

import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_rows, read_rows, tiny_config, write_rows

import train_sft_l4
from train_sft_l4 import Stopped, UserError, train


def flags(config) -> list[str]:
    """Return the command line that sets every key."""
    return [f"--{key}={','.join(value) if isinstance(value, list) else value}" for key, value in config.items()]


def before_call(monkeypatch, name: str, number: int, act) -> None:
    """Let `act` happen right before the numbered call, from 1, of a function of the script."""
    original, calls = getattr(train_sft_l4, name), []

    def wrapped(*arguments, **options):
        calls.append(name)
        if len(calls) == number:
            act()
        return original(*arguments, **options)

    monkeypatch.setattr(train_sft_l4, name, wrapped)


def send(number: int):
    return lambda: os.kill(os.getpid(), number)


def without_timings(value):
    if isinstance(value, dict):
        return {key: without_timings(each) for key, each in value.items() if key != "seconds"}
    return [without_timings(each) for each in value] if isinstance(value, (list, tuple)) else value


def assert_equal(found, expected, place: str = "") -> None:
    """Check that two trees of dicts, lists, tensors and numbers are the same bit by bit."""
    assert type(found) is type(expected), place
    if isinstance(expected, dict):
        assert list(found) == list(expected), place
        for key in expected:
            assert_equal(found[key], expected[key], f"{place}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), place
        for number, pair in enumerate(zip(found, expected, strict=True)):
            assert_equal(*pair, f"{place}/{number}")
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, place
        assert torch.equal(found, expected), place
    else:
        assert found == expected, place


def assert_same_run(config, reference) -> None:
    for name in ("epoch_1", "epoch_2", "best_model", "last"):
        found, expected = (torch.load(f"{each['output_dir']}/{name}.pt") for each in (config, reference))
        for key in ("config", "history") if name != "best_model" else ("config",):
            del found[key], expected[key]
        assert_equal(without_timings(found), without_timings(expected), name)
    for split in ("val", "test"):
        found, expected = (Path(each["log_dir"], f"{split}_predictions.jsonl").read_bytes()
                           for each in (config, reference))
        assert found == expected
    found, expected = (json.loads(Path(each["log_dir"], "training_history.json").read_text())
                       for each in (config, reference))
    for key in ("steps", "validations", "val", "test", "versions"):
        assert_equal(without_timings(found[key]), without_timings(expected[key]), key)


@pytest.fixture(scope="module", autouse=True)
def no_baselines():
    """Leave out what takes half the time of a tiny run and has no part in resuming."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_sft_l4, "fit_baselines", lambda rows: lambda others: {})
        yield


@pytest.fixture(scope="module")
def references(llama, data, tmp_path_factory):
    """Return a function from eval_every to the configuration of an uninterrupted run."""
    done = {}

    def reference(eval_every: int) -> dict:
        if eval_every not in done:
            folder = tmp_path_factory.mktemp("reference")
            done[eval_every] = tiny_config(llama, data, folder) | {"eval_every": eval_every}
            train(done[eval_every])
        return done[eval_every]

    return reference


@pytest.mark.parametrize(("eval_every", "name", "call", "step"), [
    (0, "train_step", 1, 1),
    (0, "train_step", 6, 6),
    (0, "train_step", 13, 13),
    (0, "train_step", 26, 26),
    (0, "validate", 1, 13),
    (0, "validate", 2, 26),
    (0, "out_of_patience", 15, 14),
    (0, "report_run", 1, 26),
    (5, "train_step", 5, 5),
    (5, "validate", 1, 5),
    (5, "validate", 3, 13),
    (5, "train_step", 19, 19),
])
def test_a_stopped_run_ends_bit_for_bit_as_one_that_was_not_stopped(
        config, references, monkeypatch, capsys, eval_every, name, call, step):
    reference = references(eval_every)
    config |= {"eval_every": eval_every}
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        before_call(patch, name, call, send(signal.SIGTERM))
        train(config)
    assert torch.load(f"{config['output_dir']}/last.pt")["progress"]["step"] == step
    said = capsys.readouterr().out
    assert f"Stopped by SIGTERM at step {step} and saved: the same command goes on from here\n" in said
    train(config)
    assert f"Going on from {config['output_dir']}/last.pt at step {step}\n" in capsys.readouterr().out
    assert_same_run(config, reference)


@pytest.mark.parametrize(("overrides", "call"), [
    ({"lora_r": 0, "target_transform": "log", "lr_schedule": "cosine", "weight_decay": 0.5}, 6),
    ({"early_stopping_patience": 2, "eval_every": 2, "learning_rate": 0.05, "num_epochs": 20}, 5),
])
def test_other_runs_end_bit_for_bit_too(config, tmp_path, monkeypatch, overrides, call):
    config |= overrides
    reference = config | {"output_dir": f"{tmp_path}/whole", "log_dir": f"{tmp_path}/whole_logs"}
    train(reference)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        before_call(patch, "train_step", call, send(signal.SIGTERM))
        train(config)
    train(config)
    for name in ("best_model", "last"):
        found, expected = (torch.load(f"{each['output_dir']}/{name}.pt") for each in (config, reference))
        for key in ("model_state_dict", "val_metrics", "epoch"):
            assert_equal(found[key], expected[key], f"{name}/{key}")
    found, expected = (json.loads(Path(each["log_dir"], "training_history.json").read_text())
                       for each in (config, reference))
    assert_equal(without_timings(found["steps"]), without_timings(expected["steps"]))


def test_a_run_stopped_many_times_ends_as_one_that_was_not(config, references, monkeypatch):
    for _ in range(6):
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            before_call(patch, "train_step", 4, send(signal.SIGINT))
            train(config)
    train(config)
    assert_same_run(config, references(0))


def test_a_killed_run_goes_on_from_its_last_save(config, references, monkeypatch):
    config |= {"save_every_minutes": 0.0}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        before_call(patch, "train_step", 9, kill)
        train(config)
    assert torch.load(f"{config['output_dir']}/last.pt")["progress"]["step"] == 8
    train(config)
    assert_same_run(config, references(0))


def names(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


class Killed(BaseException):
    """Ends a run wherever it is, as kill -9 would: nothing of ours catches it."""


def kill() -> None:
    raise Killed


def test_a_run_killed_after_its_first_best_checkpoint_goes_on(config, references, monkeypatch):
    original = os.fsync

    def fsync(descriptor):
        if Path(config["output_dir"], "best_model.pt").exists():
            raise Killed
        original(descriptor)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "fsync", fsync)
        train(config)
    assert names(config["output_dir"]) == ["best_model.pt", "last.pt"]
    train(config)
    assert_same_run(config, references(0))


@pytest.mark.parametrize("where", ["fsync", "rename"])
def test_a_kill_while_saving_leaves_the_previous_checkpoint(config, monkeypatch, where):
    saves, fsync, replace = [], os.fsync, Path.replace

    def counting_fsync(descriptor):
        if any(Path(config["output_dir"]).glob(".last.pt*")):
            saves.append(descriptor)
            if len(saves) == 4 and where == "fsync":  # the first save is before the first step
                raise Killed
        fsync(descriptor)

    def dying_replace(path, target):
        if len(saves) == 4 and where == "rename":
            raise Killed
        return replace(path, target)

    config |= {"save_every_minutes": 0.0}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "fsync", counting_fsync)
        patch.setattr(Path, "replace", dying_replace)
        train(config)
    checkpoint = torch.load(f"{config['output_dir']}/last.pt")
    assert checkpoint["progress"]["step"] == 2
    assert names(config["output_dir"]) == ["last.pt"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_exit_code_tells_the_signal(config, monkeypatch, number, code):
    with monkeypatch.context() as patch:
        before_call(patch, "train_step", 3, send(number))
        assert train_sft_l4.main(flags(config)) == code
    assert torch.load(f"{config['output_dir']}/last.pt")["progress"]["step"] == 3


def test_a_run_whose_reader_ends_by_the_same_keypress_is_saved(config, monkeypatch):
    """Ctrl-C on `... | tee train.log` ends tee too, so that nothing can be printed any more."""
    def press():
        reading, writing = os.pipe()
        os.close(reading)
        monkeypatch.setattr(sys, "stdout", os.fdopen(writing, "w"))
        os.kill(os.getpid(), signal.SIGINT)

    before_call(monkeypatch, "train_step", 4, press)  # after this step a line is due
    code = train_sft_l4.main(flags(config))
    assert torch.load(f"{config['output_dir']}/last.pt")["progress"]["step"] == 4
    assert code == 130


def test_a_second_signal_is_left_to_the_system(config, monkeypatch):
    seen = []

    def twice():
        os.kill(os.getpid(), signal.SIGTERM)
        seen.extend(signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT))

    before_call(monkeypatch, "train_step", 2, twice)
    with pytest.raises(Stopped):
        train(config)
    assert seen == [signal.SIG_DFL, signal.SIG_DFL]


@pytest.fixture
def finished(trained, config) -> dict:
    """A copy of the trained run."""
    shutil.copytree(trained.folder / "checkpoints", config["output_dir"])
    shutil.copytree(trained.folder / "logs", config["log_dir"])
    return config


def contents(folder: str) -> dict:
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("resume", ["auto", "off"])
def test_a_finished_run_is_not_overwritten(finished, resume, capsys):
    before = contents(finished["output_dir"])
    assert train_sft_l4.main(flags(finished | {"resume": resume})) == 2
    assert capsys.readouterr().err == (
        f"error: {finished['output_dir']} holds a finished run: "
        "choose another --output_dir, or replace it with --overwrite\n")
    assert contents(finished["output_dir"]) == before


def test_checkpoints_without_a_last_one_are_not_overwritten(finished):
    Path(finished["output_dir"], "last.pt").unlink()
    before = contents(finished["output_dir"])
    with pytest.raises(UserError, match="replace it with --overwrite"):
        train(finished)
    assert contents(finished["output_dir"]) == before


def test_overwrite_replaces_a_finished_run(finished):
    train(finished | {"overwrite": True, "num_epochs": 1, "learning_rate": 2e-3})
    assert names(finished["output_dir"]) == ["best_model.pt", "epoch_1.pt", "last.pt"]
    for name in ("best_model", "last", "epoch_1"):
        assert torch.load(f"{finished['output_dir']}/{name}.pt")["config"]["learning_rate"] == 2e-3
    history = json.loads(Path(finished["log_dir"], "training_history.json").read_text())
    assert len(history["steps"]) == 13


@pytest.fixture
def unfinished(config, monkeypatch) -> dict:
    """A run that was stopped after four steps."""
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        before_call(patch, "train_step", 4, send(signal.SIGTERM))
        train(config)
    return config


def test_resume_off_does_not_overwrite_an_unfinished_run(unfinished, capsys):
    before = contents(unfinished["output_dir"])
    assert train_sft_l4.main(flags(unfinished | {"resume": "off"})) == 2
    assert capsys.readouterr().err == (
        f"error: {unfinished['output_dir']} holds an unfinished run: go on with --resume auto, "
        "choose another --output_dir, or replace it with --overwrite\n")
    assert contents(unfinished["output_dir"]) == before


def test_overwrite_starts_anew_although_a_run_is_unfinished(unfinished):
    train(unfinished | {"overwrite": True, "num_epochs": 1, "seed": 5, "test_path": ""})
    last = torch.load(f"{unfinished['output_dir']}/last.pt")
    assert last["progress"]["step"] == 13
    assert last["config"]["seed"] == 5


def test_changed_settings_are_named_and_refused(unfinished):
    with pytest.raises(UserError) as refused:
        train(unfinished | {"learning_rate": 2e-3, "num_epochs": 3, "eval_every": 1})
    first = str(refused.value).split("\n")[0]
    assert first == (f"{unfinished['output_dir']}/last.pt belongs to a run that differs: "
                     "num_epochs was 2, is 3; learning_rate was 0.001, is 0.002; eval_every was 0, is 1")


@pytest.mark.parametrize("split", ["train", "val"])
def test_changed_data_are_named_and_refused(unfinished, tmp_path, split):
    rows = read_rows(unfinished[f"{split}_path"])
    rows[5]["optimal_budget"] += 1
    path = write_rows(tmp_path / "changed.jsonl", rows)
    with pytest.raises(UserError, match="differs: the training or validation rows changed"):
        train(unfinished | {f"{split}_path": path})


def test_moved_data_another_memory_plan_and_other_folders_may_go_on(unfinished, tmp_path):
    moved = shutil.copytree(Path(unfinished["train_path"]).parent, tmp_path / "moved")
    train(unfinished | {
        "train_path": f"{moved}/train.jsonl", "val_path": f"{moved}/val.jsonl", "test_path": "",
        "max_tokens_per_micro_batch": 100, "activation_checkpointing": "on", "log_dir": f"{tmp_path}/elsewhere"})
    history = json.loads((tmp_path / "elsewhere/training_history.json").read_text())
    assert [step["step"] for step in history["steps"]] == list(range(1, 27))


@pytest.mark.parametrize("damage", ["whole", "broken", "missing"])
def test_a_run_goes_on_from_an_epoch_whatever_became_of_its_last_checkpoint(config, references, monkeypatch, damage):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        before_call(patch, "train_step", 18, send(signal.SIGTERM))
        train(config)
    last = Path(config["output_dir"], "last.pt")
    if damage == "broken":
        last.write_bytes(last.read_bytes()[:500_000])
    elif damage == "missing":
        last.unlink()
    train(config | {"resume": f"{config['output_dir']}/epoch_1.pt"})
    weights = [torch.load(f"{each['output_dir']}/epoch_2.pt")["model_state_dict"] for each in (config, references(0))]
    assert_equal(*weights)


def test_a_run_goes_on_in_another_folder_and_keeps_the_best_from_there_on(finished, tmp_path, capsys):
    other = f"{tmp_path}/other"
    train(finished | {"resume": f"{finished['output_dir']}/epoch_1.pt", "output_dir": other})
    assert f"No best_model.pt in {other}: the best from here on will be kept\n" in capsys.readouterr().out
    assert names(other) == ["best_model.pt", "epoch_2.pt", "last.pt"]
    best, second, expected = (torch.load(path) for path in (
        f"{other}/best_model.pt", f"{other}/epoch_2.pt", f"{finished['output_dir']}/epoch_2.pt"))
    assert_equal(best["model_state_dict"], second["model_state_dict"])
    assert_equal(second["model_state_dict"], expected["model_state_dict"])
    assert best["val_mae"] == expected["val_mae"]


@pytest.mark.parametrize("resume", ["best_model.pt", "missing.pt"])
def test_a_checkpoint_that_cannot_be_resumed_is_refused(unfinished, trained, resume):
    shutil.copy(trained.best, unfinished["output_dir"])
    path = f"{unfinished['output_dir']}/{resume}"
    with pytest.raises(UserError) as refused:
        train(unfinished | {"resume": path})
    assert str(refused.value) in (
        f"{path} has no optimizer state to go on from: resume from last.pt or an epoch_*.pt",
        f"cannot read checkpoint {path}: No such file or directory")


def test_a_best_checkpoint_under_the_name_of_the_last_is_refused(finished):
    folder = Path(finished["output_dir"])
    shutil.copy(folder / "best_model.pt", folder / "last.pt")
    with pytest.raises(UserError, match="has no optimizer state to go on from"):
        train(finished)


def test_a_broken_last_checkpoint_is_refused(unfinished):
    path = Path(unfinished["output_dir"], "last.pt")
    path.write_bytes(path.read_bytes()[:500_000])
    with pytest.raises(UserError, match=r"last\.pt is not a whole checkpoint"):
        train(unfinished)


@pytest.fixture
def file_limit():
    """Return a function that limits how large a file may grow: from there on writing fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("size", "left"), [(500_000, []), (2_000_000, ["best_model.pt", "last.pt"])])
def test_a_disk_that_fills_up_gives_one_message_and_leaves_no_scrap(config, file_limit, capsys, size, left):
    file_limit(size)
    code = train_sft_l4.main(flags(config))
    error = capsys.readouterr().err
    assert code == 2
    assert error == f"error: cannot write {config['output_dir']}/last.pt: File too large\n"
    assert names(config["output_dir"]) == left
    for name in left:
        torch.load(f"{config['output_dir']}/{name}")


def test_a_disk_that_fills_up_leaves_the_previous_checkpoint(unfinished, file_limit, capsys):
    before = contents(unfinished["output_dir"])
    file_limit(2_000_000)
    assert train_sft_l4.main(flags(unfinished)) == 2
    assert "cannot write" in capsys.readouterr().err
    last = str(Path(unfinished["output_dir"], "last.pt"))
    assert contents(unfinished["output_dir"])[last] == before[last]


@pytest.mark.parametrize("key", ["output_dir", "log_dir"])
@pytest.mark.parametrize("below", [False, True])
def test_a_folder_that_is_a_file_is_refused_before_training(config, tmp_path, monkeypatch, capsys, key, below):
    path = tmp_path / "file"
    path.write_text("")
    before_call(monkeypatch, "train_step", 1, kill)
    config[key] = f"{path}/below" if below else str(path)
    assert train_sft_l4.main(flags(config)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert config[key] in error
    assert path.read_text() == ""


def test_a_run_on_few_rows_resumes_in_an_epoch_of_one_step(config, tmp_path, monkeypatch):
    path = write_rows(tmp_path / "few.jsonl", make_rows(5, seed=8))
    config |= {"train_path": path, "num_epochs": 4, "test_path": ""}
    train(config | {"output_dir": f"{tmp_path}/whole"})
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        before_call(patch, "train_step", 3, send(signal.SIGTERM))
        train(config)
    train(config)
    found, expected = (torch.load(f"{folder}/epoch_4.pt") for folder in (config["output_dir"], f"{tmp_path}/whole"))
    assert_equal(found["model_state_dict"], expected["model_state_dict"])
