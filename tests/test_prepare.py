"""Labels from traces: what is read, what becomes a budget, what stays together, and what the data card says."""

import csv
import gzip
import http.server
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, read_rows, run_command, save_tokenizer, write_rows

import train_sft_l4

SCRIPT = ROOT / "data" / "prepare.py"
WORDS = ("apple", "river", "stone", "cloud", "table", "horse", "green", "seven")


def load():
    """Return the module data/prepare.py."""
    spec = importlib.util.spec_from_file_location("prepare", SCRIPT)
    module = sys.modules["prepare"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def prepare():
    return load()


def make_traces(n_queries: int, n_samples: int = 4, seed: int = 0, model: str = "m") -> list[dict]:
    rng, traces = random.Random(seed), []
    for number in range(n_queries):
        words = " ".join(rng.choice(WORDS) for _ in range(12))
        middle = rng.lognormvariate(6, 1)
        for _ in range(n_samples):
            traces.append({"query": f"{words} {number}", "model": model, "domain": ("maths", "code")[number % 2],
                           "tokens": round(middle * rng.lognormvariate(0, 0.4)) + 1, "correct": rng.random() < 0.6})
    return traces


def label(prepare, tmp_path, traces, *flags, name="traces.jsonl") -> tuple[int, list[dict]]:
    """Run the command; return its exit code and every row it wrote."""
    path = write_rows(tmp_path / name, traces) if traces is not None else str(tmp_path / name)
    code = prepare.main(["label", path, "--output", str(tmp_path / "out"), *flags])
    parts = [tmp_path / "out" / f"{part}.jsonl" for part in ("train", "val", "test")]
    return code, [row for part in parts if part.exists() for row in read_rows(part)]


def columns(*traces):
    """Return tokens, correctness, cuts and forced budgets of (tokens, correct[, cut[, budget]]) tuples."""
    filled = [(*trace, *(0, 0)[len(trace) - 2 :]) for trace in traces]
    return tuple(np.array(column) for column in zip(*filled, strict=True))


@pytest.mark.parametrize(("policy", "budget"), [
    ("shortest-correct", 100), ("median-correct", 250), ("quantile:0.9", 400), ("quantile:0.5", 200),
    ("curve:0.95", 400), ("curve:0.75", 300), ("curve:0.7", 300), ("median-all", 300)])
def test_a_policy_makes_this_budget_of_these_lengths(prepare, policy, budget):
    traces = columns((300, 1), (100, 1), (900, 0), (200, 1), (400, 1), (1000, 0, 1), (50, 0))
    found = prepare.label_of(policy, *traces)
    assert (found.budget, found.censored, found.solved, found.kind) == (budget, False, True, policy)


def test_a_query_that_no_trace_solved_has_a_lower_bound(prepare):
    found = prepare.label_of("median-correct", *columns((300, 0), (700, 0), (500, -1)))
    assert (found.budget, found.censored, found.solved, found.kind) == (700, True, False, "unsolved")


def test_what_cannot_be_verified_is_not_wrong(prepare):
    found = prepare.label_of("shortest-correct", *columns((300, -1), (700, -1), (500, -1)))
    assert (found.budget, found.censored, found.solved, found.kind) == (500, False, None, "median-all")


def test_a_trace_that_hit_its_cap_is_never_a_length(prepare):
    found = prepare.label_of("median-correct", *columns((300, 1), (1000, 1, 1)))
    assert (found.budget, found.kind) == (300, "median-correct")
    found = prepare.label_of("median-correct", *columns((1000, 1, 1), (1000, 1, 1)))
    assert (found.budget, found.censored, found.solved, found.kind) == (1000, True, True, "all cut")
    found = prepare.label_of("median-all", *columns((300, 1), (800, 0, 1), (1000, 1)))
    assert (found.budget, found.censored) == (1000, False)  # the cut one is longer than every length seen
    found = prepare.label_of("median-all", *columns((300, 1), (1000, 0, 1), (1000, 0, 1)))
    assert (found.budget, found.censored) == (1000, True)


def test_forced_budgets_make_a_curve(prepare):
    forced = [(budget, right, 0, budget) for budget, outcomes in
              ((256, (0, 0, 0, 1)), (512, (1, 1, 0, 1)), (1024, (1, 1, 1, 1))) for right in outcomes]
    assert prepare.label_of("curve:0.95", *columns(*forced)).budget == 1024
    assert prepare.label_of("curve:0.7", *columns(*forced)).budget == 512
    assert prepare.label_of("curve:0.2", *columns(*forced)).budget == 256


@pytest.mark.parametrize("policy", ["fastest", "quantile:", "quantile:0", "quantile:1.5", "curve:x", "median-all:1"])
def test_a_policy_that_cannot_be_followed_is_refused(prepare, tmp_path, capsys, policy):
    assert label(prepare, tmp_path, make_traces(30), "--policy", policy)[0] == 2
    assert f"--policy {policy}: expected shortest-correct" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "gold", "right"), [
    ("The answer is 4.", "4", True), ("So 1,234.0", 1234, True), ("it is 5", "4", False), ("I do not know", "4", None),
    (r"thus $\boxed{3/4}$", "0.75", True), (r"\boxed{\frac{3}{4}}", r"\frac{3}{4}", True),
    ("The answer is (B)", "B", True), ("Answer: c", "B", False), ("none of them", "B", None),
    ("eat", "tea", None), ("35", "3,5", None), ("1e3", "1000", True), ("5 apples", "5", True),
    ("x = 3 or 5", "5", None), ("12345678901234567891", "12345678901234567890", False), ("Yes, it is.", "yes", True),
    ("No.", "yes", False), ("\u22125", "-5", True), (".5", "0.5", True), ("5", ".5", False), ("D, not A", "D", None),
    ("50", "50%", None), ("10:30 AM", "10:30", None), ("1 million", "1000000", None), ("- 5", "-5", True),
    ("It is a cat", "A", None), ("I think it is B", "B", True), ("B) a cat", "B", True), ("c", "C", True),
    ("The answer is I am sure", "I", None), ("(d) because a is wrong", "D", True),
    ("<think>the answer is 7</think>The answer is 8", "8", True), ("Paris", "paris", True), ("Lyon", "Paris", None),
    ("", "4", None), (None, "4", None), (["4"], "4", None), ("4", None, None), ("50%", "0.5", True)])
