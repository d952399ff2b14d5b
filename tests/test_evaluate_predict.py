"""Metrics, baselines, and the commands evaluate and predict."""

import contextlib
import json
import math
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import make_rows, read_rows, write_rows

import train_sft_l4
from train_sft_l4 import BudgetRegressionModel, Row, main, regression_metrics


def metrics(budget, predicted, censored=None) -> dict:
    budget, predicted = np.array(budget, float), np.array(predicted, float)
    return regression_metrics(budget, predicted, np.array(censored or [False] * len(budget)))


def test_metrics_of_a_case_worked_by_hand():
    assert metrics([100, 200, 400, 1000], [150, 200, 300, 1400]) == pytest.approx({
        "rows": 4, "underrun_rate": 1 / 4, "mean_underrun": 100, "overrun_rate": 2 / 4, "mean_overrun": 225,
        "mae": (50 + 0 + 100 + 400) / 4, "rmse": math.sqrt((50**2 + 100**2 + 400**2) / 4),
        "mape": (0.5 + 0 + 0.25 + 0.4) / 4, "median_ape": (0.25 + 0.4) / 2, "spearman": 1.0})


def test_a_censored_row_counts_as_an_underrun_or_not_at_all():
    found = metrics([100, 200, 5000, 5000], [150, 100, 4000, 9000], [False, False, True, True])
    assert found == pytest.approx({
        "rows": 4, "underrun_rate": 2 / 4, "mean_underrun": (100 + 1000) / 2, "overrun_rate": 1 / 2,
        "mean_overrun": 50, "mae": 75, "rmse": math.sqrt((50**2 + 100**2) / 2), "mape": 0.5, "median_ape": 0.5,
        "spearman": -1.0})


def test_where_every_row_is_censored_only_underruns_are_known():
    assert metrics([100, 200], [50, 300], [True, True]) == {"rows": 2, "underrun_rate": 0.5, "mean_underrun": 50.0}


def test_a_constant_has_no_rank_correlation():
    assert metrics([1, 2, 3], [7, 7, 7])["spearman"] is None
    assert metrics([5, 5, 5], [1, 2, 3])["spearman"] is None
    assert metrics([5], [1])["spearman"] is None


def test_perfect_predictions_have_no_error():
    found = metrics([3, 1, 2], [3, 1, 2])
    assert found.pop("spearman") == 1.0
    assert found.pop("rows") == 3
    assert set(found.values()) == {0.0}


def test_metrics_are_plain_numbers_that_json_takes():
    found = metrics([3, 1, 2], [3, 3, 2])
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert {type(value) for value in found.values()} == {int, float}


def synthetic(count: int, seed: int) -> list[Row]:
    return [Row(row["query"], float(row["optimal_budget"]), row["domain"], row["query"],
                row.get("censored", False), row, f"f:{number}")
            for number, row in enumerate(make_rows(count, seed))]


def test_the_baselines_are_fitted_on_the_training_rows_and_repeat():
    train, others = synthetic(200, seed=1), synthetic(50, seed=2)
    first, again = (train_sft_l4.fit_baselines(train)(others) for _ in range(2))
    assert set(first) == {"training median", "tf-idf + ridge", "tf-idf + trees"}
    for name, predicted in first.items():
        assert predicted.shape == (50,)
        assert (predicted > 0).all()
        assert np.array_equal(predicted, again[name])
    known = [row.budget for row in train if not row.censored]
    assert set(first["training median"]) == {np.median(known)}
    budget = np.array([row.budget for row in others])
    error = {name: np.abs(predicted - budget).mean() for name, predicted in first.items()}
    assert error["tf-idf + ridge"] < error["training median"]
    assert error["tf-idf + trees"] < error["training median"]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_baselines_can_be_fitted_on_few_rows(count):
    rows = synthetic(6, seed=3)[1 : 1 + count]
    for predicted in train_sft_l4.fit_baselines(rows)(rows).values():
        assert np.isfinite(predicted).all()


def test_a_report_cuts_the_rows_by_domain_and_by_decile():
    rows = synthetic(40, seed=4)
    predicted = np.array([row.budget + 10 for row in rows])
    report = train_sft_l4.build_report(rows, predicted, {"training median": predicted + 5})
    assert set(report["by_domain"]) == {"maths", "code"}
    assert sum(each["rows"] for each in report["by_domain"].values()) == 40
    assert [each["rows"] for each in report["by_budget_decile"]] == [4] * 10
    assert report["metrics"]["mae"] == pytest.approx(10)
    assert report["baselines"]["training median"]["mae"] == pytest.approx(15)
    lows = [each["min_budget"] for each in report["by_budget_decile"]]
    assert lows == sorted(lows)


