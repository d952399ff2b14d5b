"""Make the embedded demo: problems with honest budgets, and a tiny backbone to train on them. Offline, in seconds.

    python data/demo.py                                      # writes data/demo/
    python train_sft_l4.py --config data/demo/config.json    # then trains on it

No budget is made up. Every row is a problem that a function below really solves, writing each step out as a person
would; `optimal_budget` is the number of tokens in that worked solution. How hard a problem is shows partly in the query
(how many digits, disks, towns) and partly only on solving it (how soon a search ends, when a remainder comes back), so
a good predictor beats surface statistics and none can be perfect. To read a solution, from the folder data/:

    python -c "import demo; print(demo.make_problem(demo.gcd, 0).solution)"

The rows are the same bytes on every machine and Python version; their hashes stand at the foot of this file.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from operator import mul
from pathlib import Path
from random import Random
from typing import Any

SEED = 1337
ROWS_PER_FAMILY = {"train": 300, "val": 40, "test": 40}
VOCABULARY = 2048  # tokens of the backbone's tokenizer
CONTEXT = 2048  # tokens the backbone can read
OUTPUT = Path(__file__).resolve().parent / "demo"

# What the demo changes in the CONFIG of train_sft_l4.py; paths are relative to the repository's root.
DEMO_CONFIG = {
    "model_name": "data/demo/backbone",
    "train_path": "data/demo/train.jsonl",
    "val_path": "data/demo/val.jsonl",
    "test_path": "data/demo/test.jsonl",
    "output_dir": "checkpoints/demo",
    "log_dir": "logs/demo",
    "lora_r": 0,
    "num_epochs": 6,
    "learning_rate": 0.001,
    "target_transform": "log",
    "max_tokens_per_micro_batch": 1024,
}

# Llama 3's pre-tokenizer, for ASCII: a word with the space before it, up to three digits, a run of punctuation with the
# newlines after it, white space. The real vocabulary cuts rare words further, so this counts slightly low, but it needs
# no vocabulary: the labels cannot change with a library's version.
# https://github.com/meta-llama/llama-models/blob/main/models/llama3/tokenizer.py
TOKEN_PATTERN = r"[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]{1,3}| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

Row = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """A query, the steps that solve it, and where they lead."""

    query: str
    steps: Sequence[str]
    answer: str

    @property
    def solution(self) -> str:
        """Return the whole worked solution, whose tokens are the budget."""
        return "\n".join([*self.steps, f"Answer: {self.answer}"])


def count_tokens(text: str) -> int:
    """Return the number of tokens by TOKEN_PATTERN.

    >>> re.findall(TOKEN_PATTERN, "12345 = 5 * 2469.")
    ['123', '45', ' =', ' ', '5', ' *', ' ', '246', '9', '.']
    >>> count_tokens("12345 = 5 * 2469.")
    10
    """
    return len(re.findall(TOKEN_PATTERN, text))


def skewed(rng: Random, low: int, high: int) -> int:
    """Return an integer from low to high, small ones more often: most problems are short, a few very long."""
    return rng.randrange(low, rng.randrange(low, high + 1) + 1)


def with_digits(rng: Random, count: int) -> int:
    """Return a random integer of `count` decimal digits."""
    return rng.randrange(10 ** (count - 1), 10**count)


def one_of(rng: Random, *phrasings: str) -> str:
    """Return one way to ask."""
    return rng.choice(phrasings)


def listed(items: Sequence[object]) -> str:
    """Return the items with commas between them."""
    return ", ".join(map(str, items))


# ----------------------------------------------------------------------------------------------------------------------
# Maths
# ----------------------------------------------------------------------------------------------------------------------


def multiplication(rng: Random) -> Problem:
    """Multiply two integers digit by digit with carries: the length shows in the query."""
    a, b = (with_digits(rng, skewed(rng, 1, 36)) for _ in range(2))
    query = one_of(
        rng,
        f"What is {a} * {b}?",
        f"Multiply {a} by {b} by hand and give the exact product.",
        f"Calculate {a} times {b}. No calculator, please show the long multiplication.",
    )
    steps, total = [f"Multiply {a} by each digit of {b}, from the right."], 0
    for place, digit in enumerate(map(int, reversed(str(b)))):
        carry, written = 0, ""
        for figure in map(int, reversed(str(a))):
            product = figure * digit + carry
            steps.append(f"{figure} * {digit} + {carry} = {product}: write {product % 10}, carry {product // 10}.")
            carry, written = product // 10, f"{product % 10}{written}"
        line = int(f"{carry}{written}") * 10**place
        steps.append(f"With {place} zeros behind it the line is {line}. Sum so far: {total} + {line} = {total + line}.")
        total += line
    assert total == a * b
    return Problem(query, steps, str(total))


def gcd(rng: Random) -> Problem:
    """Run Euclid's algorithm, half the time with Bezout's coefficients: how many divisions it takes is hidden."""
    common = with_digits(rng, skewed(rng, 1, 8))
    b, a = sorted(common * with_digits(rng, skewed(rng, 1, 30)) for _ in range(2))
    bezout = rng.choice((False, True))
    query = one_of(
        rng,
        f"What is the greatest common divisor of {a} and {b}?",
        f"Run Euclid's algorithm on {a} and {b}.",
        f"Compute gcd({a}, {b}).",
    )
    query += f" Also find integers x and y such that {a}x + {b}y equals the gcd." if bezout else ""
    steps, (r, s), (x, u), (y, v) = [], (a, b), (1, 0), (0, 1)
    while s:
        q = r // s
        steps.append(f"{r} = {q} * {s} + {r - q * s}.")
        if bezout:
            steps.append(f"x: {x} - {q} * ({u}) = {x - q * u}. y: {y} - {q} * ({v}) = {y - q * v}.")
        (r, s), (x, u), (y, v) = (s, r - q * s), (u, x - q * u), (v, y - q * v)
    assert r == math.gcd(a, b) == a * x + b * y
    return Problem(query, steps, f"{r}, with x = {x} and y = {y}" if bezout else str(r))


def factorization(rng: Random) -> Problem:
    """Factor by trial division: a prime and a smooth number look alike and differ a hundredfold."""
    exponent = rng.randrange(1, 8)
    number = rest = rng.randrange(10**exponent, 4 * 10**exponent)
    query = one_of(
        rng,
        f"What is the prime factorization of {number}?",
        f"Is {number} prime? If not, write it as a product of primes.",
        f"Decompose the number {number} into its prime factors by trial division.",
    )
    steps, factors = [f"Divide {number} by 2, 3 and then by the neighbours of every multiple of 6."], []
    for divisor in itertools.chain((2, 3), (k + side for k in itertools.count(6, 6) for side in (-1, 1))):
        while rest % divisor == 0:
            steps.append(f"{rest} mod {divisor} = 0. {divisor} is a factor and {rest // divisor} is left.")
            factors.append(divisor)
            rest //= divisor
        if divisor * divisor > rest:
            break
        steps.append(f"{rest} mod {divisor} = {rest % divisor}.")
    if rest > 1:
        steps.append(f"{divisor} squared exceeds {rest}, so {rest} is prime.")
        factors.append(rest)
    assert math.prod(factors) == number
    return Problem(query, steps, " * ".join(map(str, factors)))


def repeating_decimal(rng: Random) -> Problem:
    """Divide until a remainder comes back: the length of the period hides in the denominator's factors."""
    denominator = skewed(rng, 3, 1500)
    numerator = remainder = rng.randrange(1, denominator)
    query = one_of(
        rng,
        f"Write {numerator}/{denominator} as a decimal and mark the repeating block.",
        f"How long is the repeating part of {numerator} divided by {denominator}, and what is it?",
        f"Do the long division {numerator} / {denominator} until the digits repeat or stop.",
    )
    steps, digits, first_seen = [], "", dict[int, int]()
    while remainder and remainder not in first_seen:
        first_seen[remainder] = len(digits)
        digit, rest = divmod(10 * remainder, denominator)
        steps.append(f"{10 * remainder} / {denominator} = {digit}, remainder {rest}.")
        digits, remainder = f"{digits}{digit}", rest
    if not remainder:
        assert int(digits) * denominator == numerator * 10 ** len(digits)
        return Problem(query, [*steps, "Nothing is left over."], f"0.{digits}, which does not repeat")
    start, end = first_seen[remainder], len(digits)
    assert (int(digits) - int(digits[:start] or "0")) * denominator == numerator * (10**end - 10**start)
    steps.append(f"The remainder {remainder} was there before digit {start + 1}: the digits repeat from that one.")
    return Problem(query, steps, f"0.{digits[:start]}({digits[start:]}), a period of {end - start}")