def test_an_answer_is_right_wrong_or_cannot_be_told(prepare, given, gold, right):
    if right is None and isinstance(given, str) and gold == "Paris" and importlib.util.find_spec("math_verify"):
        right = False if prepare.verify(given, gold) is False else None
    assert prepare.verify(given, gold) is right


def test_math_verify_sees_through_notation(prepare):
    pytest.importorskip("math_verify")
    assert prepare.verify(r"so it is $\boxed{\frac{2}{4}}$", r"\frac{1}{2}") is True
    assert prepare.verify(r"so it is $\boxed{x^2 + 2x + 1}$", "(x+1)^2") is True
    assert prepare.verify(r"so it is $\boxed{x^2 + 2x + 2}$", "(x+1)^2") is None  # its letters may be units
    assert prepare.verify(r"so it is $\boxed{\frac{1}{3}}$", r"\frac{1}{2}") is False


def test_labels_rows_and_card(prepare, tmp_path, capsys):
    traces = make_traces(60)
    traces[0]["query"] = traces[1]["query"] = traces[2]["query"] = traces[3]["query"] = "What is new?"
    code, rows = label(prepare, tmp_path, traces, "--policy", "median-correct")
    assert code == 0
    assert len(rows) == len({row["query"] for row in rows}) == 60
    for row in rows:
        mine = [trace for trace in traces if trace["query"] == row["query"]]
        right = [trace["tokens"] for trace in mine if trace["correct"]]
        assert row["optimal_budget"] == round(np.median(right) if right else max(each["tokens"] for each in mine))
        assert row["censored"] is not row["solved"] is bool(right)
        assert (row["n_traces"], row["model"], row["domain"]) == (4, "m", mine[0]["domain"])
    list(train_sft_l4.usable_rows(str(tmp_path / "out/train.jsonl"), True, "error", pytest.fail))
    card = json.loads((tmp_path / "out/data_card.json").read_text())
    assert card["all"]["rows"] == sum(card["splits"][name]["rows"] for name in ("train", "val", "test")) == 60
    assert card["all"]["solved_rate"] == np.mean([row["solved"] for row in rows])
    text = (tmp_path / "out/data_card.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "| all | 60 |" in text


@pytest.mark.parametrize(("unsolved", "n_rows", "censored"), [("censor", 20, True), ("drop", 15, None),
                                                             ("median", 20, False)])
def test_unsolved_queries_are_treated_as_asked(prepare, tmp_path, unsolved, n_rows, censored):
    traces = make_traces(20)
    for trace in traces:
        trace["correct"] = int(trace["query"].split()[-1]) >= 5
    code, rows = label(prepare, tmp_path, traces, "--unsolved", unsolved)
    assert (code, len(rows)) == (0, n_rows)
    assert {row["censored"] for row in rows if not row["solved"]} == (set() if censored is None else {censored})


def test_the_noise_is_what_holding_out_each_trace_shows(prepare, tmp_path):
    lengths = {f"query number {i}": [100 * i, 110 * i, 150 * i] for i in range(1, 31)}
    traces = [{"query": query, "tokens": n, "correct": True} for query, each in lengths.items() for n in each]
    assert label(prepare, tmp_path, traces)[0] == 0
    noise = json.loads((tmp_path / "out/data_card.json").read_text())["noise"]
    # The median of the others: 130 for 100, 125 for 110, 105 for 150.
    assert noise["noise_floor"]["fresh_runs"] == 90
    assert noise["noise_floor"]["mae"] == pytest.approx((30 + 15 + 45) / 3 * np.mean(range(1, 31)))
    assert noise["noise_floor"]["mape"] == pytest.approx((30 / 100 + 15 / 110 + 45 / 150) / 3)
    rates = {policy: each["underrun_rate"] for policy, each in noise["fresh_run"].items()}
    # The shortest of the others is 110, 100, 100; their longest 150, 150, 110.
    assert rates == pytest.approx({"shortest-correct": 2 / 3, "median-correct": 1 / 3, "quantile:0.9": 1 / 3,
                                   "curve:0.95": 1 / 3, "median-all": 1 / 3})
    assert noise["fresh_run"]["shortest-correct"]["mae"] == pytest.approx((10 + 10 + 50) / 3 * np.mean(range(1, 31)))
    assert noise["fresh_run"]["shortest-correct"]["mean_budget"] == pytest.approx(310 / 3 * np.mean(range(1, 31)))


def test_every_format_gives_the_same_rows(prepare, tmp_path):
    traces = make_traces(30)
    expected = label(prepare, tmp_path, traces)[1]
    with gzip.open(tmp_path / "traces.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(trace) + "\n" for trace in traces)
    with (tmp_path / "renamed.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ask", "who", "domain", "n", "ok"])
        writer.writerows(list(trace.values()) for trace in traces)
    renamed = ("--query-column", "ask", "--model-column", "who", "--tokens-column", "n", "--correct-column", "ok")
    assert label(prepare, tmp_path, None, name="traces.jsonl.gz") == (0, expected)
    assert label(prepare, tmp_path, None, *renamed, name="renamed.csv") == (0, expected)
    arrow = pytest.importorskip("pyarrow")
    table = arrow.Table.from_pylist(traces)
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "traces.parquet")
    assert label(prepare, tmp_path, None, name="traces.parquet") == (0, expected)


