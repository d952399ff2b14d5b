"""The data: what is refused and how it is named, splits, encoding inside the template, micro-batches."""

import itertools
import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import make_rows, read_rows, write_rows
from transformers import AutoTokenizer

import train_sft_l4
from train_sft_l4 import PROMPT_TEMPLATE, Row, UserError, load_splits, usable_rows

GOOD = {"query": "Solve 2x + 5 = 13", "optimal_budget": 512}


def read(path, on_bad_row="error", labelled=True) -> tuple[list[Row], list[str]]:
    """Return the rows of a file, and what was said meanwhile."""
    said = []
    return list(usable_rows(str(path), labelled, on_bad_row, said.append)), said


def refusal(path, **options) -> str:
    with pytest.raises(UserError) as refused:
        read(path, **options)
    return str(refused.value)


BAD_LINES = {
    b'{"query": "", "optimal_budget": 1}': 'query must be a non-empty string, got ""',
    b'{"query": " \\n\\t ", "optimal_budget": 1}': 'query must be a non-empty string, got " \\n\\t "',
    b'{"optimal_budget": 1}': "query must be a non-empty string, got null",
    b'{"query": 5, "optimal_budget": 1}': "query must be a non-empty string, got 5",
    b'{"query": ["a"], "optimal_budget": 1}': 'query must be a non-empty string, got ["a"]',
    b'{"query": "a"}': "optimal_budget must be a finite number > 0, got null",
    b'{"query": "a", "optimal_budget": null}': "optimal_budget must be a finite number > 0, got null",
    b'{"query": "a", "optimal_budget": "12k"}': 'optimal_budget must be a finite number > 0, got "12k"',
    b'{"query": "a", "optimal_budget": "512"}': 'optimal_budget must be a finite number > 0, got "512"',
    b'{"query": "a", "optimal_budget": 0}': "optimal_budget must be a finite number > 0, got 0",
    b'{"query": "a", "optimal_budget": -3.5}': "optimal_budget must be a finite number > 0, got -3.5",
    b'{"query": "a", "optimal_budget": NaN}': "optimal_budget must be a finite number > 0, got NaN",
    b'{"query": "a", "optimal_budget": Infinity}': "optimal_budget must be a finite number > 0, got Infinity",
    b'{"query": "a", "optimal_budget": 1e999}': "optimal_budget must be a finite number > 0, got Infinity",
    b'{"query": "a", "optimal_budget": true}': "optimal_budget must be a finite number > 0, got true",
    b'{"query": "a", "optimal_budget": [5]}': "optimal_budget must be a finite number > 0, got [5]",
    b'{"query": "a", "budget": "12k"}': 'budget must be a finite number > 0, got "12k"',
    b'{"query": "a", "budget": 5, "optimal_budget": 0}': "optimal_budget must be a finite number > 0, got 0",
    b'{"query": "a", "optimal_budget": 1, "censored": 1}': "censored must be true or false, got 1",
    b'{"query": "a", "optimal_budget": 1, "censored": "yes"}': 'censored must be true or false, got "yes"',
    b'{"query": "a", "optimal_budget": 1, "censored": 0}': "censored must be true or false, got 0",
    b'{"query": "a", "optimal_budget": 1, "censored": ""}': 'censored must be true or false, got ""',
    b'"a"': 'expected a JSON object, got "a"',
    b"[1, 2]": "expected a JSON object, got [1, 2]",
    b"null": "expected a JSON object, got null",
    b'{"query": "\xff", "optimal_budget": 1}': "not UTF-8",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_row_is_named_with_its_place_and_what_it_holds(tmp_path, line):
    path = write_rows(tmp_path / "train.jsonl", [GOOD, line, GOOD])
    assert refusal(path) == (f"{path}: 1 bad rows (--on_bad_row skip drops them):\n"
                             f"  {path}:2: {BAD_LINES[line]}")


@pytest.mark.parametrize("line", [b'{"query": "a", "optimal_budget": 1', b"query,budget", b"{'query': 'a'}",
                                  b"[" * 9999, b'{"query": "a", "optimal_budget": ' + b"9" * 5000 + b"}"])
def test_a_row_that_is_not_json_is_named(tmp_path, line):
    path = write_rows(tmp_path / "train.jsonl", [line])
    assert f"\n  {path}:1: not JSON: " in refusal(path)


def test_budgets_beyond_any_model_are_refused(tmp_path):
    lines = [{"query": "a", "optimal_budget": 1e300}, b'{"query": "b", "optimal_budget": ' + b"9" * 400 + b"}"]
    path = write_rows(tmp_path / "train.jsonl", lines)
    message = refusal(path)
    assert ":1: optimal_budget must be" in message
    assert ":2: optimal_budget must be" in message


def test_twenty_bad_rows_are_named_and_all_are_counted(tmp_path):
    path = write_rows(tmp_path / "train.jsonl", [b"{}"] * 1234)
    lines = refusal(path).split("\n")
    assert lines[0] == f"{path}: 1,234 bad rows (--on_bad_row skip drops them):"
    assert [line.split(": ")[0] for line in lines[1:21]] == [f"  {path}:{number}" for number in range(1, 21)]
    assert lines[21:] == ["  ... and 1,214 more"]


def test_a_long_value_is_shortened(tmp_path):
    path = write_rows(tmp_path / "train.jsonl", [{"query": "a", "optimal_budget": "x" * 10**6}])
    assert refusal(path).endswith(f'got "{"x" * 56}...')


def test_skip_drops_bad_rows_and_says_how_many(tmp_path):
    path = write_rows(tmp_path / "train.jsonl", [b"{}", GOOD, b"[]", {**GOOD, "query": "other"}])
    rows, said = read(path, on_bad_row="skip")
    assert [row.query for row in rows] == ["Solve 2x + 5 = 13", "other"]
    assert said == [f"{path}: 2 bad rows skipped, the first: {path}:1: query must be a non-empty string, got null"]


def test_a_file_without_usable_rows_is_refused(tmp_path):
    assert refusal(write_rows(tmp_path / "empty.jsonl", [])) == f"{tmp_path}/empty.jsonl: no usable rows"
    assert refusal(write_rows(tmp_path / "blank.jsonl", [b"", b"  "])) == f"{tmp_path}/blank.jsonl: no usable rows"
    bad = write_rows(tmp_path / "bad.jsonl", [b"{}"])
    assert refusal(bad, on_bad_row="skip") == f"{bad}: no usable rows"


def test_a_missing_file_is_named(tmp_path):
    assert refusal(tmp_path / "no.jsonl") == f"cannot read {tmp_path}/no.jsonl: No such file or directory"
    assert refusal(tmp_path) == f"cannot read {tmp_path}: Is a directory"


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path):
    path = tmp_path / "train.jsonl"
    line = json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n   \n" + line)
    rows, said = read(path)
    assert [(row.query, row.budget, row.place) for row in rows] == [
        (GOOD["query"], 512.0, f"{path}:1"), (GOOD["query"], 512.0, f"{path}:4")]
    assert not said


