#!/usr/bin/env python3
"""Make training rows from a reasoning model's traces: honest labels, groups that stay together, and the noise floor.

    python data/prepare.py sample questions.jsonl --endpoint http://127.0.0.1:8000/v1 --model MODEL --output traces.jsonl
    python data/prepare.py label traces.jsonl --model MODEL --policy median-correct --output data/
    python data/prepare.py split rows.jsonl --output data/

A *trace* is one answer of a reasoning model to one query: how many tokens it reasoned for, and whether it was right.
`sample` asks a model behind an OpenAI-compatible endpoint, several times a question. `label` turns all traces of a
query into one budget, by a policy that is written into every row; `split` divides rows that have their budgets, as
`label` does too. Both write train.jsonl, val.jsonl and test.jsonl, and data_card.md and .json, which say what the rows
are and how well any predictor could do on them.

Traces are JSONL or CSV (also .gz), Parquet, or a folder of a Hugging Face dataset: a line each, or several to a line as
lists. Exit codes: 0 done; 2 unusable arguments, data or endpoint; 130 interrupted; 1 a defect of this script.
"""  # noqa: E501

from __future__ import annotations

import argparse
import csv
import gzip
import io
import itertools
import json
import math
import os
import re
import sys
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train_sft_l4 import (
    LONGEST_BUDGET,
    UserError,
    atomic_file,
    budget_deciles,
    explain_loading,
    json_line,
    listing,
    show,
    stable_hash,
    write_json,
)

# ----------------------------------------------------------------------------------------------------------------------
# 1. Traces: one or several to a record, from any of four formats
# ----------------------------------------------------------------------------------------------------------------------

# What a column may be called where no flag names it; the first that a file has is taken.
COLUMNS: dict[str, tuple[str, ...]] = {
    "query": ("query", "problem", "question", "prompt"),
    "tokens": ("tokens", "reasoning_tokens", "thinking_tokens"),
    "text": ("text", "generations", "generation", "response"),  # counted with --tokenizer where there are no tokens
    "correct": ("correct", "correctness_math_verify", "is_correct"),
    "answer": ("answer", "expected_answer", "gold"),  # the right one, to verify the trace's with
    "given": ("given_answer", "final_answer", "output"),
    "finish": ("finish_reason", "finish_reasons"),
    "complete": ("is_reasoning_complete",),
    "cap": ("max_tokens", "cap"),
    "budget": ("budget", "thinking_budget"),  # that was forced on the trace
    "model": ("model",),
    "level": ("level", "effort"),
    "domain": ("domain", "problem_type", "subject", "source"),
    "group": ("group",),
}
END_OF_THINKING = ("</think>", "</thinking>", "<|end_of_thinking|>")


@dataclass
class Traces:
    """All traces of one model, by column: 5 million fit into a fraction of a gigabyte."""

    queries: list[str] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)  # empty = the query's own
    question: array[int] = field(default_factory=lambda: array("i"))  # place in `queries`, of each trace
    tokens: array[float] = field(default_factory=lambda: array("d"))
    correct: array[int] = field(default_factory=lambda: array("b"))  # 1 yes, 0 no, -1 cannot be told
    cut: array[int] = field(default_factory=lambda: array("b"))  # 1: it hit its cap, so it would have gone on
    budget: array[int] = field(default_factory=lambda: array("i"))  # that was forced on it; 0 = none
    models: Counter[str] = field(default_factory=Counter)
    levels: Counter[str] = field(default_factory=Counter)
    n_bad: int = 0
    first_bad: list[str] = field(default_factory=list)


@contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    """Open a text file, compressed or not."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as raw:
        yield io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")


def iter_jsonl(path: Path) -> Iterator[Any]:
    """Yield each line's content; a ValueError where it is not JSON, None where there is nothing."""
    with open_text(path) as lines:
        for line in lines:
            try:
                yield json.loads(line) if line.strip() else None
            except (ValueError, RecursionError) as error:
                yield ValueError(f"not JSON: {error}")


def iter_csv(path: Path) -> Iterator[Any]:
    """Yield each row as a dict of strings."""
    with open_text(path) as lines:
        yield from csv.DictReader(lines)


def iter_arrow(path: Path) -> Iterator[Any]:
    """Yield each row of a Parquet file, or of the Arrow stream that Hugging Face's datasets keep on disk."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} needs a package: pip install pyarrow") from None
    with pyarrow.memory_map(str(path)) as source:
        parquet = path.suffix == ".parquet"
        for batch in pyarrow.parquet.ParquetFile(source).iter_batches() if parquet else pyarrow.ipc.open_stream(source):
            yield from batch.to_pylist()


def iter_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place and the content of each record of a file or a dataset's folder.

    What cannot be parsed comes as a ValueError in the record's stead.
    """
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*.arrow") if not file.name.startswith("cache-"))  # datasets' own
        files = files or sorted(path.rglob("*.parquet"))
        if not files:
            raise UserError(f"{path}: no .arrow and no .parquet files in this folder")
    for file in files:
        kind = Path(file.name.removesuffix(".gz")).suffix
        reader = {".arrow": iter_arrow, ".parquet": iter_arrow, ".csv": iter_csv}.get(kind, iter_jsonl)
        first = 2 if reader is iter_csv else 1  # behind the header
        for number, record in enumerate(reader(file), start=first):
            if record is not None:
                yield f"{file}:{number}", record


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield what `iter_records` does; whatever goes wrong with the file is one message that names the place."""
    place = str(path)
    try:
        for place, record in iter_records(path):
            yield place, record
    except (EOFError, zlib.error):
        raise UserError(f"{place}: the compressed file ends after it, in the middle: copy it again") from None
    except UnicodeDecodeError:
        raise UserError(f"{place}: what follows is not UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (csv.Error, ValueError, OverflowError, NotImplementedError) as error:  # pyarrow's are among them
        raise UserError(f"{place}: cannot be read on: {str(error).splitlines()[0][:200]}") from None


def find_columns(record: Mapping[str, Any], given: Mapping[str, str], place: str) -> dict[str, str]:
    """Return which column of the file holds what.

    Raises:
        UserError: a column that a flag names, or one that is needed, is not there.
    """
    found, there = {}, ", ".join(map(str, record))
    for what, names in COLUMNS.items():
        if given.get(what):
            names = (given[what],)
            if names[0] not in record:
                raise UserError(f"{place}: no column {names[0]!r} (--{what}-column); there are {there}")
        name = next((name for name in names if name in record), None)
        if name:
            found[what] = name
    if "query" not in found:
        raise UserError(f"{place}: no column with the query; name it with --query-column. "
                        f"There are {there}")
    if not {"tokens", "text"} & set(found):
        raise UserError(f"{place}: no column with the reasoning tokens; name it with --tokens-column, or the trace's "
                        f"text with --text-column. There are {there}")
    return found


def as_flag(value: Any, what: str) -> bool | None:
    """Return a truth value, or None where there is none."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    text = str(value).lower()
    if text in ("true", "1", "1.0", "yes"):
        return True
    if text in ("false", "0", "0.0", "no"):
        return False
    raise ValueError(f"{what} must be true or false, got {show(value)}")