def test_a_dataset_on_disk_with_several_generations_a_row(prepare, tmp_path, llama):
    arrow = pytest.importorskip("pyarrow")
    records = [{"problem": f"Problem {i} of apples and rivers", "answer": "4", "problem_type": "Algebra",
                "generations": ["<think>" + "a b " * (i + k) + "</think>The answer is 4" for k in range(3)],
                "correctness_math_verify": [True, False, True], "is_reasoning_complete": [True, True, i % 5 > 0]}
               for i in range(1, 41)]
    folder = tmp_path / "dataset" / "train"
    folder.mkdir(parents=True)
    table = arrow.Table.from_pylist(records)
    with arrow.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as sink, \
            arrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    code, rows = label(prepare, tmp_path, None, "--tokenizer", llama, name="dataset")
    assert (code, len(rows)) == (0, 40)
    count = prepare.make_counter(llama)
    for row in rows:
        i = int(row["query"].split()[1])
        lengths = [count("<think>" + "a b " * (i + k)) for k in ((0, 2) if i % 5 else (0,))]
        assert row["optimal_budget"] == round(np.median(lengths))
        assert (row["domain"], row["n_traces"], row["solved"]) == ("Algebra", 3, True)


def changed(number: int, **values):
    traces = make_traces(30)
    traces[number] |= values
    return traces