def test_every_field_is_read_and_unknown_ones_are_kept(tmp_path):
    full = {"query": " a ", "budget": 7, "domain": "maths", "group": 12, "censored": True, "source": {"id": [1]}}
    rows, _ = read(write_rows(tmp_path / "train.jsonl", [full, GOOD, {**GOOD, "domain": None, "censored": None}]))
    path = f"{tmp_path}/train.jsonl"
    assert rows[0] == Row(" a ", 7.0, "maths", "12", True, full, f"{path}:1")
    assert rows[1] == Row(GOOD["query"], 512.0, "", GOOD["query"], False, GOOD, f"{path}:2")
    assert (rows[2].domain, rows[2].censored) == ("", False)


def test_without_labels_a_budget_is_not_asked_for(tmp_path):
    rows, _ = read(write_rows(tmp_path / "queries.jsonl", [{"query": "a"}, {"query": "b", "optimal_budget": "?"}]),
                   labelled=False)
    assert [row.query for row in rows] == ["a", "b"]
    assert np.isnan(rows[0].budget)


def splits_of(config, **overrides):
    said = []
    return load_splits(config | overrides, said.append), said


@pytest.mark.parametrize("name", ["val", "test"])
def test_a_leak_is_named_and_refused_unless_it_is_allowed(config, tmp_path, name):
    rows = make_rows(24, seed=9)
    known = read_rows(config["train_path"])[6]
    rows[3] = {**known, "query": f"  {known['query']}\n"}
    path = write_rows(tmp_path / "leak.jsonl", rows)
    with pytest.raises(UserError) as refused:
        splits_of(config, **{f"{name}_path": path})
    assert str(refused.value) == ("1 rows leak from the training set (remove them, or --allow_leakage):\n"
                                  f"  {path}:4: same query as {config['train_path']}:7")
    splits, _ = splits_of(config, **{f"{name}_path": path, "allow_leakage": True})
    assert len(splits["train"]) == 98
    assert len(splits[name]) == 24