def modular_power(rng: Random) -> Problem:
    """Raise to a power modulo m by squaring and multiplying along the exponent's bits: visible in the query."""
    exponent, modulus = with_digits(rng, skewed(rng, 1, 40)), with_digits(rng, skewed(rng, 1, 20)) + 1
    base = rng.randrange(2, modulus + 9)
    query = one_of(
        rng,
        f"Compute {base}^{exponent} mod {modulus}.",
        f"What is the remainder when {base}^{exponent} is divided by {modulus}?",
        f"Find {base} to the power {exponent} modulo {modulus} by square-and-multiply.",
    )
    steps, value = [f"In binary the exponent is {exponent:b}. Start with 1."], 1
    for bit in f"{exponent:b}":
        square = value * value
        steps.append(f"Bit {bit}. Square: {value} * {value} = {square}, which is {square % modulus}.")
        value = square % modulus
        if bit == "1":
            steps.append(f"Multiply: {value} * {base} = {value * base}, which is {value * base % modulus}.")
            value = value * base % modulus
    assert value == pow(base, exponent, modulus)
    return Problem(query, steps, str(value))


def linear_system(rng: Random) -> Problem:
    """Solve by elimination with fractions: the size shows in the query, how unwieldy the fractions get does not."""
    n = skewed(rng, 2, 7)
    names, values = "xyzuvwt"[:n], [rng.randrange(-9, 10) for _ in range(n)]
    matrix = [[rng.randrange(-9, 10) for _ in names] for _ in names]
    rows = [[*map(Fraction, row), Fraction(sum(map(mul, row, values)))] for row in matrix]
    sides = [" ".join(f"{a:+}{name}" for a, name in zip(row, names, strict=True)).lstrip("+") for row in matrix]
    told = listed([f"{side} = {row[-1]}" for side, row in zip(sides, rows, strict=True)])
    query = one_of(
        rng,
        f"Solve the system of equations: {told}.",
        f"Find {listed(names)} by Gaussian elimination: {told}. If there is no single solution, say so.",
        f"Which {listed(names)} satisfy all of these at once? {told}",
    )
    steps: list[str] = []
    for column in range(n):
        pivot = next((row for row in rows[column:] if row[column]), None)
        if pivot is None:
            return Problem(query, [*steps, f"No equation is left with {names[column]}."], "there is no single solution")
        rows.remove(pivot)
        rows.insert(column, pivot)
        for other in [row for row in rows if row is not pivot and row[column]]:
            factor = other[column] / pivot[column]
            steps.append(f"Subtract {factor} times equation {column + 1} to remove {names[column]}.")
            for k in range(column, n + 1):
                steps.append(f"{other[k]} - {factor} * {pivot[k]} = {other[k] - factor * pivot[k]}.")
                other[k] -= factor * pivot[k]
    solution = [row[-1] / row[i] for i, row in enumerate(rows)]
    steps += [f"{name} = ({row[-1]}) / ({row[i]})." for i, (name, row) in enumerate(zip(names, rows, strict=True))]
    assert solution == values
    return Problem(query, steps, listed([f"{name} = {value}" for name, value in zip(names, solution, strict=True)]))