@pytest.mark.parametrize(("traces", "flags", "message"), [
    (changed(7, tokens=-3), (), "traces.jsonl:8: tokens must be a number above 0"),
    (changed(7, tokens=None), (), "traces.jsonl:8: tokens must be a number above 0 and at most 10,000,000, got null"),
    (changed(7, tokens=True), (), "traces.jsonl:8: tokens must be a number above 0"),
    (changed(7, tokens=10**400), (), "traces.jsonl:8: tokens must be a number above 0"),
    (changed(7, query=5), (), "traces.jsonl:8: query must be a non-empty string, got 5"),
    (changed(7, correct="maybe"), (), 'traces.jsonl:8: correct must be true or false, got "maybe"'),
    ([*make_traces(30), "{"], (), "traces.jsonl:121: not JSON"),
    ([*make_traces(30), "[1]"], (), "traces.jsonl:121: expected an object, got [1]"),
    ([*make_traces(30), b"\xff\xfe"], (), "what follows is not UTF-8"),
    ([*make_traces(30), *make_traces(5, model="other")], (), "pick one with --model: m (120 traces), other (20"),
    (make_traces(30), ("--model", "x"), "no traces of 'x'; there are m"),
    (make_traces(30), ("--level", "high"), "no usable traces in"),
    (make_traces(30), ("--tokens-column", "n"), "no column 'n' (--tokens-column); there are query, model, domain"),
    ([{"q": "a", "tokens": 3}], (), "no column with the query; name it with --query-column. There are q, tokens"),
    ([{"query": "a", "n": 3}], (), "no column with the reasoning tokens; name it with --tokens-column"),
    ([{"query": "a", "text": "b"}], (), "count those of the text with --tokenizer"),
    ([{"query": "a", "tokens": [3, 4], "correct": [True]}], (), "correct has 1 entries, 2 were expected"),
    (make_traces(2), (), "too few: val, test would be empty"),
    ([], (), "no usable traces in"),
])
def test_bad_input_is_named_and_nothing_is_written(prepare, tmp_path, capsys, traces, flags, message):
    assert label(prepare, tmp_path, traces, *flags) == (2, [])
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*"))


def test_a_truncated_gzip_is_named(prepare, tmp_path, capsys):
    with gzip.open(tmp_path / "whole.gz", "wt") as file:
        file.writelines(json.dumps(trace) + "\n" for trace in make_traces(300))
    (tmp_path / "traces.jsonl.gz").write_bytes((tmp_path / "whole.gz").read_bytes()[:-200])
    assert label(prepare, tmp_path, None, name="traces.jsonl.gz")[0] == 2
    assert "the compressed file ends after it, in the middle" in capsys.readouterr().err