def test_a_group_on_both_sides_is_a_leak(config, tmp_path):
    train = write_rows(tmp_path / "train.jsonl", [{**GOOD, "query": "a", "group": "g "}, {**GOOD, "query": "d\n"}])
    val = write_rows(tmp_path / "val.jsonl", [{**GOOD, "query": "b", "group": "g"}, {**GOOD, "query": "c"},
                                              {**GOOD, "query": "d"}])
    with pytest.raises(UserError, match=rf"2 rows leak .*\n  {val}:1: same group as {train}:1\n"
                                        rf"  {val}:3: same query as {train}:2$"):
        splits_of(config, train_path=train, val_path=val)


def test_every_leaking_row_counts_once_whatever_the_path_looks_like(config, tmp_path):
    folder = tmp_path / "data: new"
    folder.mkdir()
    rows = [{**GOOD, "query": f"query {number}"} for number in range(30)]
    train, val = write_rows(folder / "train.jsonl", rows), write_rows(folder / "val.jsonl", rows)
    with pytest.raises(UserError) as refused:
        splits_of(config, train_path=train, val_path=val)
    lines = str(refused.value).split("\n")
    assert lines[0].startswith("30 rows leak")
    assert lines[1] == f"  {val}:1: same query as {train}:1"
    assert lines[-1] == "  ... and 10 more"


def grouped_rows(count: int, per_group: int) -> list[Row]:
    rng = random.Random(0)
    return [Row(f"query {i}", rng.lognormvariate(6, 1.5), "", f"group {i // per_group}", False, {}, f"f:{i}")
            for i in range(count)]


def test_hold_out_keeps_groups_together_and_takes_its_share():
    rows = grouped_rows(3000, per_group=3)
    train, val = train_sft_l4.hold_out(rows, 0.1, seed=42)
    assert not {row.group for row in train} & {row.group for row in val}
    assert sorted(train + val, key=lambda row: int(row.place[2:])) == rows
    assert 0.09 < len(val) / len(rows) < 0.11


def test_hold_out_takes_the_same_share_of_every_decile():
    rows = grouped_rows(1000, per_group=1)
    _, val = train_sft_l4.hold_out(rows, 0.2, seed=42)
    deciles = dict(zip([row.place for row in rows], train_sft_l4.budget_deciles([row.budget for row in rows]),
                       strict=True))
    assert Counter(int(deciles[row.place]) for row in val) == dict.fromkeys(range(10), 20)


def test_hold_out_does_not_depend_on_the_order_of_the_file_and_does_on_the_seed():
    rows = grouped_rows(300, per_group=2)
    shuffled = random.Random(1).sample(rows, len(rows))
    first, second, other = (
        {row.place for row in train_sft_l4.hold_out(each, 0.1, seed)[1]}
        for each, seed in ((rows, 42), (shuffled, 42), (rows, 43)))
    assert first == second
    assert first != other


@pytest.mark.parametrize("count", [10, 20, 40, 55])
def test_hold_out_works_on_small_files(count):
    train, val = train_sft_l4.hold_out(grouped_rows(count, per_group=1), 0.1, seed=42)
    assert 1 <= len(val) <= max(1, count // 5)
    assert len(train) + len(val) == count


def test_hold_out_of_one_group_is_refused():
    with pytest.raises(UserError, match=r"cannot hold out 10% of 1 groups for validation: write a val_path file"):
        train_sft_l4.hold_out(grouped_rows(50, per_group=50), 0.1, seed=42)


def test_no_query_is_held_out_that_is_trained_on_under_another_group(config, tmp_path):
    rows = [{**GOOD, "query": f"query {number % 50}", "group": f"group {number}"} for number in range(200)]
    path = write_rows(tmp_path / "train.jsonl", rows)
    try:
        splits, _ = splits_of(config, train_path=path, val_path="", test_path="")
    except UserError as error:
        assert "leak" in str(error)
    else:
        assert not {row.query for row in splits["train"]} & {row.query for row in splits["val"]}


def test_without_a_validation_file_training_rows_are_held_out(config):
    splits, said = splits_of(config, val_path="", test_path="", val_fraction=0.2)
    assert set(splits) == {"train", "val"}
    assert len(splits["train"]) + len(splits["val"]) == 98
    assert 15 <= len(splits["val"]) <= 25
    assert len(said) == 1
    assert "holding out 20% of the training rows" in said[0]


def test_max_train_examples_draws_that_many_rows_by_seed(config):
    everything = splits_of(config)[0]["train"]
    chosen, again, other = (splits_of(config, max_train_examples=30, seed=seed)[0]["train"] for seed in (1, 1, 2))
    assert chosen == again
    assert chosen != other
    assert len(chosen) == 30
    places = [everything.index(row) for row in chosen]
    assert places == sorted(set(places))
    assert places != list(range(30))
    assert splits_of(config, max_train_examples=99)[0]["train"] == everything


def test_validation_rows_that_are_all_censored_are_refused(config, tmp_path):
    path = write_rows(tmp_path / "val.jsonl", [{**GOOD, "query": f"q{i}", "censored": True} for i in range(5)])
    with pytest.raises(UserError, match="every validation row is censored"):
        splits_of(config, val_path=path)


@pytest.fixture(scope="module", params=["llama", "bert"])
def tokenizer(request):
    return AutoTokenizer.from_pretrained(request.getfixturevalue(request.param))


def ends_of_the_template(tokenizer) -> tuple[list[int], list[int]]:
    """Return the token ids that stand before and after any query."""
    queries = ("@@@", "7 8", "Abc.", " %")
    encoded = [tokenizer(PROMPT_TEMPLATE.format(query=query))["input_ids"] for query in queries]
    start, end = ([column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns)]
                  for columns in (zip(*encoded, strict=False), zip(*map(reversed, encoded), strict=False)))
    return start, end[::-1]