def as_number(value: Any, what: str) -> float:
    """Return a finite number above 0."""
    number = math.nan
    with suppress(TypeError, ValueError, OverflowError):
        number = float(value) if not isinstance(value, bool) else math.nan
    if not 0 < number <= LONGEST_BUDGET:
        raise ValueError(f"{what} must be a number above 0 and at most {LONGEST_BUDGET:,.0f}, got {show(value)}")
    return number


def reasoning_of(text: str) -> str:
    """Return the text up to the end-of-thinking marker; all of it where there is none.

    >>> reasoning_of("<think>1 + 1 is 2</think>2")
    '<think>1 + 1 is 2'
    """
    ends = [text.index(marker) for marker in END_OF_THINKING if marker in text]
    return text[: min(ends)] if ends else text


@dataclass
class Reader:
    """Turns records into traces."""

    columns: Mapping[str, str]  # by flags
    model: str  # the one whose traces are wanted; empty = the only one
    level: str
    count_tokens: Callable[[str], int] | None
    found: dict[str, str] = field(default_factory=dict)
    keys: dict[str, None] = field(default_factory=dict)  # all columns seen so far in a file, in their order
    places: dict[str, int] = field(default_factory=dict)  # of the queries

    def read(self, paths: Sequence[Path], skip: bool) -> Traces:
        """Return the traces of all files.

        Raises:
            UserError: a file cannot be read, it has unusable records that are not to be skipped, or several models.
        """
        traces = Traces()
        for path in paths:
            self.found, self.keys = {}, {}
            for place, record in read_records(path):
                try:
                    self.add(record, place, traces)
                except ValueError as error:
                    traces.n_bad += 1
                    traces.first_bad += [f"{place}: {error}"] if len(traces.first_bad) < 20 else []
        if traces.n_bad and not skip:
            raise UserError(f"{traces.n_bad:,} unusable traces (--on-bad-row skip drops them):\n"
                            f"{listing(traces.first_bad, traces.n_bad)}")
        if self.model and self.model not in traces.models:
            raise UserError(f"no traces of {self.model!r}; there are {', '.join(sorted(traces.models)) or 'none'}")
        if len(traces.models) > 1 and not self.model:
            raise UserError("a budget belongs to one model; pick one with --model: "
                            + ", ".join(f"{name} ({n:,} traces)" for name, n in traces.models.most_common()))
        if not traces.tokens:
            raise UserError(f"no usable traces in {', '.join(map(str, paths))}"
                            + (f" at level {self.level!r}" if self.level else ""))
        return traces

    def add(self, record: Any, place: str, traces: Traces) -> None:
        """Add the traces of one record.

        Raises:
            ValueError: the record cannot be used.
        """
        if isinstance(record, ValueError):
            raise record
        if not isinstance(record, dict):
            raise ValueError(f"expected an object, got {show(record)}")
        if not record.keys() <= self.keys.keys():  # a column may first appear in a later record
            self.keys |= dict.fromkeys(record)
            self.found = find_columns(self.keys, self.columns, place)
        found = self.found

        def get(what: str) -> Any:
            return record.get(found[what]) if what in found else None

        model, level = str(get("model") or ""), str(get("level") or "")
        traces.models[model] += 1
        if (self.model and model != self.model) or (self.level and level != self.level):
            return
        query = get("query")
        if not isinstance(query, str) or not query.strip():
            raise ValueError(f"{found['query']} must be a non-empty string, got {show(query)}")
        traces.levels[level] += 1
        measured = self.measure(get)
        place_of_query = self.places.setdefault(query, len(traces.queries))
        if place_of_query == len(traces.queries):
            traces.queries.append(query)
            traces.domains.append(str(get("domain") or ""))
            traces.groups.append(str(get("group") or ""))
        for tokens, correct, cut, budget in measured:
            traces.question.append(place_of_query)
            traces.tokens.append(tokens)
            traces.correct.append(correct)
            traces.cut.append(cut)
            traces.budget.append(budget)

    def measure(self, get: Callable[[str], Any]) -> list[tuple[float, int, int, int]]:
        """Return tokens, correctness, whether it was cut, and the forced budget, of each trace of a record."""
        sizes = get("tokens") if "tokens" in self.found else get("text")
        n_traces = len(sizes) if isinstance(sizes, list) else 1

        def each(what: str) -> list[Any]:
            value = get(what)
            values = value if isinstance(value, list) else [value] * n_traces
            if len(values) != n_traces:
                raise ValueError(f"{self.found[what]} has {len(values)} entries, {n_traces} were expected")
            return values

        result = []
        for tokens, text, correct, given, finish, complete, cap, budget in zip(
                *map(each, ("tokens", "text", "correct", "given", "finish", "complete", "cap", "budget")), strict=True):
            if "tokens" in self.found:
                length = as_number(tokens, self.found["tokens"])
            elif self.count_tokens is None:
                raise UserError("there is no column of reasoning tokens: count those of the text with --tokenizer, "
                                "naming the tokenizer of the model that wrote it")
            else:
                if not isinstance(text, str):
                    raise ValueError(f"{self.found['text']} must be text, got {show(text)}")
                length = as_number(self.count_tokens(reasoning_of(text)), "the number of tokens of the text")
            is_correct = as_flag(correct, self.found.get("correct", ""))
            if is_correct is None:
                is_correct = verify(given if given is not None else text, get("answer"))
            was_cut = (str(finish).lower() in ("length", "max_tokens") or as_flag(complete, "complete") is False
                       or (cap not in (None, "") and length >= as_number(cap, self.found["cap"])))
            forced = int(as_number(budget, self.found["budget"])) if budget not in (None, "") else 0
            result.append((length, -1 if is_correct is None else int(is_correct), int(was_cut), forced))
        return result


# ----------------------------------------------------------------------------------------------------------------------
# 2. Verifying an answer
# ----------------------------------------------------------------------------------------------------------------------

NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?<=\d)(?:e[+-]?\d+)?(?:\s*/\s*\d+)?%?", re.IGNORECASE)
# A choice: the whole answer, in brackets, before one, or a capital that begins no sentence ("A cat" is no choice).
LETTER = re.compile(r"\(([A-Ja-j])\)|^\W*([A-Ja-j])\W*$|^([A-J])[).:]|\b([A-J])\b(?!\s*[a-z'\u2019])")


def final_answer(text: str) -> str:
    r"""Return what a trace gives as its answer: the last \boxed{}, else what follows "answer is", else the last line.

    >>> final_answer("<think>hm</think>So x is 4.\nThe answer is 4.")
    '4'
    >>> final_answer(r"... $\boxed{\frac{1}{2}}$")
    '\\frac{1}{2}'
    """
    text = text[max((text.rfind(marker) + len(marker) for marker in END_OF_THINKING if marker in text), default=0) :]
    start = text.rfind("\\boxed{")
    if start >= 0:
        depth, begin = 1, start + len("\\boxed{")
        for end in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if not depth:
                return text[begin:end].strip()
    said = re.findall(r"answer\s*(?:is|:)\s*([^\n]+)", text, re.IGNORECASE)
    lines = [line for line in text.strip().splitlines() if line.strip()]
    last = said[-1] if said else lines[-1] if lines else ""
    return last.strip().strip("*$").rstrip(".").strip("*$ ")