def test_bad_traces_are_skipped_and_counted_where_asked(prepare, tmp_path):
    code, rows = label(prepare, tmp_path, [*changed(7, tokens=-3), "{"], "--on-bad-row", "skip")
    assert (code, len(rows)) == (0, 30)
    assert "2 unusable traces skipped, the first: " in (tmp_path / "out/data_card.md").read_text()


def test_one_models_traces_are_taken(prepare, tmp_path):
    _, rows = label(prepare, tmp_path, [*make_traces(30), *make_traces(30, seed=9, model="other")], "--model", "other")
    assert len(rows) == 30
    assert {row["model"] for row in rows} == {"other"}


def test_re_phrasings_and_near_duplicates_stay_together_and_templates_do_not(prepare):
    long = "a farmer has three fields and wants to know how many fences he needs for all of them if each has four sides"
    queries = [long, long.upper() + "!", "Please: " + long, long + " and one gate",
               "Add 3 and 4, then say it aloud to me", "Add 5 and 9, then say it aloud to me",
               "Something else entirely, of no relation"]
    groups, n_near = prepare.group_rows([{"query": query} for query in queries], 0.8)
    assert groups == [0, 0, 0, 0, 4, 5, 6]
    assert n_near == 2
    assert prepare.group_rows([{"query": query} for query in queries], 0)[0] == [0, 0, 2, 3, 4, 5, 6]
    named = [{"query": query, "group": "g" if i in (0, 5) else None} for i, query in enumerate(queries)]
    assert prepare.group_rows(named, 0)[0] == [0, 0, 2, 3, 4, 0, 6]


def make_labelled(n_rows: int) -> list[dict]:
    rng = random.Random(3)
    return [{"query": f"{rng.random()} {rng.random()}", "optimal_budget": round(rng.lognormvariate(6, 1)) + 1,
             "domain": rng.choice(["maths", "maths", "code"]), "group": f"g{i // 2}"} for i in range(n_rows)]


def test_a_split_is_by_group_stratified_and_the_same_everywhere(prepare, tmp_path):
    rows = make_labelled(1000)
    parts = {}
    for name, order in (("a", rows), ("b", random.Random(1).sample(rows, len(rows)))):
        path = write_rows(tmp_path / f"{name}.jsonl", order)
        assert prepare.main(["split", path, "--output", str(tmp_path / name), "--shares", "0.7,0.2,0.1"]) == 0
        parts[name] = [read_rows(tmp_path / name / f"{part}.jsonl") for part in ("train", "val", "test")]
    train, val, test = parts["a"]
    assert [len(train), len(val), len(test)] == pytest.approx([700, 200, 100], abs=3)
    for one, other in zip(parts["a"], parts["b"], strict=True):
        assert {row["query"] for row in one} == {row["query"] for row in other}
    groups = [{row["group"] for row in part} for part in parts["a"]]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    for part in (train, val, test):
        assert Counter(row["domain"] for row in part)["maths"] / len(part) == pytest.approx(2 / 3, abs=0.08)
        assert np.median([row["optimal_budget"] for row in part]) == pytest.approx(
            np.median([row["optimal_budget"] for row in rows]), rel=0.15)


def test_queries_of_an_existing_test_file_are_left_out(prepare, tmp_path):
    rows = make_labelled(100)
    known = write_rows(tmp_path / "known.jsonl", [{"query": rows[8]["query"] + " !"}, {"query": "unrelated"}])
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert prepare.main(["split", path, "--output", str(tmp_path / "out"), "--exclude", known]) == 0
    left = {row["query"] for part in ("train", "val", "test") for row in read_rows(tmp_path / "out" / f"{part}.jsonl")}
    assert left == {row["query"] for row in rows} - {rows[8]["query"], rows[9]["query"]}  # its group goes with it