@pytest.mark.parametrize("max_length", [32, 33, 64])
def test_a_long_query_loses_its_middle_and_never_the_template(tokenizer, max_length):
    before, after = ends_of_the_template(tokenizer)
    assert len(before) >= 2
    assert len(after) >= 4
    long, short = " ".join(map(str, range(500))), "7 8 9"
    (cut, whole), n_cut = train_sft_l4.encode(tokenizer, [long, short], max_length, PROMPT_TEMPLATE)
    full = tokenizer(PROMPT_TEMPLATE.format(query=long))["input_ids"]
    assert n_cut == 1
    assert len(cut) == max_length
    assert (cut[: len(before)], cut[-len(after) :]) == (before, after)
    middle = (max_length + 1) // 2
    assert cut == full[:middle] + full[len(full) - max_length + middle :]
    assert whole == tokenizer(PROMPT_TEMPLATE.format(query=short))["input_ids"]


def test_a_query_that_fits_exactly_is_not_cut(tokenizer):
    ids, n_cut = train_sft_l4.encode(tokenizer, ["7 8 9"], 512, PROMPT_TEMPLATE)
    assert train_sft_l4.encode(tokenizer, ["7 8 9"], len(ids[0]), PROMPT_TEMPLATE) == (ids, 0)
    assert n_cut == 0
    assert train_sft_l4.encode(tokenizer, ["7 8 9"], len(ids[0]) - 1, PROMPT_TEMPLATE)[1] == 1


def test_text_that_spells_a_special_token_stays_text(tokenizer):
    query = f"Print {tokenizer.eos_token} {tokenizer.bos_token} {tokenizer.pad_token} [SEP] </s> please"
    ids, _ = train_sft_l4.encode(tokenizer, [query, "Print"], 512, PROMPT_TEMPLATE)
    special = set(tokenizer.all_special_ids)
    assert special
    assert sum(each in special for each in ids[0]) == sum(each in special for each in ids[1]) <= 2
    assert query in tokenizer.decode(ids[0])