# ----------------------------------------------------------------------------------------------------------------------
# Reasoning
# ----------------------------------------------------------------------------------------------------------------------

NAMES = ("Ana", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gina", "Hugo")
TOWNS = ("Ash", "Bay", "Cove", "Dell", "Elm", "Fern", "Glen", "Hill", "Isle", "Jade", "Knoll", "Lake", "Moor", "Nook")
RELATIONS: dict[str, Callable[[int, int], bool]] = {  # between the places of two people in a row
    "sits somewhere to the left of": lambda a, b: a < b,
    "sits somewhere to the right of": lambda a, b: a > b,
    "sits right next to": lambda a, b: abs(a - b) == 1,
    "does not sit next to": lambda a, b: abs(a - b) > 1,
}


def hanoi(rng: Random) -> Problem:
    """Gather scattered disks on one peg: where they start decides how many of the 2^n - 1 moves are needed."""
    disks, goal = skewed(rng, 2, 11), rng.choice("ABC")
    at = ["", *rng.choices("ABC", k=disks)]  # at[d]: the peg of disk d
    pegs = listed(at[1:])
    query = one_of(
        rng,
        f"Towers of Hanoi, disks 1 (smallest) to {disks} on pegs {pegs}. List the fewest moves to get all to {goal}.",
        f"Disks 1 (smallest) to {disks} lie on pegs {pegs}. What is the fastest way to move the Hanoi tower to {goal}?",
        f"Finish this Tower of Hanoi on peg {goal} in the fewest moves. Pegs of the disks, smallest first: {pegs}.",
    )
    steps: list[str] = []

    def gather(disk: int, target: str) -> None:  # brings this disk and all smaller ones to the target
        if disk and at[disk] == target:
            gather(disk - 1, target)
        elif disk:
            spare = "ABC".replace(at[disk], "").replace(target, "")
            gather(disk - 1, spare)
            assert all(peg == spare for peg in at[1:disk]), "a smaller disk is in the way"
            steps.append(f"Move disk {disk} from peg {at[disk]} to peg {target}.")
            at[disk] = target
            gather(disk - 1, target)

    gather(disks, goal)
    assert set(at[1:]) == {goal}
    return Problem(query, steps, f"{len(steps)} moves")


def water_jugs(rng: Random) -> Problem:
    """Search breadth first for a volume: how far the search runs is hidden."""
    p, q = rng.sample(range(2, skewed(rng, 8, 400)), 2)
    target = rng.randrange(1, max(p, q) + 1)
    query = one_of(
        rng,
        f"I have a tap and two jugs, A for {p} litres and B for {q} litres. How do I measure exactly {target} litres?",
        f"Jug A holds {p} litres, jug B {q}. Get {target} litres into one in the fewest steps or prove it impossible.",
        f"Water jug puzzle: sizes A = {p} and B = {q}, unlimited water, goal {target}. Is it possible, and how?",
    )
    steps, how, queue = list[str](), {(0, 0): "none"}, [(0, 0)]
    for a, b in queue:  # grows while it is read
        if target in (a, b):
            return Problem(query, [*steps, f"{(a, b)} holds {target}."], how[a, b].removeprefix("none, "))
        to_a, to_b = min(b, p - a), min(a, q - b)
        moves = {"fill A": (p, b), "fill B": (a, q), "empty A": (0, b), "empty B": (a, 0)}
        moves |= {"pour A into B": (a - to_b, b + to_b), "pour B into A": (a + to_a, b - to_a)}
        fresh = {state: move for move, state in moves.items() if state not in how}
        how |= {state: f"{how[a, b]}, {move}" for state, move in fresh.items()}
        queue += fresh
        reached = [f"{move} for {state}" for state, move in fresh.items()]
        steps.append(f"From {(a, b)}: {listed(reached) or 'nothing new'}.")
    assert target % math.gcd(p, q), "a multiple of the gcd can always be measured"
    return Problem(query, [*steps, f"Nothing else can be reached and no state holds {target}."], "it cannot be done")


def countdown(rng: Random) -> Problem:
    """Search depth first for a target number: luck decides between one try and all of them."""
    numbers, target = rng.sample(range(1, 16), rng.choice((3, 4, 4))), rng.randrange(16, 60)
    query = one_of(
        rng,
        f"Numbers game: make {target} from {listed(numbers)} with + - * /, using each number at most once.",
        f"Can you reach {target} with the numbers {listed(numbers)}? Each may be used once, whole numbers only.",
        f"Using {listed(numbers)}, no number twice, and + - * /, get {target} or show that it is impossible.",
    )
    steps: list[str] = []

    def search(values: list[int], done: list[str]) -> list[str]:
        for i, j in itertools.combinations(range(len(values)), 2):
            small, big = sorted((values[i], values[j]))
            rest = [value for k, value in enumerate(values) if k not in (i, j)]
            results = {"+": big + small, "*": big * small, "-": big - small, "/": big // small}
            for sign, result in results.items():
                if result in (0, big) or (sign == "/" and big % small):
                    continue  # nothing gained, or no whole number
                steps.append(f"{big} {sign} {small} = {result}, left: {listed([*rest, result])}.")
                if result == target:
                    return [*done, f"{big} {sign} {small} = {result}"]
                if found := search([*rest, result], [*done, f"{big} {sign} {small} = {result}"]):
                    return found
        return []

    found = search(numbers, [])
    return Problem(query, steps, listed(found) or "impossible, every combination has been tried")


def seating(rng: Random) -> Problem:
    """Seat people by clues that leave one order, trying place by place: the clues decide how soon a try fails."""
    people = rng.sample(NAMES, skewed(rng, 4, 7))
    truth, orders, clues = tuple(rng.sample(people, len(people))), list(itertools.permutations(people)), []
    while len(orders) > 1:
        a, b = rng.sample(people, 2)
        clue = (a, rng.choice(list(RELATIONS)), b)
        left = [order for order in orders if not breaks(order, clue)]
        if truth in left and len(left) < len(orders):
            orders = left
            clues.append(clue)
    told = ". ".join(map(" ".join, clues))
    query = one_of(
        rng,
        f"{listed(people)} sit in a row. {told}. Who sits where, from left to right?",
        f"{len(people)} friends share a bench: {listed(people)}. {told}. What is the order from left to right?",
        f"Find the seating order, left to right, of {listed(people)} along one side of a table. {told}.",
    )
    steps: list[str] = []

    def seat(row: tuple[str, ...]) -> tuple[str, ...]:
        if len(row) == len(people):
            return row
        for trial in [(*row, person) for person in people if person not in row]:
            broken = next((" ".join(clue) for clue in clues if breaks(trial, clue)), "")
            steps.append(f"{listed(trial)}? {f'No, we know that {broken}' if broken else 'That fits so far'}.")
            if not broken and (found := seat(trial)):
                return found
        return ()

    assert seat(()) == truth
    return Problem(query, steps, listed(truth))


def breaks(row: tuple[str, ...], clue: tuple[str, ...]) -> bool:
    """Return whether both people of a clue are in the row, and against it."""
    a, relation, b = clue
    return a in row and b in row and not RELATIONS[relation](row.index(a), row.index(b))


def shortest_path(rng: Random) -> Problem:
    """Run Dijkstra's algorithm on a road map until the goal is settled, which may be early or late."""
    towns = rng.sample(TOWNS, skewed(rng, 5, len(TOWNS)))
    pairs = [(rng.randrange(i), i) for i in range(1, len(towns))]  # reach every town; then some more roads
    pairs += rng.sample(list(itertools.combinations(range(len(towns)), 2)), rng.randrange(2 * len(towns)))
    roads = [(towns[i], towns[j], rng.randrange(1, 60)) for i, j in sorted(set(pairs))]
    start, goal = rng.sample(towns, 2)
    told = listed([f"{a}-{b} {km}" for a, b, km in roads])
    query = one_of(
        rng,
        f"Roads and their lengths in km: {told}. What is the shortest way from {start} to {goal}?",
        f"Find the shortest path from {start} to {goal} with Dijkstra's algorithm. Edges, both ways: {told}.",
        f"How far is it at least from {start} to {goal}, if the only roads (two-way, km) are {told}?",
    )
    steps, open_ways, settled = [], {start: (0, start)}, set[str]()
    while True:
        town = min((name for name in open_ways if name not in settled), key=lambda name: open_ways[name])
        distance, way = open_ways[town]
        settled.add(town)
        steps.append(f"The nearest open town is {town} at {distance} km.")
        if town == goal:
            return Problem(query, steps, f"{way}, {distance} km")
        for other, km in [(b if town == a else a, km) for a, b, km in roads if town in (a, b)]:
            if other not in settled:
                longer = other in open_ways and open_ways[other][0] <= distance + km
                verdict = f"no better than {open_ways[other][0]}" if longer else "the best so far"
                steps.append(f"{other} via {town} is {distance} + {km} = {distance + km} km away, {verdict}.")
                if not longer:
                    open_ways[other] = (distance + km, f"{way} - {other}")


# ----------------------------------------------------------------------------------------------------------------------
# Code
# ----------------------------------------------------------------------------------------------------------------------


def ask_output(rng: Random, code: str) -> str:
    """Return a query for what the code prints."""
    return one_of(
        rng,
        f"What does this Python program print?\n{code}",
        f"Trace this code by hand and give its output.\n\n{code}",
        f"{code}\n\nWhat is the output of the code above? Go through it step by step.",
        f"Without running it, tell me what this prints:\n```python\n{code}\n```",
    )


def printed(code: str) -> str:
    """Run the code of a query and return what it prints: the check on a trace."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(code, {})
    return output.getvalue().strip()


def while_loop(rng: Random) -> Problem:
    """Trace a loop that ends at a certain remainder: the source does not show when that is."""
    modulus, divisor, limit = skewed(rng, 60, 2000), skewed(rng, 2, 240), skewed(rng, 20, 600)
    x, factor, shift, stop = rng.randrange(modulus), rng.randrange(2, 30), rng.randrange(1, 90), rng.randrange(divisor)
    code = (
        f"x = {x}\ncount = 0\nwhile x % {divisor} != {stop} and count < {limit}:\n"
        f"    x = ({factor} * x + {shift}) % {modulus}\n    count += 1\nprint(x, count)"
    )
    steps, count = [f"x = {x}."], 0
    while x % divisor != stop and count < limit:
        total, count = factor * x + shift, count + 1
        steps.append(
            f"{x} % {divisor} = {x % divisor}, so go on: {factor} * {x} + {shift} = {total}, "
            f"x = {total % modulus}, count = {count}."
        )
        x = total % modulus
    steps.append(f"{x} % {divisor} = {x % divisor} and count = {count}, so the loop ends.")
    assert printed(code) == f"{x} {count}"
    return Problem(ask_output(rng, code), steps, f"{x} {count}")


def nested_loops(rng: Random) -> Problem:
    """Trace two loops, the inner one starting where the outer one stands: a product of sizes that the query shows."""
    i_end, j_end = sorted((skewed(rng, 2, 50), skewed(rng, 4, 100)))
    stride = skewed(rng, 2, 5)
    p, q = rng.randrange(2, 9), rng.randrange(2, 7)
    r, operator = rng.randrange(q), rng.choice("+-*")
    code = (
        f"total = 0\nfor i in range({i_end}):\n    for j in range(i, {j_end}, {stride}):\n"
        f"        if ({p} * i + j) % {q} == {r}:\n            total += i {operator} j\nprint(total)"
    )
    steps, total = [], 0
    for i in range(i_end):
        steps.append(f"i = {i}.")
        for j in range(i, j_end, stride):
            steps.append(f"j = {j}: {p * i + j} % {q} = {(p * i + j) % q}.")
            if (p * i + j) % q == r:
                gain = {"+": i + j, "-": i - j, "*": i * j}[operator]
                steps.append(f"Add {i} {operator} {j} = {gain}: total = {total + gain}.")
                total += gain
    assert printed(code) == str(total)
    return Problem(ask_output(rng, code), steps, str(total))


def recursion(rng: Random) -> Problem:
    """Expand a function that calls itself twice and remembers nothing: the calls grow exponentially."""
    a, b = rng.sample((1, 2, 3, 4), 2)
    base, plus, scale = rng.randrange(1, 4), rng.randrange(1, 5), rng.randrange(2, 5)
    argument = base + skewed(rng, 0, 4 * (a + b) - 2)
    code = (
        f"def f(n):\n    if n < {base}:\n        return n + {plus}\n"
        f"    return f(n - {a}) + {scale} * f(n - {b})\n\nprint(f({argument}))"
    )
    steps: list[str] = []

    def call(n: int) -> int:
        if n < base:
            steps.append(f"f({n}) = {n} + {plus} = {n + plus}.")
            return n + plus
        steps.append(f"f({n}) needs f({n - a}) and f({n - b}).")
        left, right = call(n - a), call(n - b)
        steps.append(f"f({n}) = {left} + {scale} * {right} = {left + scale * right}.")
        return left + scale * right

    value = call(argument)
    assert printed(code) == str(value)
    return Problem(ask_output(rng, code), steps, str(value))


def bubble_sort(rng: Random) -> Problem:
    """Bubble sort a list, stopping after a pass without a swap: quadratic in the list's length."""
    values = [rng.randrange(100) for _ in range(skewed(rng, 2, 50))]
    query = one_of(
        rng,
        f"Sort {values} with bubble sort and show every comparison. How many swaps are made?",
        f"Bubble sort this list step by step, ending at the first pass without swaps: {values}",
        f"How many swaps does bubble sort need for {values}? Show each pass.",
    )
    steps, goal, swaps = [], sorted(values), 0
    for end in range(len(values) - 1, 0, -1):
        swaps_before = swaps
        for i in range(end):
            left, right = values[i : i + 2]
            steps.append(f"{left} and {right}: {'swap' if left > right else 'keep'}.")
            values[i : i + 2] = sorted((left, right))
            swaps += left > right
        steps.append(f"After this pass: {listed(values)}.")
        if swaps == swaps_before:
            break
    assert values == goal
    return Problem(query, steps, f"{listed(values)}, after {swaps} swaps")


def stack_machine(rng: Random) -> Problem:
    """Run a straight program, showing the stack after each instruction: short, and visible in the query."""
    program, stack, steps = list[str](), list[int](), list[str]()
    for _ in range(skewed(rng, 4, 70)):
        word = rng.choice(("PUSH", "PUSH", "DUP", "ADD", "SUB", "MUL")) if len(stack) > 1 else "PUSH"
        if word == "PUSH":
            stack.append(rng.randrange(100))
            word = f"PUSH {stack[-1]}"
        elif word == "DUP":
            stack.append(stack[-1])
        else:
            b, a = stack.pop(), stack.pop()
            sign, result = {"ADD": ("+", a + b), "SUB": ("-", a - b), "MUL": ("*", a * b)}[word]
            stack.append(result % 1000)
            steps.append(f"{a} {sign} {b} = {result}, modulo 1000 that is {result % 1000}.")
        program.append(word)
        steps.append(f"{word}: the stack is {listed(stack)}.")
    query = one_of(
        rng,
        f"A stack machine computes modulo 1000; SUB means second minus top. What is left after {listed(program)}?",
        f"Execute this stack program (arithmetic mod 1000, SUB is second minus top): {' '.join(program)}",
        f"{'; '.join(program)}\n\nWhich values does this leave on the stack, modulo 1000? SUB means second minus top.",
    )
    return Problem(query, steps, listed(stack))


def string_rewriting(rng: Random) -> Problem:
    """Rewrite a string until no rule applies or the time is up: which comes first is hidden."""
    text, limit = "".join(rng.choices("abc", k=skewed(rng, 6, 50))), skewed(rng, 10, 200)
    lefts = rng.sample(["".join(pair) for pair in itertools.product("abc", repeat=2)], rng.choice((2, 3, 4)))
    rights = ["".join(rng.choices("abc", k=rng.choice((1, 2, 2, 2, 2, 3)))) for _ in lefts]
    rules = [(left, right if right != left else left[0]) for left, right in zip(lefts, rights, strict=True)]
    told = listed([f"{left} -> {right}" for left, right in rules])
    query = one_of(
        rng,
        f"Rewrite {text} by the first rule that matches, at its leftmost place, up to {limit} times. Rules: {told}.",
        f"String rewriting system {told}; earlier rules first, leftmost match. Rewrite {text}, {limit} steps at most.",
        f"Apply {told} to {text}: always the first rule that matches, at its leftmost place, {limit} times at most.",
    )
    steps: list[str] = []
    while len(steps) < limit and any(left in text for left in lefts):
        left, right = next(rule for rule in rules if rule[0] in text)
        text = text.replace(left, right, 1)
        steps.append(f"Step {len(steps) + 1}, {left} to {right}: {' '.join(text)}.")
    steps.append("That was the last step." if len(steps) == limit else "No rule matches.")
    return Problem(query, steps, text)


# ----------------------------------------------------------------------------------------------------------------------
# Rows, tokenizer, backbone
# ----------------------------------------------------------------------------------------------------------------------

FAMILIES: dict[str, tuple[Callable[[Random], Problem], ...]] = {
    "maths": (multiplication, gcd, factorization, repeating_decimal, modular_power, linear_system),
    "reasoning": (hanoi, water_jugs, countdown, seating, shortest_path),
    "code": (while_loop, nested_loops, recursion, bubble_sort, stack_machine, string_rewriting),
}


def make_problem(family: Callable[[Random], Problem], index: int, seed: int = SEED) -> Problem:
    """Return problem number `index` of a family: the same on every machine, whatever the other families do."""
    return family(Random(f"{seed}/{family.__name__}/{index}"))


def unique_rows(domain: str, family: Callable[[Random], Problem], seed: int) -> Iterator[Row]:
    """Yield the rows of one family without end, leaving out a query or worked solution that was there before."""
    seen: set[str] = set()
    for index in itertools.count():
        problem = make_problem(family, index, seed)
        query, solution = problem.query, problem.solution
        if query not in seen and solution not in seen:
            seen |= {query, solution}
            budget = count_tokens(solution)
            yield {"query": query, "optimal_budget": budget, "domain": domain, "family": family.__name__}


def make_rows(seed: int = SEED) -> dict[str, list[Row]]:
    """Return the shuffled rows of each split, every family at the same share of each."""
    splits: dict[str, list[Row]] = {split: [] for split in ROWS_PER_FAMILY}
    for domain, families in FAMILIES.items():
        for family in families:
            rows = unique_rows(domain, family, seed)
            for split, count in ROWS_PER_FAMILY.items():
                splits[split] += itertools.islice(rows, count)
    for split, shuffled in splits.items():
        Random(f"{seed}/{split}").shuffle(shuffled)
    return splits


def to_jsonl(rows: Sequence[Row]) -> bytes:
    """Return the rows as the bytes of a JSONL file."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def print_summary(splits: dict[str, list[Row]]) -> None:
    """Print what was made, to be compared with the foot of this file."""
    print(f"{'split':5}  {'rows':>5}  sha256")
    for split, rows in splits.items():
        print(f"{split:5}  {len(rows):5}  {hashlib.sha256(to_jsonl(rows)).hexdigest()}")
    print(f"\n{'budget in tokens':17}  {'rows':>5}  {'min':>6}  {'median':>6}  {'p90':>6}  {'max':>6}")
    everything = list(itertools.chain(*splits.values()))
    for family in [*(family.__name__ for families in FAMILIES.values() for family in families), "all"]:
        budgets = sorted(row["optimal_budget"] for row in everything if family in (row["family"], "all"))
        quantiles = [budgets[(len(budgets) - 1) * percent // 100] for percent in (0, 50, 90, 100)]
        print(f"{family:17}  {len(budgets):5}  " + "  ".join(f"{value:6}" for value in quantiles))


def train_tokenizer(queries: Sequence[str]) -> Any:
    """Return a byte-level BPE tokenizer trained on the queries; as Llama 3's, it adds BOS and no EOS."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|pad|>"}
    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(TOKEN_PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence([split, to_bytes]), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # so that any text can be encoded
        show_progress=False,
    )
    bpe.train_from_iterator(queries, trainer)
    bos = special["bos_token"]
    bpe.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))])
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_input_names=names, model_max_length=CONTEXT, **special)