# --- collecting, from a real server ---


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address and the model of `transformers serve` with a tiny random chat model."""
    for package in ("openai", "fastapi", "uvicorn", "requests"):
        pytest.importorskip(package)
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("chat")
    tokenizer = save_tokenizer(folder, "<s>", "</s>", "<pad>", "<s> $A")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %} Answer: "
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )).save_pretrained(folder)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.kill()
        process.wait()


QUESTIONS = [{"query": f"What is {i} + {i}?", "answer": 2 * i, "domain": "sums"} for i in range(6)]


def sample(server, folder: Path, *flags, **options) -> subprocess.CompletedProcess:
    endpoint, model = server
    write_rows(folder / "questions.jsonl", QUESTIONS)
    return run_command("sample", "questions.jsonl", "--endpoint", endpoint, "--model", model, "--output",
                       "traces.jsonl", "--max-tokens", "8", "--samples", "3", "--concurrency", "2", *flags,
                       cwd=folder, program=(sys.executable, SCRIPT), **options)


def test_traces_are_collected_from_a_server_and_labelled(server, tmp_path, prepare):
    process = sample(server, tmp_path, env=os.environ | {"OPENAI_API_KEY": "sk-secret"})
    assert process.returncode == 0, process.stderr
    traces = read_rows(tmp_path / "traces.jsonl")
    assert Counter(trace["query"] for trace in traces) == {question["query"]: 3 for question in QUESTIONS}
    for trace in traces:
        assert 0 < trace["tokens"] <= 8
        assert trace["finish_reason"] in ("length", "stop")
        assert (trace["model"], trace["temperature"], trace["max_tokens"]) == (server[1], 0.6, 8)
        assert trace["seed"] == trace["sample"]
    assert "sk-secret" not in (tmp_path / "traces.jsonl").read_text() + process.stdout + process.stderr
    again = sample(server, tmp_path)
    assert "Nothing to do: traces.jsonl has all 18 traces" in again.stdout
    assert read_rows(tmp_path / "traces.jsonl") == traces
    arguments = ["label", str(tmp_path / "traces.jsonl"), "--output", str(tmp_path), "--shares", "0.5,0.25,0.25"]
    assert prepare.main(arguments) == 0
    assert "18 traces of" in (tmp_path / "data_card.md").read_text()


def test_a_killed_collection_goes_on_without_asking_twice(server, tmp_path):
    sample(server, tmp_path, "--samples", "1")
    path = tmp_path / "traces.jsonl"
    first = path.read_bytes()
    path.write_bytes(first + b'{"query": "What is 0 + 0?", "sam')  # a kill in the middle of a line
    process = sample(server, tmp_path)
    assert process.returncode == 0, process.stderr
    assert path.read_bytes().startswith(first)
    assert sorted((trace["query"], trace["sample"]) for trace in read_rows(path)) == sorted(
        (question["query"], number) for question in QUESTIONS for number in range(3))


def test_other_settings_do_not_go_on_with_a_file(server, tmp_path):
    sample(server, tmp_path, "--samples", "1")
    process = sample(server, tmp_path, "--temperature", "0.9")
    assert process.returncode == 2
    assert "traces.jsonl was collected with temperature 0.6, not 0.9: choose another --output" in process.stderr


def test_a_file_of_something_else_is_not_added_to(server, tmp_path):
    write_rows(tmp_path / "traces.jsonl", [{"query": "a", "tokens": 3}])
    process = sample(server, tmp_path)
    assert process.returncode == 2
    assert "traces.jsonl:1 is not a trace of this program: choose another --output" in process.stderr


def test_an_endpoint_that_is_gone_ends_with_what_was_paid_for(server, tmp_path):
    sample(server, tmp_path, "--samples", "1")
    before = (tmp_path / "traces.jsonl").read_bytes()
    process = sample(("http://127.0.0.1:9/v1", server[1]), tmp_path, "--retries", "0")
    assert process.returncode == 2
    assert "no answer from http://127.0.0.1:9/v1" in process.stderr
    assert "the same command goes on from there" in process.stderr
    assert (tmp_path / "traces.jsonl").read_bytes() == before


def test_tokens_are_counted_with_the_models_own_tokenizer(server, tmp_path, prepare):
    process = sample(server, tmp_path, "--samples", "1", "--tokenizer", server[1])
    assert process.returncode == 0, process.stderr
    count = prepare.make_counter(server[1])
    for trace in read_rows(tmp_path / "traces.jsonl"):
        assert (trace["tokens"], trace["tokens_kind"]) == (count(trace["text"]), "tokenizer")


def test_the_servers_own_count_comes_first(prepare):
    from types import SimpleNamespace as Usage

    usage = Usage(completion_tokens=90, completion_tokens_details=Usage(reasoning_tokens=70))
    assert prepare.reasoning_tokens(usage, "", "text", len) == (70, "reasoning_tokens")
    assert prepare.reasoning_tokens(Usage(completion_tokens=90), "abc", "text", len) == (3, "tokenizer")
    assert prepare.reasoning_tokens(Usage(completion_tokens=90), "", "ab</think>cd", len) == (2, "tokenizer")
    assert prepare.reasoning_tokens(Usage(completion_tokens=90), "", "text", None) == (90, "completion_tokens")


class Proxy(http.server.BaseHTTPRequestHandler):
    """Stands between the client and the real server, and answers for it where a fault is wanted."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(json.loads(body))
        fault = self.server.faults.pop(0) if self.server.faults else None
        if fault == "hang up":
            self.connection.close()
            return
        status, reply = fault or 200, b'{"error": {"message": "later"}}'
        if not fault:
            address = self.server.target + self.path.removeprefix("/v1")
            request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request) as answer:
                reply = answer.read()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        pass