def to_number(text: str) -> Fraction | None:
    """Return the number that a text consists of, or None.

    >>> [str(to_number(text)) for text in ("1,234.50", "3/4", "50%", "-2e3", "about 3", "1,2")]
    ['2469/2', '3/4', '1/2', '-2000', 'None', 'None']
    """
    text = text.strip("$ ")
    if not NUMBER.fullmatch(text):
        return None
    over, _, under = text.rstrip("%").replace(",", "").replace(" ", "").partition("/")
    with suppress(ValueError, ZeroDivisionError, OverflowError):
        return Fraction(over) / Fraction(under or 1) / (100 if text.endswith("%") else 1)
    return None


def plain(text: str) -> str:
    """Return an answer without what makes no difference: case, spacing, marks around it, a sign's typography."""
    text = text.replace("\u2212", "-").replace("{,}", ",").replace("\\,", "")
    text = " ".join(text.casefold().split()).strip(" *$\"'`").rstrip(". ")
    return re.sub(r"^- (?=[\d.])", "-", text)


def is_mathematics(text: str) -> bool:
    """Return whether a text is a formula rather than words, whose letters math-verify would multiply."""
    has_word = re.search(r"(?<![\\a-z])[a-z]{3,}", text, re.IGNORECASE)
    return not has_word and bool(re.search(r"[\\^_=+*/<>()\[\]{}\d]", text))


def normalized(text: str) -> str:
    """Return the text without what does not tell queries or answers apart: case, accents of spacing, punctuation.

    >>> normalized("  What's  2 + 2?")
    'what s 2 + 2'
    """
    return " ".join(re.findall(r"\w+(?:\.\d+)?|[+\-*/^=<>]", text.lower()))


def verify(given: Any, gold: Any) -> bool | None:
    """Return whether an answer is right; None where that cannot be told, which is not the same as wrong.

    A choice letter, yes or no, and a single number are compared as such; other text must be the same but for case and
    spacing. Where it is not, `math-verify` decides if it is installed and both are mathematics.
    """
    if gold in (None, "") or not isinstance(given, str) or not given.strip():
        return None
    wanted, answer = str(gold).strip(), final_answer(given)
    if plain(wanted) == plain(answer):
        return True
    if re.fullmatch(r"\(?[A-J]\)?", wanted):
        letters = {"".join(groups).upper() for groups in LETTER.findall(answer)}
        return letters == {wanted.strip("()")} if len(letters) == 1 else None
    if plain(wanted) in ("yes", "no", "true", "false"):
        said = re.match(r"(yes|no|true|false)\b", plain(answer))
        return said[1] == plain(wanted) if said else None
    if ":" in answer or re.search("hundred|thousand|illion|dozen", answer, re.IGNORECASE):
        return None  # a time or a ratio, a number in words
    number = to_number(plain(wanted))
    numbers = [each for each in map(to_number, NUMBER.findall(plain(answer))) if each is not None]
    is_formula = bool(re.search(r"[\\^!\u221a]", answer))
    if number is not None and len(numbers) == 1 and not is_formula:  # a unit may stand beside it
        whole = number.denominator == numbers[0].denominator == 1
        if number == numbers[0] or (not whole and math.isclose(number, numbers[0], rel_tol=1e-12)):
            return True
        return None if number in (100 * numbers[0], numbers[0] / 100) else False
    with suppress(ImportError):
        import math_verify

        if is_mathematics(wanted) and is_mathematics(answer):
            parsed = [math_verify.parse(f"${text}$", parsing_timeout=None) for text in (wanted, answer)]
            if all(parsed) and math_verify.verify(*parsed, timeout_seconds=None):
                return True
            has_letters = re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", answer))  # units, perhaps
            return False if all(parsed) and is_formula and not has_letters else None
    return None


# ----------------------------------------------------------------------------------------------------------------------
# 3. Labels
# ----------------------------------------------------------------------------------------------------------------------

POLICIES = ("shortest-correct", "median-correct", "quantile:0.9", "curve:0.95", "median-all")


@dataclass(frozen=True)
class Label:
    """A budget, in tokens."""

    budget: float
    censored: bool  # the budget is at least this
    solved: bool | None  # None: no trace could be verified
    kind: str  # the policy that made it