def make_backbone(tokenizer: Any, seed: int = SEED) -> Any:
    """Return a two-layer Llama of random weights, 0.7 million of them, for the tokenizer's vocabulary."""
    import torch
    from transformers import LlamaConfig, LlamaModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # saving takes no time worth a bar
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaModel(config)


def main() -> None:
    """Write data/demo/ and print what is in it."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    splits = make_rows()
    print_summary(splits)
    tokenizer = train_tokenizer([row["query"] for row in splits["train"]])
    backbone = make_backbone(tokenizer)
    (OUTPUT / "backbone").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=OUTPUT) as folder:  # on the same disk, so each file moves in whole
        scratch = Path(folder)
        for split, rows in splits.items():
            (scratch / f"{split}.jsonl").write_bytes(to_jsonl(rows))
        (scratch / "config.json").write_bytes(f"{json.dumps(DEMO_CONFIG, indent=2)}\n".encode())
        tokenizer.save_pretrained(scratch / "backbone")
        backbone.save_pretrained(scratch / "backbone")
        for path in [path for path in scratch.rglob("*") if path.is_file()]:
            path.replace(OUTPUT / path.relative_to(scratch))
    print(f"\nwrote {OUTPUT}")


if __name__ == "__main__":
    main()


# What it should print (rows and budgets do not depend on library versions):
# train   5100  f9cb42ff4a7219e5eba83422c3e921138ef733fc2815b48487dfdff5e508498d
# val      680  e2052f9b0156c667d3f53baf71c54df2812a59b5a67b7ca30c4fa3e7cfcb8bf2
# test     680  3f355c12166c02a8cab1a03e879e54c56846c8b16c2d9246b27f46867522520f
# all 6460 rows: min 5, median 419, p90 3594, max 29636 tokens