@pytest.fixture
def faulty(server):
    """The real server behind a proxy: its address with the model, and the proxy."""
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    proxy.target, proxy.faults, proxy.requests = server[0], [], []
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield (f"http://127.0.0.1:{proxy.server_port}/v1", server[1]), proxy
    proxy.shutdown()
    proxy.server_close()


def test_a_busy_server_is_asked_again(faulty, tmp_path):
    address, proxy = faulty
    proxy.faults = [429, 503, "hang up", 500]
    process = sample(address, tmp_path, "--samples", "1")
    assert process.returncode == 0, process.stderr
    assert len(read_rows(tmp_path / "traces.jsonl")) == 6
    assert len(proxy.requests) == 10


def test_an_endpoint_that_dies_midway_loses_nothing(faulty, tmp_path):
    address, proxy = faulty
    proxy.faults = [None] * 4 + [500] * 50
    process = sample(address, tmp_path, "--samples", "1", "--retries", "1", "--concurrency", "1")
    assert process.returncode == 2
    assert "the same command goes on from there" in process.stderr
    first = read_rows(tmp_path / "traces.jsonl")
    assert len(first) == 4
    proxy.faults, asked = [], len(proxy.requests)
    assert sample(address, tmp_path, "--samples", "1").returncode == 0
    assert len(proxy.requests) - asked == 2  # only what was missing
    assert read_rows(tmp_path / "traces.jsonl")[:4] == first


def test_a_wrong_key_is_named(faulty, tmp_path):
    address, proxy = faulty
    proxy.faults = [401] * 50
    process = sample(address, tmp_path)
    assert process.returncode == 2
    assert "refuses the key in OPENAI_API_KEY: set it in the environment" in process.stderr


def test_a_request_that_is_refused_is_counted_and_the_others_go_on(faulty, tmp_path):
    address, proxy = faulty
    proxy.faults = [400]
    process = sample(address, tmp_path, "--samples", "1")
    assert process.returncode == 0
    assert "5 traces; 1 refused" in process.stdout
    assert "refused: " in process.stderr
    assert len(read_rows(tmp_path / "traces.jsonl")) == 5