def evaluate(trained, tmp_path, capsys, *arguments, data="test", code=0) -> tuple[str, str]:
    """Run evaluate in this process; return what it prints on both channels."""
    path = data if str(data).endswith(".jsonl") else trained.config[f"{data}_path"]
    command = ["evaluate", "--checkpoint", str(trained.best), "--data", str(path), "--log-dir", str(tmp_path / "out")]
    assert main([*command, *map(str, arguments)]) == code
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_evaluate_writes_metrics_and_predictions_that_agree(trained, tmp_path, capsys):
    out, _ = evaluate(trained, tmp_path, capsys)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test_metrics.json", "test_predictions.jsonl"]
    report = json.loads((tmp_path / "out/test_metrics.json").read_text(), parse_constant=pytest.fail)
    written, given = read_rows(tmp_path / "out/test_predictions.jsonl"), read_rows(trained.config["test_path"])
    assert [{key: row[key] for key in row if key != "predicted_budget"} for row in written] == given
    errors = [abs(row["predicted_budget"] - row["optimal_budget"]) for row in written if not row.get("censored")]
    assert report["metrics"]["mae"] == pytest.approx(np.mean(errors), abs=0.01)
    assert report["metrics"]["rows"] == 24
    assert len(errors) == 22
    model = BudgetRegressionModel.from_checkpoint(trained.best)
    assert [row["predicted_budget"] for row in written] == pytest.approx(
        model.predict([row["query"] for row in given]), abs=0.01)
    assert "test.jsonl: 24 rows, budget " in out
    for name in ("budget model", "training median", "tf-idf + ridge", "tf-idf + trees"):
        mae = (report["metrics"] if name == "budget model" else report["baselines"][name])["mae"]
        assert f"  {name:<24}{24:>6}{mae:>9,.1f}" in out
    assert all(len(line) <= 80 for line in out.split("\n") if line.startswith("  "))


def test_evaluate_repeats_what_training_measured(trained, tmp_path, capsys):
    evaluate(trained, tmp_path, capsys)
    found, expected = (json.loads(path.read_text()) for path in
                       (tmp_path / "out/test_metrics.json", trained.folder / "logs/test_metrics.json"))
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)
    assert list(found["baselines"]) == list(expected["baselines"])
    for name, baseline in expected["baselines"].items():
        known = {key: value for key, value in baseline.items() if value is not None}
        assert {key: found["baselines"][name][key] for key in known} == pytest.approx(known, rel=1e-5)


def test_evaluate_says_when_the_model_beats_no_baseline(trained, tmp_path, capsys):
    budget = 60
    rows = [{"query": f"Add {number} {number}.", "optimal_budget": budget} for number in range(20)]
    train = write_rows(tmp_path / "constant.jsonl", [row | {"query": f"Subtract {i}."} for i, row in enumerate(rows)])
    out, _ = evaluate(trained, tmp_path, capsys, "--train_path", train, data=write_rows(tmp_path / "d.jsonl", rows))
    line = next(line for line in out.split("\n") if line.startswith("NOT BETTER than "))
    assert "training median (0.0)" in line
    assert "tf-idf + ridge (" in line
    assert "When the error is high" in out


def test_evaluate_does_not_complain_when_the_model_is_better(trained, tmp_path, capsys):
    model = BudgetRegressionModel.from_checkpoint(trained.best)
    rows = [{"query": row["query"]} for row in make_rows(30, seed=77)]
    for row, budget in zip(rows, model.predict([row["query"] for row in rows]), strict=True):
        row["optimal_budget"] = budget
    out, _ = evaluate(trained, tmp_path, capsys, data=write_rows(tmp_path / "own.jsonl", rows))
    assert "NOT BETTER" not in out
    assert "training median" in out


