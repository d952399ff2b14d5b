"""The embedded demo: the same rows everywhere, honest budgets, and a backbone that the script loads."""

import hashlib
import itertools
import json
import math
import re
import sys
from collections import deque

import pytest
from conftest import ROOT, read_rows, run_command

import train_sft_l4

SOURCE = (ROOT / "data/demo.py").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rows(demo) -> dict:
    return demo.make_rows()


def test_the_rows_are_those_recorded_at_the_foot_of_the_file(demo, rows):
    recorded = {name: (int(count), digest)
                for name, count, digest in re.findall(r"^# (\w+) +(\d+) +([0-9a-f]{64})$", SOURCE, re.MULTILINE)}
    assert recorded == {
        name: (len(each), hashlib.sha256(demo.to_jsonl(each)).hexdigest()) for name, each in rows.items()}
    assert set(recorded) == {"train", "val", "test"}


def test_there_are_enough_rows_of_enough_kinds(demo, rows):
    everything = list(itertools.chain(*rows.values()))
    assert len(everything) >= 6000
    assert len({row["family"] for row in everything}) == sum(map(len, demo.FAMILIES.values())) >= 15
    assert {row["domain"] for row in everything} == set(demo.FAMILIES)
    assert len(demo.FAMILIES) >= 3
    budgets = sorted(row["optimal_budget"] for row in everything)
    assert 0 < budgets[0] < 50
    assert budgets[-1] > 20_000
    low, middle, high, most = (budgets[(len(budgets) - 1) * percent // 100] for percent in (0, 50, 90, 100))
    assert f"\n# all {len(budgets)} rows: min {low}, median {middle}, p90 {high}, max {most} tokens\n" in SOURCE


def test_every_family_has_its_share_of_every_split(demo, rows):
    for split, count in demo.ROWS_PER_FAMILY.items():
        found = [row["family"] for row in rows[split]]
        assert {family: found.count(family) for family in set(found)} == dict.fromkeys(found, count)


def test_no_query_stands_in_two_splits_or_twice_in_one(rows):
    queries = [row["query"].strip() for each in rows.values() for row in each]
    assert len(set(queries)) == len(queries)


def test_the_budget_is_the_number_of_tokens_of_the_worked_solution(demo, rows):
    by_query = {row["query"]: row["optimal_budget"] for each in rows.values() for row in each}
    for families in demo.FAMILIES.values():
        for family in families:
            problem = demo.make_problem(family, 0)
            pieces = re.findall(demo.TOKEN_PATTERN, problem.solution)
            assert by_query[problem.query] == len(pieces)
            assert "".join(pieces) == problem.solution


def numbers(text: str) -> list[int]:
    return [int(each) for each in re.findall(r"\d+", text)]


def test_greatest_common_divisors_are_right(demo):
    for index in range(30):
        problem = demo.make_problem(demo.gcd, index)
        a, b = numbers(problem.query)[:2]
        answer, *bezout = [int(each) for each in re.findall(r"-?\d+", problem.answer)]
        assert answer == math.gcd(a, b)
        if bezout:
            assert a * bezout[0] + b * bezout[1] == answer


def test_factorizations_are_products_of_primes(demo):
    for index in range(30):
        problem = demo.make_problem(demo.factorization, index)
        factors = numbers(problem.answer)
        assert math.prod(factors) == numbers(problem.query)[0]
        assert all(factor % divisor for factor in factors for divisor in range(2, math.isqrt(factor) + 1))


def test_towers_of_hanoi_are_moved_by_the_rules_in_the_fewest_moves(demo):
    checked = 0
    for index in range(60):
        problem = demo.make_problem(demo.hanoi, index)
        start = tuple(max(re.findall(r"\b[ABC](?:, [ABC])*\b", problem.query), key=len).split(", "))
        if not 2 <= len(start) <= 6:
            continue
        state = list(start)
        for step in problem.steps:
            disk, source, target = re.fullmatch(r"Move disk (\d+) from peg ([ABC]) to peg ([ABC])\.", step).groups()
            assert state[int(disk) - 1] == source
            assert not {source, target} & set(state[: int(disk) - 1]), "a smaller disk is in the way"
            state[int(disk) - 1] = target
        assert len(set(state)) == 1
        assert problem.answer == f"{len(problem.steps)} moves"
        assert len(problem.steps) == fewest_moves(start, tuple(state))
        checked += 1
    assert checked >= 10


def fewest_moves(start: tuple[str, ...], goal: tuple[str, ...]) -> int:
    """Search breadth first."""
    distance, queue = {start: 0}, deque([start])
    while goal not in distance:
        state = queue.popleft()
        for disk, peg in itertools.product(range(len(state)), "ABC"):
            if state[disk] not in state[:disk] and peg not in state[: disk + 1]:
                following = (*state[:disk], peg, *state[disk + 1 :])
                if following not in distance:
                    distance[following] = distance[state] + 1
                    queue.append(following)
    return distance[goal]


def test_water_jugs_are_impossible_exactly_when_arithmetic_says_so(demo):
    found = set()
    for index in range(60):
        problem = demo.make_problem(demo.water_jugs, index)
        values = numbers(problem.query)
        p, q, target = values[:3]
        impossible = problem.answer == "it cannot be done"
        assert impossible == (target % math.gcd(p, q) != 0)
        found.add(impossible)
    assert found == {True, False}


def test_shortest_paths_are_the_shortest(demo):
    for index in range(30):
        problem = demo.make_problem(demo.shortest_path, index)
        roads = [(a, b, int(km)) for a, b, km in re.findall(r"([A-Z]\w+)-([A-Z]\w+) (\d+)", problem.query)]
        way, km = problem.answer.rsplit(", ", 1)
        way = way.split(" - ")
        lengths = {frozenset((a, b)): length for a, b, length in roads}
        assert sum(lengths[frozenset(pair)] for pair in itertools.pairwise(way)) == int(km.removesuffix(" km"))
        distance = {way[0]: 0}
        for _ in range(len(roads)):
            for a, b, length in [*roads, *((b, a, length) for a, b, length in roads)]:
                if a in distance:
                    distance[b] = min(distance.get(b, math.inf), distance[a] + length)
        assert distance[way[-1]] == int(km.removesuffix(" km"))


def test_bubble_sort_counts_the_inversions(demo):
    for index in range(30):
        problem = demo.make_problem(demo.bubble_sort, index)
        values = json.loads(re.search(r"\[.*\]", problem.query).group())
        *ordered, swaps = numbers(problem.answer)
        assert ordered == sorted(values)
        assert swaps == sum(a > b for a, b in itertools.combinations(values, 2))


def test_importing_the_demo_is_free():
    probe = ("import sys; sys.path.insert(0, 'data'); opened = []\n"
             "sys.addaudithook(lambda event, given: opened.append(given[0]) if event == 'open' and "
             "not str(given[0]).endswith(('.py', '.pyc')) else None)\n"
             "import demo; print(opened, sorted({'torch', 'transformers', 'tokenizers', 'numpy'} & set(sys.modules)))")
    process = run_command("-c", probe, cwd=ROOT, program=[sys.executable])
    assert (process.stdout, process.stderr) == ("[] []\n", "")


def test_the_demo_writes_rows_settings_and_a_backbone_that_the_script_takes(demo, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "make_rows", lambda: rows)
    monkeypatch.setattr(demo, "OUTPUT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    demo.main()
    out = capsys.readouterr().out
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {
        "train.jsonl", "val.jsonl", "test.jsonl", "config.json", "backbone/config.json", "backbone/model.safetensors",
        "backbone/tokenizer.json", "backbone/tokenizer_config.json"}
    for split, each in rows.items():
        assert read_rows(tmp_path / f"{split}.jsonl") == each
        assert hashlib.sha256((tmp_path / f"{split}.jsonl").read_bytes()).hexdigest() in out
    cfg = train_sft_l4.parse_train_arguments(["--config", str(tmp_path / "config.json")])
    assert cfg == train_sft_l4.CONFIG | demo.DEMO_CONFIG
    paths = {f"{split}_path": str(tmp_path / f"{split}.jsonl") for split in rows}
    train_sft_l4.load_splits(cfg | paths, say=pytest.fail)
    model = train_sft_l4.BudgetRegressionModel(cfg | {"model_name": str(tmp_path / "backbone")})
    model.set_target(419.0)
    assert model.predict([rows["test"][0]["query"]]) == pytest.approx([419.0], rel=1e-5)