def test_forced_budgets_are_sent_in_the_servers_field_and_recorded(faulty, tmp_path, prepare):
    address, proxy = faulty
    process = sample(address, tmp_path, "--samples", "1", "--budgets", "4,8", "--budget-field",
                     "chat_template_kwargs.thinking_budget")
    assert process.returncode == 0, process.stderr
    sent = Counter(request["chat_template_kwargs"]["thinking_budget"] for request in proxy.requests)
    assert sent == {4: 6, 8: 6}
    assert Counter(trace["budget"] for trace in read_rows(tmp_path / "traces.jsonl")) == sent


def test_an_interrupted_collection_keeps_its_traces(faulty, tmp_path):
    address, _ = faulty
    write_rows(tmp_path / "questions.jsonl", [{"query": f"Number {i}"} for i in range(500)])
    command = [sys.executable, SCRIPT, "sample", "questions.jsonl", "--endpoint", address[0], "--model", address[1],
               "--output", "traces.jsonl", "--max-tokens", "8"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path = tmp_path / "traces.jsonl"
    deadline = time.monotonic() + 60
    while (not path.exists() or path.stat().st_size < 2000) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert len(read_rows(path)) >= 3


@pytest.mark.parametrize("line", ['{"query": "a", "optimal_budget": ' + "9" * 400 + "}", '{"query": "a"}', "{", "[1]",
                                  "[" * 5000, '{"query": "a", "optimal_budget": "x"}'])
def test_a_bad_row_to_split_is_named(prepare, tmp_path, capsys, line):
    path = write_rows(tmp_path / "rows.jsonl", [*make_labelled(40), line])
    assert prepare.main(["split", path, "--output", str(tmp_path / "out")]) == 2
    assert "rows.jsonl:41: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_when_everything_is_excluded(prepare, tmp_path, capsys):
    path = write_rows(tmp_path / "rows.jsonl", make_labelled(40))
    assert prepare.main(["split", path, "--output", str(tmp_path / "out"), "--exclude", path]) == 2
    assert "no query is left" in capsys.readouterr().err


def test_odd_values_beside_the_labels_do_no_harm(tmp_path):
    rows = [row | {"domain": "caf\u00e9 \ud800", "n_traces": (None, "3", 2)[i % 3]} for i, row in
            enumerate(make_labelled(60))]
    write_rows(tmp_path / "rows.jsonl", rows)
    process = run_command("split", "rows.jsonl", "--output", "out", cwd=tmp_path, program=(sys.executable, SCRIPT),
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert process.returncode == 0, process.stderr
    assert "| caf\\xe9 \\ud800 | 60 |" in process.stdout


def test_a_parquet_of_timestamps_and_bytes_is_split_or_refused(prepare, tmp_path, capsys):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    import datetime

    rows = [row | {"when": datetime.datetime(2026, 1, 1)} for row in make_labelled(40)]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert prepare.main(["split", str(tmp_path / "rows.parquet"), "--output", str(tmp_path / "out")]) == 0
    parquet.write_table(arrow.Table.from_pylist([{"query": b"a", "optimal_budget": 3}]), tmp_path / "bytes.parquet")
    assert prepare.main(["split", str(tmp_path / "bytes.parquet"), "--output", str(tmp_path / "no")]) == 2
    assert "query must be a non-empty string" in capsys.readouterr().err


def test_a_column_that_first_appears_later_is_read(prepare, tmp_path):
    traces = [{"query": f"What is {i} and {i}?", "tokens": 10 * i + k, "text": f"The answer is {2 * i}"}
              | ({"answer": 2 * i} if i > 1 else {}) for i in range(1, 31) for k in range(3)]
    _, rows = label(prepare, tmp_path, traces)
    assert Counter(row["solved"] for row in rows) == {True: 29, None: 1}