def test_the_beginning_of_text_token_is_there_once(llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    ids, _ = train_sft_l4.encode(tokenizer, ["a"], 512, PROMPT_TEMPLATE)
    assert ids[0][0] == tokenizer.bos_token_id
    assert ids[0].count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("query", ["{query} {0} {} {{x}}", "a\ud800b\udfff",
                                   "\x00\x07\x1b[31m\r\n\u2028", "\U0001f9ee e\u0301"])
def test_odd_characters_in_a_query_reach_the_tokens(tokenizer, query):
    ids, _ = train_sft_l4.encode(tokenizer, [query], 512, PROMPT_TEMPLATE)
    text = tokenizer.decode(ids[0], clean_up_tokenization_spaces=False)
    assert f"Query: {query.encode('utf-8', 'replace').decode()}\nReasoning tokens needed:" in text


def random_lengths(rng: random.Random) -> list[int]:
    return [rng.choice((rng.randrange(1, 20), rng.randrange(1, 700))) for _ in range(rng.randrange(1, 60))]


def test_a_padded_plan_holds_every_example_once_within_the_limit():
    rng = random.Random(5)
    for _ in range(300):
        lengths = random_lengths(rng)
        max_tokens = rng.choice((1, rng.randrange(1, 200), rng.randrange(200, 5000)))
        plan = train_sft_l4.plan_padded(lengths, max_tokens)
        assert sorted(index for members in plan for index in members) == list(range(len(lengths)))
        for members in plan:
            longest = max(lengths[index] for index in members)
            assert len(members) == 1 or longest * len(members) <= max_tokens
        in_order = [lengths[index] for members in plan for index in members]
        assert in_order == sorted(lengths, reverse=True)


def test_a_packed_plan_holds_every_example_once_within_the_limit_and_evenly():
    rng = random.Random(5)
    for _ in range(300):
        lengths = random_lengths(rng)
        max_tokens = rng.choice((1, rng.randrange(1, 200), rng.randrange(200, 5000)))
        plan = train_sft_l4.plan_packed(lengths, max_tokens)
        assert sorted(index for members in plan for index in members) == list(range(len(lengths)))
        tokens = [sum(lengths[index] for index in members) for members in plan]
        assert all(total <= max_tokens or len(members) == 1 for total, members in zip(tokens, plan, strict=True))
        if max(lengths) <= max_tokens:  # two that fit into one would have been one
            assert len(plan) <= max(1, 2 * sum(lengths) / max_tokens + 1)
        if max_tokens >= 2 * max(lengths):
            assert max(tokens) - min(tokens) <= max(lengths)


def test_a_plan_has_the_least_work_of_all_plans():
    rng = random.Random(6)
    for _ in range(60):
        lengths = sorted((rng.randrange(1, 60) for _ in range(rng.randrange(1, 9))), reverse=True)
        max_tokens, overhead = rng.randrange(60, 300), rng.choice((0, 16, 100))
        works = []
        for cuts in itertools.product((False, True), repeat=len(lengths) - 1):
            ends = [*(end for end, cut in enumerate(cuts, start=1) if cut), len(lengths)]
            begins = [0, *ends[:-1]]
            sizes = [(end - begin) * lengths[begin] for begin, end in zip(begins, ends, strict=True)]
            if max(sizes) <= max_tokens:
                works.append(sum(sizes) + overhead * len(sizes))
        plan = train_sft_l4.plan_padded(lengths, max_tokens, overhead)
        assert sum(len(members) * lengths[members[0]] + overhead for members in plan) == min(works)


def test_an_empty_plan_is_empty():
    assert train_sft_l4.plan_padded([], 100) == train_sft_l4.plan_packed([], 100) == []


def test_collate_pads_to_the_longest_on_the_right_or_packs():
    ids = [[5, 6, 7], [8], [9, 10]]
    assert train_sft_l4.collate(ids, packed=False).tolist() == [[5, 6, 7], [8, 0, 0], [9, 10, 0]]
    assert train_sft_l4.collate(ids, packed=True).tolist() == [[5, 6, 7, 8, 9, 10]]
    assert train_sft_l4.Packing.of([3, 1, 2], torch.device("cpu")).position_ids().tolist() == [[0, 1, 2, 0, 0, 1]]


def test_an_epochs_order_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    orders = {(seed, epoch): train_sft_l4.epoch_order(50, seed, epoch) for seed in (1, 2) for epoch in (0, 1)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len(set(map(tuple, orders.values()))) == 4
    assert orders[1, 1] == train_sft_l4.epoch_order(50, 1, 1)


def test_budget_deciles_are_tenths():
    deciles = train_sft_l4.budget_deciles(np.random.default_rng(0).permutation(np.arange(1.0, 1001.0)))
    assert Counter(deciles.tolist()) == dict.fromkeys(range(10), 100)
    assert train_sft_l4.budget_deciles([5.0] * 7).tolist() == [0] * 7


@pytest.mark.parametrize("balance_by", ["domain", "budget"])
def test_balanced_epochs_draw_every_class_as_often(balance_by):
    rows = [train_sft_l4.parse_row(json.dumps({
        "query": f"q{i}", "optimal_budget": 10 if i < 850 else 10 * i, "domain": "rare" if i % 20 == 0 else "common",
    }).encode(), "", True) for i in range(1000)]
    weights = train_sft_l4.sampling_weights(rows, balance_by)
    assert weights.sum() == pytest.approx(1)
    order = train_sft_l4.epoch_order(1000, 1, 0, weights)
    assert len(order) == 1000
    assert order == train_sft_l4.epoch_order(1000, 1, 0, weights) != train_sft_l4.epoch_order(1000, 1, 1, weights)
    if balance_by == "domain":
        assert Counter(rows[i].domain for i in order)["rare"] == pytest.approx(500, abs=60)
    else:  # one budget fills the lowest deciles: it is one class of three
        assert Counter(rows[i].budget for i in order)[10] == pytest.approx(333, abs=60)
    assert train_sft_l4.sampling_weights(rows, "none") is None