def median_with_cut(tokens: np.ndarray, cut: np.ndarray) -> tuple[float, bool]:
    """Return the median length, and whether it is a lower bound: a cut trace is longer than every length seen."""
    order = np.lexsort((tokens, cut))
    middle = [order[(len(order) - 1) // 2], order[len(order) // 2]]
    return float(np.mean(tokens[middle])), bool(cut[middle].any())


def check_policy(policy: str) -> str:
    """Return a policy that can be followed.

    Raises:
        UserError: it cannot.
    """
    name, _, share = policy.partition(":")
    try:
        known = policy in POLICIES or (name in ("quantile", "curve") and 0 < float(share) <= 1)
    except ValueError:
        known = False
    if not known:
        raise UserError(f"--policy {policy}: expected {', '.join(POLICIES)}, or another share above 0 and at most 1")
    return policy


def label_of(policy: str, tokens: np.ndarray, correct: np.ndarray, cut: np.ndarray, budget: np.ndarray) -> Label:
    """Return the label of one query's traces.

    A trace that hit its cap is never a length. A query that no trace solved gets the longest length seen as a lower
    bound, and one that could not be verified the median of all.

    Args:
        policy: how lengths become a budget.
        tokens: (n,) reasoning tokens of each trace.
        correct: (n,) 1 yes, 0 no, -1 cannot be told.
        cut: (n,) whether it hit its cap.
        budget: (n,) that was forced on it; 0 = none.
    """
    cut = cut.astype(bool)
    solved = None if (correct < 0).all() else bool((correct == 1).any())
    if policy == "median-all" or solved is None:
        return Label(*median_with_cut(tokens, cut), solved, "median-all")
    name, _, share = policy.partition(":")
    forced = budget > 0
    if name == "curve" and forced.any():  # the share of correct answers at each budget that was forced
        grid = np.unique(budget[forced])
        shares = np.array([np.mean(correct[budget == each] == 1) for each in grid])
        if shares.max() > 0:
            return Label(float(grid[np.argmax(shares >= float(share) * shares.max())]), False, True, policy)
    lengths = np.sort(tokens[(correct == 1) & ~cut & ~forced])
    if not len(lengths):
        return Label(float(tokens.max()), True, solved, "all cut" if solved else "unsolved")
    if name == "shortest-correct":
        return Label(float(lengths[0]), False, True, policy)
    if name == "median-correct":
        return Label(float(np.median(lengths)), False, True, policy)
    # Of correct answers, the smallest budget that holds this share: of the curve of answers against budget it is the
    # point that reaches this share of its maximum, all answers right once every right one has room.
    return Label(float(lengths[math.ceil(float(share) * len(lengths)) - 1]), False, True, policy)


def by_question(traces: Traces) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each question with the places of its traces."""
    question = np.frombuffer(traces.question, dtype=np.int32)
    order = np.argsort(question, kind="stable")
    bounds = np.flatnonzero(np.diff(question[order], prepend=-1))
    for places in np.split(order, bounds[1:]):
        yield int(question[places[0]]), places


@dataclass(frozen=True)
class Columns:
    """The columns of traces as arrays."""

    tokens: np.ndarray
    correct: np.ndarray
    cut: np.ndarray
    budget: np.ndarray

    @classmethod
    def of(cls, traces: Traces) -> Columns:
        """Return them without a copy."""
        return cls(np.frombuffer(traces.tokens), np.frombuffer(traces.correct, dtype=np.int8),
                   np.frombuffer(traces.cut, dtype=np.int8), np.frombuffer(traces.budget, dtype=np.int32))

    def __getitem__(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens, correctness, cuts and budgets of some traces."""
        return self.tokens[places], self.correct[places], self.cut[places], self.budget[places]


def make_rows(traces: Traces, policy: str, unsolved: str, model: str) -> tuple[list[dict[str, Any]], int]:
    """Return a labelled row a query, and how many were dropped because no trace solved them."""
    columns, rows, n_dropped = Columns.of(traces), [], 0
    for question, places in by_question(traces):
        label = label_of(policy, *columns[places])
        if label.kind == "unsolved" and unsolved == "drop":
            n_dropped += 1
            continue
        if label.kind == "unsolved" and unsolved == "median":
            tokens, _, cut, _ = columns[places]
            label = Label(*median_with_cut(tokens, cut.astype(bool)), label.solved, "unsolved, median-all")
        query = traces.queries[question]
        rows.append({
            "query": query, "optimal_budget": max(1, round(label.budget)), "domain": traces.domains[question],
            "group": traces.groups[question] or query, "censored": label.censored, "solved": label.solved,
            "n_traces": len(places), "label_kind": label.kind, "model": model})
    return rows, n_dropped


# ----------------------------------------------------------------------------------------------------------------------
# 4. Groups and splits
# ----------------------------------------------------------------------------------------------------------------------

SHINGLE = 3  # words
BANDS, ROWS = 16, 4  # of MinHash: two queries with 0.8 of their shingles in common miss each other once in 4,000 times


def shingles(text: str) -> np.ndarray:
    """Return the hashes of a text's word triples, case and punctuation aside, sorted, (n,) uint64."""
    words = normalized(text).split()
    pieces = [" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))]
    return np.unique(np.array([zlib.crc32(piece.encode("utf-8", "replace")) for piece in pieces], dtype=np.uint64))


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """Return the Jaccard similarity of two sets of hashes."""
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / (len(one) + len(other) - both)


def numbers_in(text: str) -> tuple[str, ...]:
    """Return the numbers in a text, sorted: a template with other numbers is another problem, not a re-phrasing."""
    return tuple(sorted(re.findall(r"\d+(?:\.\d+)?", text)))


class Groups:
    """A union of what must stay together."""

    def __init__(self) -> None:
        self.parent: dict[int, int] = {}

    def find(self, item: int) -> int:
        """Return the representative of an item's group."""
        while (parent := self.parent.get(item, item)) != item:
            self.parent[item] = item = self.parent.get(parent, parent)
        return item

    def join(self, one: int, other: int) -> None:
        """Put two items into one group."""
        low, high = sorted((self.find(one), self.find(other)))
        self.parent[high] = low


def group_rows(rows: Sequence[Mapping[str, Any]], threshold: float) -> tuple[list[int], int]:
    """Return each row's group, as the place of its first row, and how many rows joined another as near-duplicates.

    Together are rows of one `group`, of one normalised query, and, of queries with the same numbers, those that share
    at least `threshold` of their word triples (Jaccard similarity; 0 = not looked for).
    """
    groups, seen = Groups(), dict[tuple[str, str], int]()
    for place, row in enumerate(rows):
        for key in (("group", str(row.get("group") or row["query"])), ("query", normalized(row["query"]))):
            groups.join(seen.setdefault(key, place), place)
    n_near = 0
    for one, other in near_duplicates([row["query"] for row in rows], threshold) if threshold else ():
        n_near += groups.find(one) != groups.find(other)
        groups.join(one, other)
    return [groups.find(place) for place in range(len(rows))], n_near


def near_duplicates(queries: Sequence[str], threshold: float) -> Iterator[tuple[int, int]]:
    """Yield pairs of queries with the same numbers and at least `threshold` of their word triples in common.

    Candidates agree in a band of their MinHash signatures (Leskovec et al., Mining of Massive Datasets, chapter 3).
    """
    rng = np.random.default_rng(0)
    factors, offsets = rng.integers(0, 2**64, (2, BANDS * ROWS), dtype=np.uint64)
    mixers = rng.integers(0, 2**64, ROWS, dtype=np.uint64) | np.uint64(1)
    triples, bands = [], np.empty((len(queries), BANDS), dtype=np.uint64)
    for place, query in enumerate(queries):
        triples.append(shingles(query))
        hashed = (triples[-1][:, None] * (factors | np.uint64(1)) + offsets) >> np.uint64(32)  # wraps around, as it may
        numbers = np.uint64(zlib.crc32(" ".join(numbers_in(query)).encode()))
        bands[place] = (hashed.min(axis=0).reshape(BANDS, ROWS) * mixers).sum(axis=1) + numbers
    for band in bands.T:
        order = np.argsort(band, kind="stable")
        for i in np.flatnonzero(band[order[1:]] == band[order[:-1]]):
            one, other = int(order[i]), int(order[i + 1])
            alike = numbers_in(queries[one]) == numbers_in(queries[other])
            if alike and similarity(triples[one], triples[other]) >= threshold:
                yield one, other


def split_rows(rows: Sequence[Mapping[str, Any]], groups: Sequence[int], shares: Mapping[str, float],
               seed: int) -> dict[str, list[Mapping[str, Any]]]:
    """Divide rows by group, the same shares of every domain and budget decile.

    The groups of a stratum are dealt in the order of a hash of (seed, query): for the same groups, the same rows on
    every machine, in whatever order they come. (Which near-duplicates meet in a group does depend on their order.)
    """
    members: dict[int, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    medians = [float(np.median([rows[place]["optimal_budget"] for place in places])) for places in members.values()]
    deck = []
    for places, decile in zip(members.values(), budget_deciles(medians), strict=True):
        key = min((stable_hash(seed, rows[place]["query"]), place) for place in places)
        deck.append((str(rows[key[1]].get("domain") or ""), int(decile), key[0], places))
    deck.sort(key=lambda entry: entry[:3])
    chosen: dict[str, list[int]] = {name: [] for name in shares}
    n_dealt = 0
    for *_, places in deck:
        n_dealt += len(places)
        neediest = max(shares, key=lambda name: shares[name] * n_dealt - len(chosen[name]))
        chosen[neediest] += places
    return {name: [rows[place] for place in sorted(places)] for name, places in chosen.items()}


def exclude_rows(rows: Sequence[Mapping[str, Any]], groups: Sequence[int], path: Path,
                 threshold: float) -> tuple[list[int], int]:
    """Return the places of the rows that have nothing to do with those of an existing file, and how many have."""
    others = [record for place, record in read_records(path)
              if isinstance(record, dict) and isinstance(record.get("query"), str)]
    if not others:
        raise UserError(f"--exclude {path}: no rows with a query")
    together, _ = group_rows([*({"query": each["query"]} for each in others),
                              *({"query": row["query"]} for row in rows)], threshold)
    known = set(together[: len(others)])
    banned = {group for group, joint in zip(groups, together[len(others) :], strict=True) if joint in known}
    kept = [place for place, group in enumerate(groups) if group not in banned]
    return kept, len(rows) - len(kept)


# ----------------------------------------------------------------------------------------------------------------------
# 5. The data card
# ----------------------------------------------------------------------------------------------------------------------

MOST_FRESH_RUNS = 200_000  # traces held out, each in turn, to measure the noise; beyond, a sample of the questions


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Return what the card says of a set of budgets."""
    names = ("min", "p10", "median", "p90", "max")
    return dict(zip(names, np.quantile(values, (0, 0.1, 0.5, 0.9, 1)).tolist(), strict=True))


def regression_floor(truth: np.ndarray, guess: np.ndarray) -> dict[str, Any]:
    """Return the error of predictions of single lengths, both (N,) tokens."""
    from scipy.stats import spearmanr

    logs = np.log(truth)
    spread = float(((logs - logs.mean()) ** 2).sum())
    varies = len(truth) > 1 and np.ptp(truth) > 0 and np.ptp(guess) > 0
    return {"fresh_runs": len(truth), "mae": float(np.mean(np.abs(truth - guess))),
            "mape": float(np.mean(np.abs(truth - guess) / truth)),
            "spearman": float(spearmanr(truth, guess).statistic) if varies else None,
            "r2_log": 1 - float(((logs - np.log(guess)) ** 2).sum()) / spread if spread else None}


def measure_noise(traces: Traces, policies: Sequence[str]) -> dict[str, Any]:
    """Hold out each trace in turn, and see how the others predict it.

    Returns:
        noise_floor: the error of the best possible predictor of one more trace's length, the median of the others.
        fresh_run: by policy, how the label made from the others fares with the held-out trace: mean absolute error in
            tokens, share of traces that are longer (of all, and of the correct ones), and mean label, so that a policy
            that promises little is not compared with one that reserves more.
    """
    columns = Columns.of(traces)
    several = [places for _, places in by_question(traces) if len(places) > 1]
    total = sum(map(len, several))
    if total > MOST_FRESH_RUNS:
        chosen = np.random.default_rng(0).permutation(len(several))
        several = [several[i] for i in chosen[: max(1, len(several) * MOST_FRESH_RUNS // total)]]
    truth, guess = [], []
    seen: dict[str, list[tuple[float, bool, float]]] = {policy: [] for policy in policies}
    for places in several:
        tokens, correct, cut, budget = columns[places]
        for held_out in range(len(places)):
            others = np.arange(len(places)) != held_out
            rest = tokens[others], correct[others], cut[others], budget[others]
            uncut = rest[0][rest[2] == 0]
            if not cut[held_out] and len(uncut):
                truth.append(tokens[held_out])
                guess.append(np.median(uncut))
            for policy in policies:
                label = label_of(policy, *rest)
                if label.kind != policy or label.censored:
                    continue  # the policy has nothing to say of these traces
                if cut[held_out] and tokens[held_out] <= label.budget:
                    continue  # it would have gone on, nobody knows how far
                seen[policy].append((tokens[held_out], correct[held_out] == 1, label.budget))
    result: dict[str, Any] = {"noise_floor": regression_floor(np.array(truth), np.array(guess)) if truth else None,
                              "fresh_run": {}}
    for policy, runs in seen.items():
        if runs:
            lengths, right, budgets = map(np.array, zip(*runs, strict=True))
            underrun = lengths > budgets
            result["fresh_run"][policy] = {
                "fresh_runs": len(runs), "mae": float(np.mean(np.abs(lengths - budgets))),
                "underrun_rate": float(underrun.mean()),
                "underrun_rate_of_correct": float(underrun[right].mean()) if right.any() else None,
                "mean_budget": float(budgets.mean())}
    return result


def describe(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return counts and budget quantiles of labelled rows."""
    budgets = [row["optimal_budget"] for row in rows]
    counts = [row.get("n_traces") for row in rows]
    solved = [bool(row["solved"]) for row in rows if row.get("solved") is not None]
    return {"rows": len(rows), "budget": quantiles(budgets),
            "censored_rate": float(np.mean([bool(row.get("censored")) for row in rows])),
            "solved_rate": float(np.mean(solved)) if solved else None,
            "traces_per_query": float(np.mean([count if isinstance(count, int) else 1 for count in counts]))}


def make_card(splits: Mapping[str, Sequence[Mapping[str, Any]]], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything the data card says."""
    rows = [row for part in splits.values() for row in part]
    domains: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        domains.setdefault(str(row.get("domain") or ""), []).append(row)
    return {**facts, "all": describe(rows),
            "splits": {name: describe(part) for name, part in splits.items() if part},
            "domains": {name: describe(part) for name, part in sorted(domains.items())},
            "label_kinds": dict(Counter(str(row.get("label_kind", "given")) for row in rows))}


def table_of(described: Mapping[str, Mapping[str, Any]], heading: str) -> list[str]:
    """Return lines of a Markdown table of `describe`'s figures."""
    lines = [f"| {heading} | rows | min | p10 | median | p90 | max | censored | solved | traces a query |",
             "|---|" + "--:|" * 9]
    for name, each in described.items():
        budget = " | ".join(f"{value:,.0f}" for value in each["budget"].values())
        solved = "" if each["solved_rate"] is None else f"{each['solved_rate']:.1%}"
        label = " ".join(name.replace("|", "/").split()) or "(none)"
        lines.append(f"| {label} | {each['rows']:,} | {budget} | {each['censored_rate']:.1%} | {solved} | "
                     f"{each['traces_per_query']:.1f} |")
    return lines


def noise_tables(noise: Mapping[str, Any]) -> list[str]:
    """Return the lines of the card about what no predictor can know."""
    lines = ["## Noise", ""]
    floor = noise.get("noise_floor")
    if not floor:
        return [*lines, "Not measured: no query has two whole traces."]
    spearman = "-" if floor["spearman"] is None else f"{floor['spearman']:.3f}"
    r2 = "-" if floor["r2_log"] is None else f"{floor['r2_log']:.3f}"
    lines += [
        "One more trace, predicted by the median of the query's others: about the best that any predictor can do.", "",
        "| fresh runs | MAE | MAPE | Spearman | R2 of the logarithm |", "|--:|--:|--:|--:|--:|",
        f"| {floor['fresh_runs']:,} | {floor['mae']:,.1f} | {floor['mape']:.1%} | {spearman} | {r2} |", "",
        "How the label that a policy makes of the others fares with one more trace:", "",
        "| policy | fresh runs | MAE | underrun | of correct ones | mean budget |", "|---|--:|--:|--:|--:|--:|"]
    for policy, each in noise["fresh_run"].items():
        right = "" if each["underrun_rate_of_correct"] is None else f"{each['underrun_rate_of_correct']:.1%}"
        lines.append(f"| {policy} | {each['fresh_runs']:,} | {each['mae']:,.1f} | {each['underrun_rate']:.1%} | "
                     f"{right} | {each['mean_budget']:,.0f} |")
    return lines


def card_text(card: Mapping[str, Any]) -> str:
    """Return the data card as Markdown."""
    lines = ["# Data card", "", f"Made by `{card['command']}`.", ""]
    lines += [f"- {text}" for text in card["notes"]]
    lines += ["", *table_of({"all": card["all"], **card["splits"]}, "split"), "",
              *table_of(card["domains"], "domain"), ""]
    if "noise" in card:
        lines += [*noise_tables(card["noise"]), ""]
    return "\n".join(lines)


def draw_budgets(splits: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> bool:
    """Draw a histogram of the budgets by split as a PNG; return False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="budget (tokens)", ylabel="share of the rows")
    budgets = {name: [row["optimal_budget"] for row in part] for name, part in splits.items() if part}
    every = list(itertools.chain.from_iterable(budgets.values()))
    edges = np.geomspace(min(every), 1.001 * max(every), 40).tolist()
    for (name, values), colour in zip(budgets.items(), ("#0072B2", "#E69F00", "#009E73"), strict=False):
        axes.hist(values, bins=edges, weights=np.full(len(values), 1 / len(values)), histtype="step", color=colour,
                  label=f"{name}, {len(values):,} rows", lw=1.5)
    axes.legend(frameon=False, fontsize=8)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=130)
    return True


# ----------------------------------------------------------------------------------------------------------------------
# 6. Collecting traces
# ----------------------------------------------------------------------------------------------------------------------


COSTS = ("prompt_tokens", "completion_tokens")  # what an endpoint bills


@dataclass(frozen=True)
class Job:
    """One trace to collect."""

    question: dict[str, Any]
    sample: int  # its number among those of the question
    budget: int | None  # to force on it, in tokens

    @property
    def key(self) -> tuple[str, int, int | None]:
        """What tells it from the others."""
        return self.question["query"], self.sample, self.budget


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Return the questions of a file; each has a query."""
    questions, problems = [], []
    for place, record in read_records(path):
        if not isinstance(record, dict) or not isinstance(record.get("query"), str) or not record["query"].strip():
            problems.append(f"{place}: query must be a non-empty string")
        else:
            questions.append(record)
    if problems:
        raise UserError(f"{len(problems):,} bad questions:\n{listing(problems, len(problems))}")
    if not questions:
        raise UserError(f"{path}: no questions")
    return questions


def read_done(path: Path, settings: Mapping[str, Any]) -> tuple[set[tuple[str, int, int | None]], Counter[str]]:
    """Return which traces an earlier collection wrote and what they cost; cut off a line that a kill left half written.

    Raises:
        UserError: they were collected with other settings, or the file holds something else.
    """
    known: set[tuple[str, int, int | None]] = set()
    spent: Counter[str] = Counter(dict.fromkeys(COSTS, 0))
    if not path.exists():
        return known, spent
    n_whole = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            n_whole += len(line)
            try:
                trace = json.loads(line)
                known.add((trace["query"], trace["sample"], trace["budget"]))
                spent.update({name: trace[name] or 0 for name in COSTS})
            except (ValueError, TypeError, KeyError):
                raise UserError(f"{path}:{number} is not a trace of this program: choose another --output") from None
            changed = [f"{name} {trace.get(name)!r}, not {value!r}" for name, value in settings.items()
                       if trace.get(name) != value]
            if changed:
                raise UserError(f"{path} was collected with {', '.join(changed)}: choose another --output")
    with path.open("r+b") as file:
        file.truncate(n_whole)
    return known, spent


def nested(path: str, value: Any) -> dict[str, Any]:
    """Return a dict with a value under a dotted path.

    >>> nested("custom_params.thinking_budget", 512)
    {'custom_params': {'thinking_budget': 512}}
    """
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def reasoning_tokens(usage: Any, reasoning: str, text: str,
                     count_tokens: Callable[[str], int] | None) -> tuple[int | None, str]:
    """Return how many tokens a trace reasoned for, and how they were counted.

    The server's own count where it gives one, else that of the tokenizer on the text up to the end-of-thinking marker,
    else everything the server generated, the answer included.
    """
    details: Any = getattr(usage, "completion_tokens_details", None)
    if getattr(details, "reasoning_tokens", None):
        return details.reasoning_tokens, "reasoning_tokens"
    if count_tokens is not None:
        return count_tokens(reasoning or reasoning_of(text)), "tokenizer"
    return getattr(usage, "completion_tokens", None), "completion_tokens"


class Collector:
    """Asks the endpoint, and turns its replies into traces."""

    def __init__(self, args: argparse.Namespace) -> None:
        try:
            import openai
        except ImportError:
            raise UserError("sample needs a package: pip install openai") from None
        self.args, self.openai = args, openai
        key = os.environ.get(args.key_variable, "")
        self.client = openai.OpenAI(base_url=args.endpoint, api_key=key or "none", timeout=args.timeout,
                                    max_retries=args.retries)  # it waits longer each time, after 429 and 5xx alike
        self.count_tokens = make_counter(args.tokenizer)
        self.settings = {"model": args.model, "temperature": args.temperature, "max_tokens": args.max_tokens}

    def collect(self, job: Job) -> dict[str, Any]:
        """Return one trace.

        Raises:
            openai.OpenAIError: the endpoint did not answer, or refused.
        """
        question, args = job.question, self.args
        seed = args.seed + job.sample
        reply = self.client.chat.completions.create(
            model=args.model, messages=[{"role": "user", "content": question["query"]}], seed=seed,
            temperature=args.temperature, max_tokens=args.max_tokens,
            extra_body=None if job.budget is None else nested(args.budget_field, job.budget))
        choice = reply.choices[0]
        text = choice.message.content or ""
        extra = choice.message.model_extra or {}
        reasoning = str(extra.get("reasoning_content") or extra.get("reasoning") or "")
        tokens, kind = reasoning_tokens(reply.usage, reasoning, text, self.count_tokens)
        return {
            **{name: question[name] for name in ("query", "answer", "domain", "group") if name in question},
            **self.settings, "tokens": tokens, "tokens_kind": kind, "text": text, "reasoning": reasoning,
            "finish_reason": choice.finish_reason, "seed": seed, "sample": job.sample, "budget": job.budget,
            "prompt_tokens": getattr(reply.usage, "prompt_tokens", None),
            "completion_tokens": getattr(reply.usage, "completion_tokens", None)}

    def explain(self, error: Exception) -> str:
        """Return what an error of the endpoint means and what to do."""
        if isinstance(error, (self.openai.AuthenticationError, self.openai.PermissionDeniedError)):
            return f"the endpoint refuses the key in {self.args.key_variable}: set it in the environment"
        if isinstance(error, self.openai.NotFoundError):
            return f"the endpoint knows no model {self.args.model!r}, or it has no /chat/completions: {error}"
        if isinstance(error, self.openai.APIConnectionError):
            return f"no answer from {self.args.endpoint}: {error}"
        return str(error)


def run_jobs(collector: Collector, jobs: Sequence[Job], n_done: int, spent: Counter[str],
             file: IO[bytes]) -> list[str]:
    """Collect all jobs, writing each trace as it comes; return what was said of requests that were refused.

    Raises:
        UserError: the endpoint is gone, or refuses everything.
    """
    args, refused = collector.args, list[str]()
    waiting = iter(jobs)
    pool = ThreadPoolExecutor(args.concurrency)
    running = {pool.submit(collector.collect, job): job for job in itertools.islice(waiting, args.concurrency)}
    try:
        with tqdm(total=n_done + len(jobs), initial=n_done, desc="sample", unit=" traces", disable=None) as bar:
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    try:
                        trace = future.result()
                    except (collector.openai.BadRequestError, collector.openai.UnprocessableEntityError) as error:
                        refused.append(f"{show(job.question['query'])}: {error}")
                    else:
                        file.write(json_line(trace))  # unbuffered: what is paid for is kept, whatever comes
                        spent.update({name: trace[name] or 0 for name in COSTS})
                    cost = (spent["prompt_tokens"] * args.price_in + spent["completion_tokens"] * args.price_out) / 1e6
                    bar.set_postfix(tokens=f"{spent['completion_tokens']:,}", cost=f"{cost:.2f}", refresh=False)
                    bar.update()
                    running.update({pool.submit(collector.collect, job): job for job in itertools.islice(waiting, 1)})
    except collector.openai.OpenAIError as error:
        raise UserError(f"{collector.explain(error)}\n  The traces so far are in {args.output}: the same command goes "
                        "on from there") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return refused


def sample_command(args: argparse.Namespace) -> None:
    """Collect traces, going on where an earlier collection ended."""
    questions = read_questions(Path(args.questions))
    collector = Collector(args)
    path = Path(args.output)
    try:
        known, spent = read_done(path, collector.settings)
    except OSError as error:
        raise UserError(f"cannot go on from {path}: {error.strerror}") from None
    jobs = [Job(question, sample, budget) for sample in range(args.samples) for budget in args.budgets or [None]
            for question in {question["query"]: question for question in questions}.values()]
    missing = [job for job in jobs if job.key not in known]
    if not missing:
        print(f"Nothing to do: {path} has all {len(jobs):,} traces")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        refused = run_jobs(collector, missing, len(known), spent, file)
    for line in refused[:20]:
        print(f"refused: {line}", file=sys.stderr)
    print(f"Written: {path}, {len(jobs) - len(refused):,} traces" + (f"; {len(refused):,} refused" if refused else ""))


# ----------------------------------------------------------------------------------------------------------------------
# 7. Commands
# ----------------------------------------------------------------------------------------------------------------------


def write_splits(rows: Sequence[dict[str, Any]], args: argparse.Namespace, facts: dict[str, Any]) -> None:
    """Group, split and write labelled rows with their card."""
    groups, n_near = group_rows(rows, args.near_duplicates)
    facts["notes"].append(f"{len(rows):,} queries in {len(set(groups)):,} groups; {n_near:,} joined another as "
                          f"near-duplicates (at least {args.near_duplicates:g} of their word triples, same numbers)")
    for path in args.exclude:
        kept, n_excluded = exclude_rows(rows, groups, Path(path), args.near_duplicates)
        rows, groups = [rows[place] for place in kept], [groups[place] for place in kept]
        facts["notes"].append(f"{n_excluded:,} queries left out, for they stand in {path}")
    if not rows:
        raise UserError("no query is left: all of them stand in the files to exclude")
    shares = dict(zip(("train", "val", "test"), args.shares, strict=True))
    splits = split_rows(rows, groups, shares, args.seed)
    empty = [name for name, part in splits.items() if shares[name] and not part]
    if empty:
        raise UserError(f"{len(rows):,} rows in {len(set(groups)):,} groups are too few: {', '.join(empty)} would be "
                        "empty")
    folder = Path(args.output)
    card = make_card(splits, {**facts, "command": f"python data/prepare.py {' '.join(args.argv)}", "seed": args.seed})
    for name, part in splits.items():
        with atomic_file(folder / f"{name}.jsonl") as file:
            for row in part:
                file.write(json_line(row))
    drawn = draw_budgets(splits, folder / "data_card.png")
    text = card_text(card) + ("\n![Budgets](data_card.png)\n" if drawn else "")
    with atomic_file(folder / "data_card.md") as file:
        file.write(text.encode("utf-8", "replace"))
    write_json(folder / "data_card.json", card)
    print(text)
    if not drawn:
        print("No picture: pip install matplotlib")
    print(f"Written: {folder}/ train.jsonl, val.jsonl, test.jsonl, data_card.md, data_card.json")


def make_counter(name: str) -> Callable[[str], int] | None:
    """Return a function that counts a text's tokens with a tokenizer of the hub or a folder."""
    if not name:
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise explain_loading(name, error) from None
    return lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def label_command(args: argparse.Namespace) -> None:
    """Make labelled rows of traces."""
    policy = check_policy(args.policy)
    columns = {what: getattr(args, f"{what}_column") for what in COLUMNS}
    reader = Reader(columns, args.model, args.level, make_counter(args.tokenizer))
    traces = reader.read([Path(path) for path in args.traces], args.on_bad_row == "skip")
    model = args.model or next(iter(traces.models))
    rows, n_dropped = make_rows(traces, policy, args.unsolved, model)
    counts = Counter(traces.correct)
    notes = [f"{len(traces.tokens):,} traces of {model or 'a model without a name'}; correct {counts[1]:,}, wrong "
             f"{counts[0]:,}, could not be verified {counts[-1]:,}; hit their cap {sum(traces.cut):,}",
             f"policy {policy}; queries that no trace solved: {args.unsolved}"
             + (f", {n_dropped:,} of them" if args.unsolved == "drop" else "")]
    if policy == "shortest-correct":
        notes.append("the shortest of n lengths falls as n grows: compare only with labels from as many traces a query")
    if len(traces.levels) > 1:
        notes.append("traces of several levels are mixed (--level picks one): "
                     + ", ".join(f"{name or '(none)'} {n:,}" for name, n in traces.levels.most_common()))
    if traces.n_bad:
        notes.append(f"{traces.n_bad:,} unusable traces skipped, the first: {traces.first_bad[0]}")
    if not rows:
        raise UserError("no query is left: no trace is correct, and --unsolved drop")
    noise = measure_noise(traces, list(dict.fromkeys((*POLICIES, policy))))
    write_splits(rows, args, {"notes": notes, "model": model, "policy": policy, "unsolved": args.unsolved,
                              "noise": noise})


def split_command(args: argparse.Namespace) -> None:
    """Divide rows that are labelled already."""
    rows: list[dict[str, Any]] = []
    bad: list[str] = []
    n_bad = 0
    for place, record in read_records(Path(args.rows)):
        try:
            if isinstance(record, ValueError):
                raise record
            if not isinstance(record, dict):
                raise ValueError(f"expected an object, got {show(record)}")
            if not isinstance(record.get("query"), str) or not record["query"].strip():
                raise ValueError(f"query must be a non-empty string, got {show(record.get('query'))}")
            name = "budget" if "budget" in record and "optimal_budget" not in record else "optimal_budget"
            rows.append(record | {"optimal_budget": as_number(record.get(name), name)})
        except ValueError as error:
            n_bad += 1
            bad += [f"{place}: {error}"] if len(bad) < 20 else []
    if n_bad and args.on_bad_row == "error":
        raise UserError(f"{n_bad:,} bad rows (--on-bad-row skip drops them):\n{listing(bad, n_bad)}")
    if not rows:
        raise UserError(f"{args.rows}: no usable rows")
    notes = [f"rows of {args.rows}"] + ([f"{n_bad:,} bad rows skipped, the first: {bad[0]}"] if n_bad else [])
    write_splits(rows, args, {"notes": notes})


def parse_shares(text: str) -> list[float]:
    """Return the shares of train, val and test, which add up to 1."""
    shares = [float(part) for part in text.split(",")]
    if len(shares) != 3 or min(shares) < 0 or shares[0] <= 0 or not math.isclose(sum(shares), 1):
        raise argparse.ArgumentTypeError(f"expected three shares that add up to 1, such as 0.8,0.1,0.1, got {text}")
    return shares


def positive(text: str) -> int:
    """Return a whole number above 0."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text}")
    return int(text)


def parse_budgets(text: str) -> list[int]:
    """Return budgets in tokens."""
    return [positive(part) for part in text.split(",")]


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of a command."""
    parser = argparse.ArgumentParser(prog="data/prepare.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sample = commands.add_parser("sample", help="questions -> traces of a model", allow_abbrev=False)
    label = commands.add_parser("label", help="traces -> labelled rows, split", allow_abbrev=False)
    split = commands.add_parser("split", help="labelled rows -> train, val and test", allow_abbrev=False)

    def flag(of: argparse.ArgumentParser, name: str, **options: Any) -> None:
        of.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('-', '_')}")), dest=name.replace("-", "_"),
                        **options)

    sample.add_argument("questions", metavar="QUESTIONS", help="JSONL: query, and optionally answer, domain and group")
    flag(sample, "endpoint", required=True, metavar="URL", help="such as http://127.0.0.1:8000/v1")
    flag(sample, "model", required=True, help="as the endpoint knows it")
    flag(sample, "output", required=True, metavar="FILE.jsonl", help="traces are added to it as they come")
    flag(sample, "samples", type=positive, default=8, help="traces a question (default: 8)")
    flag(sample, "temperature", type=float, default=0.6)
    flag(sample, "max-tokens", type=positive, default=16384, help="cap of a trace (default: 16384)")
    flag(sample, "concurrency", type=positive, default=16, help="requests at a time (default: 16)")
    flag(sample, "seed", type=int, default=0, help="of the first sample; the others count up")
    flag(sample, "budgets", type=parse_budgets, default=[], metavar="N,N,...", help="budgets to force, for a curve")
    flag(sample, "budget-field", default="thinking_token_budget", metavar="PATH",
         help="of the request: thinking_token_budget (vLLM, the default), custom_params.thinking_budget (SGLang), "
              "thinking_budget_tokens (llama.cpp), ...")
    flag(sample, "tokenizer", default="", metavar="NAME", help="counts tokens where the server does not; the model's")
    flag(sample, "key-variable", default="OPENAI_API_KEY", metavar="NAME", help="of the environment; holds the key")
    flag(sample, "price-in", type=float, default=0.0, metavar="X", help="a million prompt tokens, for the bar")
    flag(sample, "price-out", type=float, default=0.0, metavar="X", help="a million generated tokens")
    flag(sample, "retries", type=int, default=6, help="of a request, waiting longer each time (default: 6)")
    flag(sample, "timeout", type=float, default=1800.0, metavar="S", help="of a request (default: 1800)")
    label.add_argument("traces", nargs="+", metavar="TRACES", help="files, or folders of datasets")
    flag(label, "model", default="", help="whose traces to take, where there are several models'")
    flag(label, "level", default="", help="take only traces of this level of effort")
    flag(label, "policy", default="median-correct", help=f"{', '.join(POLICIES)} (default: median-correct)")
    flag(label, "unsolved", choices=("censor", "drop", "median"), default="censor",
         help="queries that no trace solved: the longest length as a lower bound (default), none, or the median")
    flag(label, "tokenizer", default="", metavar="NAME", help="counts the tokens of texts: the reasoning model's own")
    for what, names in COLUMNS.items():
        flag(label, f"{what}-column", default="", metavar="NAME", help=f"(default: {' or '.join(names)})")
    split.add_argument("rows", metavar="ROWS", help="JSONL, CSV or Parquet with query and optimal_budget")
    for each in (label, split):
        flag(each, "output", required=True, metavar="DIR", help="for train, val, test and the data card")
        flag(each, "shares", type=parse_shares, default=[0.8, 0.1, 0.1], metavar="A,B,C",
             help="of train, val and test (default: 0.8,0.1,0.1)")
        flag(each, "near-duplicates", type=float, default=0.8, metavar="SHARE",
             help="of word triples in common, from which on two queries stay together; 0 = off (default: 0.8)")
        flag(each, "exclude", action="append", default=[], metavar="FILE", help="leave out queries that stand there")
        flag(each, "seed", type=int, default=42)
        flag(each, "on-bad-row", choices=("error", "skip"), default="error")
    args = parser.parse_args(argv)
    if args.command != "sample" and not 0 <= args.near_duplicates <= 1:
        parser.error("--near-duplicates must be between 0 and 1")
    args.argv = list(argv)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of domains are data: any console prints them somehow
    try:
        {"sample": sample_command, "label": label_command, "split": split_command}[args.command](args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # of standard output, or a path that no system takes
        print(f"error: {error.strerror}: {error.filename or 'standard output'}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