def test_evaluate_warns_of_queries_that_were_trained_on(trained, tmp_path, capsys):
    rows = read_rows(trained.config["train_path"])[:7] + make_rows(10, seed=50)
    rows[0]["query"] += "  "
    out, _ = evaluate(trained, tmp_path, capsys, data=write_rows(tmp_path / "mixed.jsonl", rows))
    assert "WARNING: 7 of these queries were trained on: the figures flatter the model\n" in out
    out, _ = evaluate(trained, tmp_path, capsys)
    assert "WARNING" not in out


@pytest.fixture
def moved(trained, tmp_path):
    """Return a function that makes a checkpoint whose configuration differs."""
    def change(**overrides):
        checkpoint = torch.load(trained.best)
        checkpoint["config"] |= overrides
        torch.save(checkpoint, tmp_path / "moved.pt")
        return tmp_path / "moved.pt"

    return change


def test_evaluate_says_when_the_training_rows_are_missing(trained, tmp_path, capsys, moved):
    path = moved(train_path="gone.jsonl")
    command = ["evaluate", "--checkpoint", str(path), "--data", trained.config["test_path"], "--log_dir", str(tmp_path)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "No baselines: gone.jsonl is not here; name the training rows with --train_path\n" in out
    assert "tf-idf" not in out
    assert json.loads((tmp_path / "test_metrics.json").read_text())["baselines"] == {}
    assert main([*command, "--train_path", "also_gone.jsonl"]) == 2
    assert capsys.readouterr().err == "error: cannot read also_gone.jsonl: no such file\n"


def test_evaluate_warns_of_every_trained_query_although_the_validation_file_is_gone(trained, tmp_path, capsys, moved):
    path = moved(val_path="gone.jsonl")
    assert main(["evaluate", "--checkpoint", str(path), "--data", trained.config["train_path"],
                 "--log_dir", str(tmp_path)]) == 0
    assert "WARNING: 98 of these queries were trained on" in capsys.readouterr().out


def test_evaluate_names_bad_rows_before_it_loads_weights(trained, tmp_path, capsys):
    path = write_rows(tmp_path / "bad.jsonl", [{"query": "a", "optimal_budget": 1}, {"query": "b"}])
    _, error = evaluate(trained, tmp_path, capsys, "--checkpoint", "gone.pt", data=path, code=2)
    assert error == (f"error: {path}: 1 bad rows (--on_bad_row skip drops them):\n"
                     f"  {path}:2: optimal_budget must be a finite number > 0, got null\n")
    out, _ = evaluate(trained, tmp_path, capsys, "--on-bad-row", "skip", data=path)
    assert f"{path}: 1 bad rows skipped" in out
    assert not (tmp_path / "out/test_metrics.json").exists()


def test_evaluate_of_censored_rows_alone_reports_what_is_known(trained, tmp_path, capsys):
    rows = [row | {"censored": True} for row in make_rows(5, seed=60)]
    evaluate(trained, tmp_path, capsys, data=write_rows(tmp_path / "capped.jsonl", rows))
    report = json.loads((tmp_path / "out/capped_metrics.json").read_text())
    assert set(report["metrics"]) == {"rows", "underrun_rate", "mean_underrun"}


def test_domains_of_any_text_are_reported_a_line_each(trained, tmp_path, capsys):
    rows = make_rows(12, seed=61)
    for number, row in enumerate(rows):
        row["domain"] = ("half an emoji \ud83d", "two\nlines", "\u65e5\u672c\u8a9e")[number % 3]
    out, _ = evaluate(trained, tmp_path, capsys, data=write_rows(tmp_path / "domains.jsonl", rows))
    section = out.split("by domain\n", 1)[1].split("by true budget", 1)[0]
    assert [line[26:32].strip() for line in section.splitlines()] == ["4", "4", "4"]


def test_evaluate_with_another_memory_plan_gives_the_same_figures(trained, tmp_path, capsys):
    evaluate(trained, tmp_path, capsys)
    first = read_rows(tmp_path / "out/test_predictions.jsonl")
    evaluate(trained, tmp_path, capsys, "--max_tokens_per_micro_batch", 1)
    second = read_rows(tmp_path / "out/test_predictions.jsonl")
    for one, other in zip(first, second, strict=True):
        assert one["predicted_budget"] == pytest.approx(other["predicted_budget"], abs=0.02)


def test_a_plot_without_matplotlib_says_what_to_install(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_sft_l4.util, "find_spec", lambda name: None)
    _, error = evaluate(trained, tmp_path, capsys, "--plot", tmp_path / "plot.png", code=2)
    assert error == "error: --plot needs matplotlib: pip install matplotlib\n"


@pytest.mark.parametrize("censored", [False, True])
def test_a_plot_is_drawn(trained, tmp_path, capsys, censored):
    pytest.importorskip("matplotlib")
    rows = [row | {"censored": censored, "domain": "$_^{"} for row in make_rows(9, seed=62)]
    target = tmp_path / "plot.png"
    out, _ = evaluate(trained, tmp_path, capsys, "--plot", target, data=write_rows(tmp_path / "rows.jsonl", rows))
    assert f"Drawn: {target}\n" in out
    assert target.read_bytes().startswith(b"\x89PNG")


def predict(trained, capsys, *arguments, code=0):
    try:
        found = main(["predict", "--checkpoint", str(trained.best), *map(str, arguments)])
    except SystemExit as left:
        found = left.code
    assert found == code
    return capsys.readouterr()


@pytest.fixture(scope="module")
def model(trained) -> BudgetRegressionModel:
    return BudgetRegressionModel.from_checkpoint(trained.best)


def test_predict_prints_whole_tokens_rounded_up_in_the_order_given(trained, capsys, model):
    queries = ["Multiply 3 4 5 and show it.", "Prove that\n  sqrt(2) is irrational", "x"]
    out = predict(trained, capsys, *queries).out
    budgets = [math.ceil(budget) for budget in model.predict(queries)]
    assert out == (f"{budgets[0]}\tMultiply 3 4 5 and show it.\n"
                   f"{budgets[1]}\tProve that sqrt(2) is irrational\n{budgets[2]}\tx\n")


def test_predict_takes_queries_before_its_flags_and_with_a_minus(trained, capsys):
    assert main(["predict", "-3 + 5 = ?", "-5", "--checkpoint", str(trained.best)]) == 0
    assert [line.split("\t")[1] for line in capsys.readouterr().out.splitlines()] == ["-3 + 5 = ?", "-5"]


def test_predict_prints_a_query_that_is_not_utf_8(trained, capsys):
    out = predict(trained, capsys, os.fsdecode(b"caf\xe9"), "b").out
    assert [line.split("\t")[1][:3] for line in out.splitlines()] == ["caf", "b"]


QUERY_ROWS = [{"id": i, "query": row["query"], "extra": {"nested": [i, None, "é\u2028"]}, "optimal_budget": "?"}
              for i, row in enumerate(make_rows(23, seed=70))]


@pytest.mark.parametrize("window", [7, 4096])
def test_predict_on_a_file_keeps_order_and_fields(trained, tmp_path, capsys, model, monkeypatch, window):
    monkeypatch.setattr(train_sft_l4, "WINDOW", window)
    source, target = write_rows(tmp_path / "queries.jsonl", QUERY_ROWS), tmp_path / "new/budgets.jsonl"
    captured = predict(trained, capsys, "--input", source, "--output", target)
    assert captured.out == ""
    assert f"Written: {target}, 23 rows" in captured.err
    budgets = [math.ceil(budget) for budget in model.predict([row["query"] for row in QUERY_ROWS])]
    lines = read_rows(target)
    assert lines == [row | {"predicted_budget": budget} for row, budget in zip(QUERY_ROWS, budgets, strict=True)]
    assert all(type(row["predicted_budget"]) is int for row in lines)


def test_predict_on_a_file_prints_the_same_rows_without_an_output(trained, tmp_path, capfdbinary):
    source, target = write_rows(tmp_path / "queries.jsonl", QUERY_ROWS), tmp_path / "budgets.jsonl"
    command = ["predict", "--checkpoint", str(trained.best), "--input", source]
    assert main([*command, "--output", str(target)]) == 0
    capfdbinary.readouterr()
    assert main(command) == 0
    assert capfdbinary.readouterr().out == target.read_bytes()


def test_predict_may_write_over_its_input(trained, tmp_path, capsys):
    path = write_rows(tmp_path / "queries.jsonl", QUERY_ROWS)
    predict(trained, capsys, "--input", path, "--output", path)
    assert [row["id"] for row in read_rows(path)] == list(range(23))


def test_predict_names_a_bad_line_or_skips_it(trained, tmp_path, capsys):
    source = write_rows(tmp_path / "queries.jsonl", [QUERY_ROWS[0], {"query": 5}, QUERY_ROWS[2]])
    target = tmp_path / "budgets.jsonl"
    error = predict(trained, capsys, "--input", source, "--output", target, code=2).err
    assert error == (f"error: {source}: 1 bad rows (--on_bad_row skip drops them):\n"
                     f"  {source}:2: query must be a non-empty string, got 5\n")
    assert not target.exists()
    captured = predict(trained, capsys, "--input", source, "--output", target, "--on_bad_row", "skip")
    assert f"{source}: 1 bad rows skipped, the first: {source}:2: query" in captured.err
    assert [row["id"] for row in read_rows(target)] == [0, 2]


def test_predict_leaves_no_output_after_a_failure(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_sft_l4, "WINDOW", 7)
    source, target = write_rows(tmp_path / "queries.jsonl", QUERY_ROWS), tmp_path / "out/budgets.jsonl"
    lines = []

    def fail_at_ten(value):
        lines.append(value)
        if len(lines) == 10:
            raise RuntimeError("boom")
        return b"{}\n"

    monkeypatch.setattr(train_sft_l4, "json_line", fail_at_ten)
    with pytest.raises(RuntimeError, match="boom"):
        predict(trained, capsys, "--input", source, "--output", target)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("arguments", [
    [], ["query", "--input", "a.jsonl"], ["query", "--output", "b.jsonl"], ["--output", "b.jsonl"],
    ["query", "--max_tokens_per_micro_batch", "0"], ["query", "--max_tokens_per_micro_batch", "many"],
    ["--input", "a.jsonl", "--on_bad_row", "fix"],
])
def test_predict_refuses_arguments_that_do_not_go_together(trained, capsys, arguments):
    error = predict(trained, capsys, *arguments, code=2).err
    assert "train_sft_l4.py predict: error: " in error


@pytest.mark.parametrize("query", ["", " \n\t"])
def test_predict_refuses_an_empty_query(trained, capsys, query):
    assert predict(trained, capsys, "good", query, code=2).err == "error: query 2 is empty\n"


def test_predict_names_a_missing_input_and_checkpoint(trained, tmp_path, capsys):
    error = predict(trained, capsys, "--input", tmp_path / "no.jsonl", code=2).err
    assert error == f"error: cannot read {tmp_path}/no.jsonl: No such file or directory\n"
    assert main(["predict", "--checkpoint", "no.pt", "query"]) == 2
    assert capsys.readouterr().err == "error: cannot read checkpoint no.pt: No such file or directory\n"


@pytest.mark.parametrize("output", [".", "/", "folder", "file/below.jsonl"])
def test_predict_refuses_an_output_that_cannot_be_written(trained, tmp_path, capsys, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    source = write_rows(tmp_path / "queries.jsonl", QUERY_ROWS[:2])
    assert predict(trained, capsys, "--input", source, "--output", output, code=2).err.startswith("error: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "queries.jsonl"]


def test_predict_reads_a_pipe_or_refuses_it(trained, tmp_path, capsys):
    """A pipe can be read once only: nothing may be lost in silence."""
    source, target = tmp_path / "pipe", tmp_path / "budgets.jsonl"
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as file:
        file.write(b"".join(json.dumps(row).encode() + b"\n" for row in QUERY_ROWS))
    source = f"/dev/fd/{reading}"
    try:
        code = main(["predict", "--checkpoint", str(trained.best), "--input", source, "--output", str(target)])
    finally:
        os.close(reading)
    if code == 0:
        assert [row["id"] for row in read_rows(target)] == list(range(23))
    else:
        assert code == 2
        assert source in capsys.readouterr().err
        assert not target.exists()


def test_predict_into_a_pipe_that_closes_ends_without_a_traceback(trained, tmp_path, monkeypatch):
    source = write_rows(tmp_path / "queries.jsonl", [{"query": "a", "padding": "x" * 10**6}])
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writing, "w"))
    main(["predict", "--checkpoint", str(trained.best), "--input", source])
    with contextlib.suppress(OSError):
        sys.stdout.close()


def test_a_moved_backbone_can_be_named(trained, tmp_path, capsys, model):
    folder = shutil.copytree(trained.config["model_name"], tmp_path / "backbone")
    out = predict(trained, capsys, "--model-name", folder, "x").out
    assert out == f"{math.ceil(model.predict(['x'])[0])}\tx\n"
