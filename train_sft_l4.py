#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch==2.13.0",
#     "transformers==5.20.2",
#     "peft==0.21.2",
#     "accelerate==1.15.0",
#     "tqdm==4.70.1",
#     "numpy==2.2.6",
#     "scikit-learn==1.7.2",
# ]
# ///
"""Train, evaluate and use a budget model: how many reasoning tokens does a query need?

A large reasoning model thinks before it answers. The budget model reads the query alone and predicts, in tokens,
how long that thinking will be: a LoRA-adapted backbone, the hidden state of the last token, a three-layer MLP head.

    python train_sft_l4.py                                              # train on CONFIG
    python train_sft_l4.py --config data/demo/config.json --num_epochs 1    # train with overrides
    python train_sft_l4.py evaluate --checkpoint checkpoints/best_model.pt --data data/test.jsonl
    python train_sft_l4.py predict  --checkpoint checkpoints/best_model.pt "Prove that sqrt(2) is irrational"
    python train_sft_l4.py predict  --checkpoint checkpoints/best_model.pt --input queries.jsonl --output budgets.jsonl

Exit codes: 0 done; 2 unusable arguments, data or checkpoint; 130 / 143 stopped by SIGINT / SIGTERM with the run
saved; 1 a defect of this script.

Letters in shapes: B examples, T tokens, D width of the backbone's hidden states.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import gc
import hashlib
import heapq
import inspect
import io
import itertools
import json
import logging
import math
import os
import random
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib import metadata, util
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

# transformers, peft, accelerate and scikit-learn take seconds to import: they are imported where they are used.

# ----------------------------------------------------------------------------------------------------------------------
# 1. CONFIG
# ----------------------------------------------------------------------------------------------------------------------

CONFIG: dict[str, Any] = {
    # --- data: JSONL, one {"query": "...", "optimal_budget": 512} a line ---
    "train_path": "data/train.jsonl",      # what is learnt
    "val_path": "data/val.jsonl",          # chooses the best epoch; no such file: val_fraction of the training rows
    "test_path": "data/test.jsonl",        # scored once, at the end, with the best checkpoint; no such file: skipped
    "val_fraction": 0.1,                   # share of the training rows held out when there is no val_path file
    "max_train_examples": 0,               # train on this many rows, drawn by seed; 0 = all
    "balance_by": "none",                  # domain | budget = every domain, or tenth of the budgets, is drawn as often
    "max_length": 512,                     # tokens of a query with its template; longer ones lose their middle
    "on_bad_row": "error",                 # error = refuse the file | skip = drop the row and count it
    "allow_leakage": False,                # True: go on although a training query stands in val or test too

    # --- model ---
    "model_name": "meta-llama/Llama-3.2-3B-Instruct",  # name on the Hugging Face hub, or a local folder
    "lora_r": 32,                          # rank of the adapters; 0 = train the whole backbone (small ones only)
    "lora_alpha": 64,                      # an adapter's output is scaled by lora_alpha / lora_r
    "lora_dropout": 0.05,                  # before each adapter; the backbone's own dropout is off
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],  # adapted
    "head_dropout": 0.1,                   # after each of the head's two hidden layers
    "target_transform": "tokens",          # tokens | log = learn the logarithm: relative errors count, not absolute

    # --- optimization: every optimizer step sees batch_size * grad_accum_steps examples, on any number of GPUs ---
    "batch_size": 2,                       # only the product of these two matters: micro-batches are cut by tokens,
    "grad_accum_steps": 16,                # see max_tokens_per_micro_batch
    "num_epochs": 3,                       # passes over the training rows; the best checkpoint is kept
    "learning_rate": 2e-4,                 # peak, of adapters and head alike
    "lr_schedule": "linear",               # after the warm-up: linear (to 0) | cosine (to 0) | constant
    "warmup_steps": 500,                   # optimizer steps; never more than a tenth of the run
    "warmup_ratio": 0.0,                   # > 0: warm-up as a share of the run, in place of warmup_steps
    "weight_decay": 0.01,                  # of matrices; biases and norms are not decayed
    "max_grad_norm": 1.0,                  # gradients are clipped to this L2 norm; 0 = not clipped
    "huber_delta": 1000.0,                 # tokens; squared error below, linear above (log: as seen from the median)

    # --- speed and memory ---
    "max_tokens_per_micro_batch": 2048,    # padding included; halved when GPU memory runs out: the gradient of a step
                                           # stays the same sum, only the dropout masks are drawn otherwise
    "attention": "auto",                   # packed = queries end to end, no padding | padded | auto = packed if it can
    "activation_checkpointing": "auto",    # off | on = recompute every layer in the backward pass: slower, far less
                                           # memory | auto = as few layers as the memory of the GPU asks for
    "quantization": "none",                # nf4 = backbone in 4 bits (needs bitsandbytes): the 3B model on 8 GB, slower

    # --- evaluation, saving, logging ---
    "eval_every": 0,                       # optimizer steps between validations; 0 = at the end of each epoch only
    "early_stopping_patience": 0,          # stop after this many validations without a new best; 0 = never
    "save_every_minutes": 5.0,             # between writes of last.pt; it is also written after each validation
    "output_dir": "checkpoints",           # for best_model.pt, last.pt and epoch_1.pt, ...
    "log_dir": "logs",                     # for training_history.json, the figures and the predictions
    "resume": "auto",                      # auto = go on with an unfinished run in output_dir | off | a checkpoint
    "overwrite": False,                    # True: start anew although output_dir holds a run
    "tracker": "none",                     # none | tensorboard | wandb | trackio, beside logs/training_history.json
    "seed": 42,                            # of the first weights, the order of the rows and the dropout masks
}

# What the backbone reads. A query that is too long loses tokens from its middle, never from this template.
PROMPT_TEMPLATE = "Query: {query}\nReasoning tokens needed:"

Config = Mapping[str, Any]  # CONFIG with its overrides: read, never written

CHOICES: dict[str, tuple[str, ...]] = {
    "balance_by": ("none", "domain", "budget"),
    "on_bad_row": ("error", "skip"),
    "target_transform": ("tokens", "log"),
    "lr_schedule": ("linear", "cosine", "constant"),
    "attention": ("auto", "packed", "padded"),
    "activation_checkpointing": ("auto", "off", "on"),
    "quantization": ("none", "nf4"),
    "tracker": ("none", "tensorboard", "wandb", "trackio"),
}
# Keys that may differ between a run and its continuation: they change where and how it runs, not what is learnt.
FREE_ON_RESUME = {
    "train_path", "val_path", "test_path", "max_tokens_per_micro_batch", "attention",
    "activation_checkpointing", "save_every_minutes", "output_dir", "log_dir", "resume", "overwrite", "tracker",
}


# ----------------------------------------------------------------------------------------------------------------------
# 2. Command line
# ----------------------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """A problem the user can mend. `main` prints its message, without a traceback, and exits with code 2."""


def config_source() -> str:
    """Return the CONFIG block of this file, comments included: the reference of every key."""
    source = Path(__file__).read_text(encoding="utf-8")
    return source[source.index("CONFIG: dict") : source.index("# What the backbone reads")].rstrip()


def parse_value(text: str, default: Any) -> Any:
    """Read a command-line string as the type of `default`.

    >>> parse_value("1e-4", 2e-4), parse_value("query,value", ["q_proj"]), parse_value("false", True)
    (0.0001, ['query', 'value'], False)
    """
    if isinstance(default, bool):  # before int: bool is a subclass of int
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise ValueError(f"expected true or false, got {text!r}")
        return text.lower() in ("true", "1", "yes")
    if isinstance(default, list):
        return [item.strip() for item in text.split(",") if item.strip()]
    return type(default)(text)


def read_config_file(path: str) -> dict[str, Any]:
    """Return the overrides in a JSON file; a whole number may stand for a float."""
    try:
        overrides = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read --config {path}: {error}") from None
    if not isinstance(overrides, dict):
        raise UserError(f"--config {path}: expected one JSON object, got {type(overrides).__name__}")
    problems = []
    for key, value in overrides.items():
        if key not in CONFIG:
            problems.append(f"unknown key {key!r}")
            continue
        wanted = type(CONFIG[key])
        name = "a list of strings" if wanted is list else wanted.__name__
        if wanted is float and type(value) is int and abs(value) < 2**53:  # beyond it, no float is the same number
            overrides[key] = float(value)
        elif type(value) is not wanted or (wanted is list and not all(isinstance(item, str) for item in value)):
            problems.append(f"{key} must be {name}, got {value!r}")
    if problems:
        raise UserError(f"--config {path}: " + "; ".join(problems))
    return overrides


def parse_train_arguments(argv: Sequence[str]) -> dict[str, Any]:
    """Return CONFIG with the overrides of `--config FILE` and of the flags, flags winning. CONFIG stays as it is."""
    parser = argparse.ArgumentParser(
        prog="train_sft_l4.py",
        usage="%(prog)s [evaluate | predict] [--config FILE.json] [--KEY VALUE ...]",
        description=__doc__,
        epilog=f"Every key below is a flag. `evaluate --help` and `predict --help` list theirs.\n\n{config_source()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.json", help="override several keys at once")
    for key, default in CONFIG.items():
        # A flag that is left out stays out of the namespace, so that it does not override the file.
        bare: dict[str, Any] = {"nargs": "?", "const": "true"} if isinstance(default, bool) else {}
        names = dict.fromkeys((f"--{key}", f"--{key.replace('_', '-')}"))
        parser.add_argument(*names, dest=key, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **bare)
    given = vars(parser.parse_args(argv))
    config_file = given.pop("config")
    cfg = copy.deepcopy(CONFIG) | (read_config_file(config_file) if config_file else {})
    problems = []
    for key, text in given.items():
        try:
            cfg[key] = parse_value(text, CONFIG[key])
        except ValueError:
            problems.append(f"--{key}: expected {type(CONFIG[key]).__name__}, got {text!r}")
    if problems:
        raise UserError("; ".join(problems))
    validate_config(cfg)
    return cfg


def validate_config(cfg: Config) -> None:
    """Raise one UserError that names every value that cannot work."""
    infinite = [f"{key} must be finite, got {value}" for key, value in cfg.items()
                if isinstance(value, float) and not math.isfinite(value)]
    if infinite:
        raise UserError("; ".join(infinite))
    problems = [f"{key} must be one of {', '.join(choices)}, got {cfg[key]!r}" for key, choices in CHOICES.items()
                if cfg[key] not in choices]
    at_least = {
        "max_length": 16, "batch_size": 1, "grad_accum_steps": 1, "num_epochs": 1, "max_tokens_per_micro_batch": 1,
        "lora_r": 0, "lora_alpha": 1, "warmup_steps": 0, "weight_decay": 0, "max_grad_norm": 0,
        "max_train_examples": 0, "eval_every": 0, "early_stopping_patience": 0, "save_every_minutes": 0, "seed": 0,
    }
    problems += [f"{key} must be at least {low}, got {cfg[key]}"
                 for key, low in at_least.items() if not cfg[key] >= low]
    problems += [f"{key} must be greater than 0, got {cfg[key]}"
                 for key in ("learning_rate", "huber_delta") if not cfg[key] > 0]
    problems += [f"{key} must be at least 0 and below 1, got {cfg[key]}"
                 for key in ("lora_dropout", "head_dropout", "warmup_ratio") if not 0 <= cfg[key] < 1]
    if cfg["seed"] >= 2**32:
        problems.append(f"seed must be below 2**32, got {cfg['seed']}")
    if not 0 < cfg["val_fraction"] <= 0.5:
        problems.append(f"val_fraction must be above 0 and at most 0.5, got {cfg['val_fraction']}")
    problems += [f"{key} must not be empty" for key in ("train_path", "model_name", "output_dir", "log_dir",
                 "lora_target_modules", "resume") if not cfg[key]]
    if cfg["quantization"] != "none" and not cfg["lora_r"]:
        problems.append("quantization goes with adapters: lora_r must be at least 1")
    optional = {"tracker tensorboard": "tensorboard", "tracker wandb": "wandb", "tracker trackio": "trackio",
                "quantization nf4": "bitsandbytes"}
    for setting in (f"tracker {cfg['tracker']}", f"quantization {cfg['quantization']}"):
        if setting in optional and util.find_spec(optional[setting]) is None:
            problems.append(f"{setting} needs a package: pip install {optional[setting]}")
    if problems:
        raise UserError("; ".join(problems))


def parse_command(command: str, argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of `evaluate` or `predict`; everything else they need is in the checkpoint."""
    parser = argparse.ArgumentParser(prog=f"train_sft_l4.py {command}", allow_abbrev=False)

    def flag(name: str, **options: Any) -> None:
        parser.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), dest=name, **options)

    flag("checkpoint", required=True, metavar="FILE.pt", help="for example checkpoints/best_model.pt")
    flag("model_name", metavar="NAME", help="where the backbone is, if not where it was in training")
    flag("on_bad_row", choices=CHOICES["on_bad_row"], default="error", help="skip: leave bad rows out and count them")
    flag("max_tokens_per_micro_batch", type=int, metavar="N", help="padding included (default: the training run's)")
    if command == "evaluate":
        flag("data", required=True, metavar="FILE.jsonl", help="rows with query and optimal_budget")
        flag("train_path", metavar="FILE.jsonl", help="rows to fit the baselines on (default: the training run's)")
        flag("log_dir", metavar="DIR", help="for DATA_metrics.json and DATA_predictions.jsonl (default: the run's)")
        flag("plot", metavar="FILE.png", help="draw predicted against true budgets (needs matplotlib)")
    else:
        parser.add_argument("queries", nargs="*", help="queries to predict, each in quotes")
        flag("merge_adapters", action="store_true", help="add the adapters to the weights: faster, rounded on a GPU")
        flag("input", metavar="FILE.jsonl", help="queries, one JSON object a line; other fields are kept")
        flag("output", metavar="FILE.jsonl", help="the same rows with predicted_budget (default: standard output)")
    args = parser.parse_args(argv)
    if command == "predict" and bool(args.queries) == bool(args.input):
        parser.error("give queries as arguments or --input FILE.jsonl, one of the two")
    if command == "predict" and args.output and not args.input:
        parser.error("--output goes with --input")
    if args.max_tokens_per_micro_batch is not None and args.max_tokens_per_micro_batch < 1:
        parser.error("--max_tokens_per_micro_batch must be at least 1")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# 3. Runtime: device, files, signals, log
# ----------------------------------------------------------------------------------------------------------------------


def pick_device() -> torch.device:
    """Return the accelerator of this machine, or the CPU where there is none."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def describe_device(device: torch.device) -> str:
    """Return one line: name and memory."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    import psutil  # comes with accelerate

    return f"{device.type}, {torch.get_num_threads()} threads, {psutil.virtual_memory().total / 2**30:.1f} GiB memory"


def versions() -> dict[str, str]:
    """Return what decides whether a run can be repeated: package versions and the GPU's name."""
    packages = ("torch", "transformers", "peft", "accelerate", "numpy", "scikit-learn")
    found = {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in packages}
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file that appears under `path` whole, at the end of the block, or not at all.

    It is written beside its place, flushed to the disk, then renamed: a kill or a full disk leaves the old file.
    """
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all. NaN is refused: not every reader of JSON knows it."""
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=1, allow_nan=False).encode())


def json_line(value: Any) -> bytes:
    r"""Return one line of JSONL. An unpaired surrogate, which UTF-8 cannot hold, stays a JSON escape.

    >>> json_line({"query": chr(0xE9) + chr(0xD800)})
    b'{"query": "\xc3\xa9\\ud800"}\n'
    """
    return json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace") + b"\n"


class Stopped(Exception):
    """A signal asked the run to end; everything needed to go on is saved."""


class StopSignal:
    """Remembers SIGINT or SIGTERM, so that the run ends between two steps. A second signal ends it at once."""

    def __init__(self) -> None:
        self.number = 0  # of the signal that came; 0 = none

    def listen(self) -> None:
        """Take the signals over until one comes."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: object) -> None:
        self.number = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)


def forget_stdout() -> None:
    """Send standard output nowhere from now on: whoever read it is gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class RunLog:
    """What a run says and records: lines on the console, training_history.json, and a tracker if one is set."""

    def __init__(self, accelerator: Any, log_dir: str) -> None:
        self.accelerator = accelerator
        self.path = Path(log_dir) / "training_history.json"
        self.history: dict[str, Any] = {"config": {}, "versions": versions(), "steps": [], "validations": []}

    def say(self, text: str = "") -> None:
        """Print a line, once, whatever the number of processes; a progress bar stays below it."""
        if self.accelerator.is_main_process:
            try:
                tqdm.write(text)
                sys.stdout.flush()  # into a file or a pipe as it happens
            except BrokenPipeError:  # `| tee train.log` ended by the same Ctrl-C: the run still has to be saved
                forget_stdout()

    def record(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append a record to the history and send its numbers to the tracker."""
        self.history[kind].append({"step": step, **values})
        numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, (int, float))}
        self.accelerator.log(numbers, step=step)

    def save(self) -> None:
        """Write the history, whole."""
        if self.accelerator.is_main_process:
            write_json(self.path, self.history)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Data: rows, splits, encoding, micro-batches
# ----------------------------------------------------------------------------------------------------------------------


LONGEST_BUDGET = 1e7  # tokens; no model thinks longer, and exp() of a wild prediction stays finite


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a data file."""

    query: str
    budget: float  # tokens; NaN where only queries are read
    domain: str
    group: str  # rows of one group stay on one side of a split
    censored: bool  # the trace hit its cap: the real budget is at least `budget`
    fields: dict[str, Any]  # the whole object, as it was read
    place: str  # path:line


def parse_row(line: bytes, place: str, labelled: bool) -> Row:
    """Return one line of JSONL as a Row.

    Raises:
        ValueError: the row cannot be used; the message says which field and what it holds.
    """
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object, got {show(fields)}")
    query = fields.get("query")
    if not isinstance(query, str) or not query.strip():
        raise ValueError(f"query must be a non-empty string, got {show(query)}")
    name = "budget" if "budget" in fields and "optimal_budget" not in fields else "optimal_budget"
    budget: Any = fields.get(name) if labelled else math.nan
    if labelled and (type(budget) not in (int, float) or not 0 < budget < sys.float_info.max):
        raise ValueError(f"{name} must be a finite number > 0, got {show(budget)}")
    if budget > LONGEST_BUDGET:
        raise ValueError(f"{name} must be at most {LONGEST_BUDGET:,.0f}, got {show(budget)}")
    censored = fields.get("censored")
    if not isinstance(censored, (bool, type(None))):
        raise ValueError(f"censored must be true or false, got {show(censored)}")
    domain, group = (fields.get(key) for key in ("domain", "group"))
    return Row(query, float(budget), "" if domain is None else str(domain), query if group is None else str(group),
               bool(censored), fields, place)


def show(value: Any) -> str:
    """Return a value as JSON, shortened, for a message."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def iter_rows(path: str, labelled: bool) -> Iterator[Row | str]:
    """Yield each line of a JSONL file as a Row, or as the message that says what is wrong with it."""
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                place = f"{path}:{number}"
                try:
                    yield parse_row(line, place, labelled)
                except ValueError as error:
                    yield f"{place}: {error}"
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def listing(problems: Sequence[str], total: int) -> str:
    """Return the first 20 problems, a line each, and how many there are beyond them."""
    more = [f"... and {total - 20:,} more"] if total > 20 else []
    return "\n".join(f"  {line}" for line in [*problems[:20], *more])


def usable_rows(path: str, labelled: bool, on_bad_row: str, say: Callable[[str], None]) -> Iterator[Row]:
    """Yield the rows of a file of any size, in file order.

    Raises:
        UserError: the file is missing or has no usable row; or, at its end, it has bad rows that are not to be skipped.
    """
    n_rows, n_bad, first_bad = 0, 0, []
    for item in iter_rows(path, labelled):
        if isinstance(item, Row):
            n_rows += 1
            yield item
        else:
            n_bad += 1
            first_bad += [item] if n_bad <= 20 else []
    if n_bad and on_bad_row == "error":
        raise UserError(f"{path}: {n_bad:,} bad rows (--on_bad_row skip drops them):\n{listing(first_bad, n_bad)}")
    if n_bad:
        say(f"{path}: {n_bad:,} bad rows skipped, the first: {first_bad[0]}")
    if not n_rows:
        raise UserError(f"{path}: no usable rows")


def hold_out(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split rows into training and validation by group, the same share of every budget decile.

    The order inside a decile is a hash of (seed, group): the split is the same on every machine, whatever the order of
    the file, and hardly moves when rows are added.
    """
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row.budget)
    by_decile: list[list[str]] = [[] for _ in range(10)]
    for group, decile in zip(groups, budget_deciles([float(np.median(each)) for each in groups.values()]), strict=True):
        by_decile[decile].append(group)
    held_out: set[str] = set()
    n_before = 0
    for members in by_decile:
        # The running total is rounded, not each decile's share: a small file gives something up too.
        n_wanted = math.floor(0.5 + fraction * (n_before + len(members))) - math.floor(0.5 + fraction * n_before)
        held_out.update(sorted(members, key=functools.partial(stable_hash, seed))[:n_wanted])
        n_before += len(members)
    if not held_out or len(held_out) == len(groups):
        raise UserError(f"cannot hold out {fraction:.0%} of {len(groups)} groups for validation: write a val_path file")
    return [row for row in rows if row.group not in held_out], [row for row in rows if row.group in held_out]


def stable_hash(seed: int, text: str) -> bytes:
    """Return a hash that is the same in every process and on every machine."""
    return hashlib.sha256(f"{seed}/{text}".encode("utf-8", "replace")).digest()


def budget_deciles(budgets: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return each budget's decile among them, 0 to 9, shape (N,)."""
    edges = np.quantile(budgets, np.arange(0.1, 0.95, 0.1))
    return np.searchsorted(edges, budgets, side="left")


def refuse_leakage(train: Sequence[Row], others: Sequence[Row]) -> None:
    """Raise a UserError that names validation and test rows whose query or group stands in the training rows too."""
    seen: dict[str, str] = {}
    for row in train:
        seen.setdefault(row.query.strip(), row.place)
        seen.setdefault(row.group.strip(), row.place)
    leaks = []
    for row in others:
        for what, text in (("query", row.query), ("group", row.group)):
            if text.strip() in seen:
                leaks.append(f"{row.place}: same {what} as {seen[text.strip()]}")
                break
    if leaks:
        raise UserError(f"{len(leaks):,} rows leak from the training set (remove them, or --allow_leakage):\n"
                        f"{listing(leaks, len(leaks))}")


def load_splits(cfg: Config, say: Callable[[str], None]) -> dict[str, list[Row]]:
    """Return the rows of "train", "val" and, where there is a file, "test", checked for leakage."""
    splits = {"train": list(usable_rows(cfg["train_path"], True, cfg["on_bad_row"], say))}
    for name in ("val", "test"):
        if Path(cfg[f"{name}_path"]).is_file():
            splits[name] = list(usable_rows(cfg[f"{name}_path"], True, cfg["on_bad_row"], say))
    if "val" not in splits:
        say(f"No file {cfg['val_path']}: holding out {cfg['val_fraction']:.0%} of the training rows")
        splits["train"], splits["val"] = hold_out(splits["train"], cfg["val_fraction"], cfg["seed"])
    if not cfg["allow_leakage"]:
        refuse_leakage(splits["train"], [row for name in ("val", "test") for row in splits.get(name, [])])
    if 0 < cfg["max_train_examples"] < len(splits["train"]):
        chosen = random.Random(cfg["seed"]).sample(range(len(splits["train"])), cfg["max_train_examples"])
        splits["train"] = [splits["train"][i] for i in sorted(chosen)]
    if all(row.censored for row in splits["val"]):
        raise UserError("every validation row is censored: no error can be measured on them")
    return splits


def fingerprint_rows(splits: Mapping[str, Sequence[Row]]) -> str:
    """Return a hash of what is learnt from, so that a resumed run can tell whether the data changed under it."""
    digest = hashlib.sha256()
    for name in ("train", "val"):
        for row in splits[name]:
            digest.update(json.dumps([name, row.query, row.budget, row.censored]).encode())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Examples:
    """Encoded rows: what training and evaluation work on."""

    ids: list[list[int]]
    budget: np.ndarray  # (N,) tokens
    censored: np.ndarray  # (N,) bool

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(ids) for ids in self.ids]


def cut_middle(ids: list[int], max_length: int) -> list[int]:
    """Drop tokens from the middle: the template, at both ends, stays whole, and so do a query's first and last words.

    >>> cut_middle([1, 2, 3, 4, 5, 6, 7], 4)
    [1, 2, 6, 7]
    """
    if len(ids) <= max_length:
        return ids
    tail = max_length // 2
    return ids[: max_length - tail] + ids[len(ids) - tail :]


def encode(tokenizer: Any, queries: Sequence[str], max_length: int, template: str) -> tuple[list[list[int]], int]:
    """Return the token ids of each query inside the template, and how many queries had to be cut.

    Text that spells a special token stays text (split_special_tokens), and unpaired surrogates, which UTF-8 cannot
    hold, become question marks.
    """
    prompts = [template.format(query=query).encode("utf-8", "replace").decode() for query in queries]
    encoded = tokenizer(prompts, split_special_tokens=True, verbose=False)["input_ids"] if prompts else []
    return [cut_middle(list(ids), max_length) for ids in encoded], sum(len(ids) > max_length for ids in encoded)


def encode_rows(rows: Sequence[Row], model: BudgetRegressionModel) -> tuple[Examples, int]:
    """Return the rows encoded for `model`, and how many queries had to be cut."""
    ids, n_cut = encode(model.tokenizer, [row.query for row in rows], model.max_length, model.prompt_template)
    budget = np.array([row.budget for row in rows])
    return Examples(ids, budget, np.array([row.censored for row in rows], dtype=bool)), n_cut


def sampling_weights(rows: Sequence[Row], balance_by: str) -> np.ndarray | None:
    """Return how likely each row is to be drawn, (N,), so that every class of rows is drawn as often; None = once each.

    The classes are the domains, or the tenths of the budgets.
    """
    if balance_by == "none":
        return None
    classes = [row.domain for row in rows] if balance_by == "domain" else budget_deciles([row.budget for row in rows])
    _, class_of, counts = np.unique(classes, return_inverse=True, return_counts=True)
    return 1 / (len(counts) * counts[class_of])


def epoch_order(n_examples: int, seed: int, epoch: int, weights: np.ndarray | None = None) -> list[int]:
    """Return the order of the examples in an epoch: a pure function, so that a resumed run sees the same one.

    With weights, (N,), as many examples are drawn by them, some more than once.
    """
    rng = np.random.default_rng([seed, epoch])
    drawn = rng.permutation(n_examples) if weights is None else rng.choice(n_examples, n_examples, p=weights)
    return drawn.tolist()


def plan_packed(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Deal examples, longest first, into as few micro-batches as hold them, alike in tokens; there is no padding.

    Args:
        lengths: tokens of each example.
        max_tokens: of a micro-batch; a longer example gets a micro-batch of its own.

    >>> plan_packed([3, 9, 4, 8], max_tokens=12)
    [[1, 0], [3, 2]]
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for n_bins in itertools.count(max(1, math.ceil(sum(lengths) / max_tokens))):
        bins: list[list[int]] = [[] for _ in range(n_bins)]
        least_full = [(0, number) for number in range(n_bins)]  # a heap: tokens, bin
        for i in order:
            tokens, number = least_full[0]
            bins[number].append(i)
            heapq.heapreplace(least_full, (tokens + lengths[i], number))
        if all(tokens <= max_tokens or len(bins[number]) == 1 for tokens, number in least_full):
            break
    return [members for members in bins if members]


def plan_padded(lengths: Sequence[int], max_tokens: int, overhead: int = 32) -> list[list[int]]:
    """Cut examples, longest first, into micro-batches of similar length with the least work in all.

    Args:
        lengths: tokens of each example.
        max_tokens: of a micro-batch, padding included; a longer example gets a micro-batch of its own.
        overhead: what a micro-batch costs beside its tokens, in tokens: it weighs padding against many small ones.

    >>> plan_padded([3, 9, 4, 8], max_tokens=18)
    [[1, 3], [2, 0]]
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    least, begin_of = [0], [0]  # over the first n examples: the least work, and where its last micro-batch begins
    for end in range(1, len(order) + 1):
        options = []
        for begin in range(end - 1, -1, -1):
            tokens = (end - begin) * lengths[order[begin]]
            if tokens > max_tokens and begin < end - 1:
                break
            options.append((least[begin] + tokens + overhead, begin))
        work, begin = min(options)
        least.append(work)
        begin_of.append(begin)
    plan, end = [], len(order)
    while end:
        plan.append(order[begin_of[end] : end])
        end = begin_of[end]
    return plan[::-1]


def collate(ids: Sequence[Sequence[int]], packed: bool) -> Tensor:
    """Return examples in one row, one after the other, (1, N); or padded on the right to the longest, (B, T).

    Padding is not attended to; its id, 0, is in every vocabulary.

    >>> collate([[5, 6], [7]], packed=True).tolist(), collate([[5, 6], [7]], packed=False).tolist()
    ([[5, 6, 7]], [[5, 6], [7, 0]])
    """
    if packed:
        return torch.tensor([list(itertools.chain.from_iterable(ids))])
    width = max(len(row) for row in ids)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in ids])


# ----------------------------------------------------------------------------------------------------------------------
# 5. Model
# ----------------------------------------------------------------------------------------------------------------------


def send(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a tensor on `device` without waiting for what it still computes."""
    return torch.as_tensor(values, dtype=dtype).to(device, non_blocking=True)


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where each query lies in a packed row of N tokens."""

    lengths: list[int]  # of the B queries
    offsets: Tensor  # (B + 1,) int32: the first token of each, and N

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> Packing:
        """Return the packing of queries of these lengths."""
        return cls(lengths, send([0, *itertools.accumulate(lengths)], torch.int32, device))

    def position_ids(self) -> Tensor:
        """Return each token's place in its query, (1, N)."""
        starts = self.offsets[:-1].repeat_interleave(self.offsets.diff(), output_size=sum(self.lengths))
        return (torch.arange(len(starts), device=starts.device) - starts)[None]


def has_varlen_kernel(query: Tensor) -> bool:
    """Return whether `varlen_attn` computes such queries: bf16 and fp16 on a GPU, heads of usual widths."""
    width = query.shape[-1]
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and width % 8 == 0 and width <= 256


@functools.cache
def varlen_options(causal: bool) -> dict[str, Any]:
    """Return the flags of `varlen_attn`, which torch 2.10 to 2.13 name and take differently."""
    from torch.nn.attention.varlen import varlen_attn

    options = {"enable_gqa": True} | ({"window_size": (-1, 0), "is_causal": True} if causal else {})
    accepted = inspect.signature(varlen_attn).parameters
    return {name: value for name, value in options.items() if name in accepted}


def attend_packed(_module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: None = None, *,
                  packing: Packing, scaling: float, last_only: bool = False, **_options: Any) -> tuple[Tensor, None]:
    """Causal attention within each query of a packed row, as transformers' attention interface calls it.

    Args:
        query: (1, heads, N, width); where `last_only`, (1, heads, B, width): the last token of each query.
        key: (1, key heads, N, width); each serves heads / key heads heads.
        value: like key.
        packing: required: without it the queries would attend to each other.
        scaling: of the products of query and key.
        last_only: the query is the last token of each, which sees them all.

    Returns:
        The attended values, (1, N or B, heads, width), and None for the weights, which are not kept.
    """
    asked = [1] * len(packing.lengths) if last_only else packing.lengths
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves them in float32 if the embeddings are
    if has_varlen_kernel(query):
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))  # (N, heads, width)
        offsets = torch.arange(len(asked) + 1, dtype=torch.int32, device=q.device) if last_only else packing.offsets
        output: Any = varlen_attn(q, k, v, offsets, packing.offsets, max(asked), max(packing.lengths), scale=scaling,
                                  **varlen_options(causal=not last_only))
        return output.unsqueeze(0), None
    pieces = zip(query.split(asked, 2), key.split(packing.lengths, 2), value.split(packing.lengths, 2), strict=True)
    attended = [F.scaled_dot_product_attention(*piece, is_causal=not last_only, scale=scaling, enable_gqa=True)
                for piece in pieces]
    return torch.cat(attended, dim=2).transpose(1, 2), None


def last_layer_forward(layer: Any, hidden_states: Tensor, *, packing: Packing,
                       position_embeddings: tuple[Tensor, Tensor], **_options: Any) -> Tensor:
    """Run the last decoder layer for the last token of each query only, (1, N, D) -> (1, B, D): no other is read.

    The same arithmetic as LlamaDecoderLayer of transformers (Qwen3 adds norms of queries and keys).
    """
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    attention, last = layer.self_attn, packing.offsets[1:] - 1
    normed = layer.input_layernorm(hidden_states)

    def heads(linear: nn.Module, states: Tensor, norm: str = "") -> Tensor:  # (1, T, D) -> (1, heads, T, width)
        split = linear(states).unflatten(-1, (-1, attention.head_dim))
        return (getattr(attention, norm)(split) if hasattr(attention, norm) else split).transpose(1, 2)

    cos, sin = position_embeddings
    query = heads(attention.q_proj, normed[:, last], "q_norm")
    key, value = heads(attention.k_proj, normed, "k_norm"), heads(attention.v_proj, normed)
    query, _ = apply_rotary_pos_emb(query, query, cos[:, last], sin[:, last])
    _, key = apply_rotary_pos_emb(key, key, cos, sin)
    attended, _ = attend_packed(attention, query, key, value, packing=packing, scaling=attention.scaling,
                                last_only=True)
    hidden_states = hidden_states[:, last] + attention.o_proj(attended.flatten(-2))
    return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))


# Decoders whose last layer `last_layer_forward` computes; the tests hold packed against one by one for each of them.
PACKABLE = ("llama", "mistral", "qwen2", "qwen3")


def choose_packed(attention: str, backbone: Any, max_length: int) -> bool:
    """Return whether this backbone gets its queries, of at most `max_length` tokens, packed.

    Raises:
        UserError: it must, and cannot.
    """
    config = backbone.config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    packable = config.model_type in PACKABLE and max_length <= (window or max_length)
    if attention == "packed" and not packable:
        obstacle = f"attends to {window} tokens only" if config.model_type in PACKABLE else f"is a {config.model_type}"
        raise UserError(f"attention packed: {config.name_or_path} {obstacle}; what is packed are {', '.join(PACKABLE)} "
                        "that attend to max_length tokens")
    old_gpu = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)  # without varlen_attn
    return packable and attention != "padded" and not old_gpu


def set_packed(backbone: Any) -> None:
    """Let the backbone compute packed rows, (1, N) ids -> (1, B, D) hidden states of the last tokens."""
    from transformers import AttentionInterface

    AttentionInterface.register("packed", attend_packed)
    backbone.set_attn_implementation("packed")
    backbone.layers[-1].forward = functools.partial(last_layer_forward, backbone.layers[-1])


def is_causal(backbone: nn.Module) -> bool:
    """Return whether no token of this backbone attends to later ones."""
    flags = [module.is_causal for module in backbone.modules() if hasattr(module, "is_causal")]
    return bool(flags) and all(flags)


def checkpoint_activations(model: nn.Module, every: int) -> None:
    """Recompute every `every`-th layer in the backward pass instead of keeping its activations; 0 = none.

    Raises:
        UserError: the layers of this backbone do not offer it.
    """
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if every and not layers:
        raise UserError("activation_checkpointing on: this backbone's layers do not offer it")
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = every > 0 and number % every == 0
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)


def build_head(width: int, dropout: float) -> nn.Sequential:
    """Return the head, (B, D) -> (B, 1). Its last layer starts at zero, so that a fresh model predicts the median."""
    head = nn.Sequential(
        nn.Linear(width, 1024), nn.LayerNorm(1024), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(1024, 256), nn.LayerNorm(256), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(256, 1),
    )
    nn.init.zeros_(head[-1].weight)  # type: ignore[arg-type]
    nn.init.zeros_(head[-1].bias)  # type: ignore[arg-type]
    return head


def explain_loading(name: str, error: Exception) -> UserError:
    """Return what to do about a backbone or tokenizer that does not load."""
    reason = str(error).strip().split("\n")[0]
    if Path(name).is_dir():
        return UserError(f"cannot load the backbone in the folder {name}: {reason}")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return UserError(f"there is no folder {name} to load the backbone from: give another --model_name")
    return UserError(
        f"cannot load {name}: {reason}\n"
        f"  On the hub: accept the licence at https://huggingface.co/{name}, then run `hf auth login`.\n"
        "  Offline: give a local folder with --model_name."
    )


def load_tokenizer_and_backbone(name: str, dtype: torch.dtype, quantization: str) -> tuple[Any, Any]:
    """Return the tokenizer, and the backbone without a language-modelling head, its weights in `dtype`.

    Where `quantization` is nf4, its linear layers hold 4 bits a weight (https://arxiv.org/abs/2305.14314).

    Raises:
        UserError: it cannot be loaded; the message says what to do.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer, BitsAndBytesConfig

    if quantization != "none" and util.find_spec("bitsandbytes") is None:
        raise UserError(f"quantization {quantization} needs a package: pip install bitsandbytes")
    try:
        config = AutoConfig.from_pretrained(name)  # first: the quickest to tell that there is no access
        if config.is_encoder_decoder:
            raise UserError(f"{name} is an encoder-decoder: use a decoder or an encoder")
        for key, value in vars(config).items():
            if ("dropout" in key or "pdrop" in key) and isinstance(value, float):
                setattr(config, key, 0.0)  # adapters and head have their own; more of it only blurs a regression
        tokenizer = AutoTokenizer.from_pretrained(name)
        quantized = None if quantization == "none" else BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=quantization, bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype)
        backbone, info = AutoModel.from_pretrained(name, config=config, dtype=dtype, output_loading_info=True,
                                                   quantization_config=quantized)
        missing = [key for key in info["missing_keys"] if not key.startswith("pooler.")]  # we pool ourselves
        if missing:  # transformers would go on with random values
            raise UserError(f"cannot load {name}: its files lack {len(missing)} weights, the first {missing[0]}")
    except UserError:
        raise
    except Exception as error:  # whatever the readers of several formats meet in a damaged or foreign folder
        raise explain_loading(name, error) from None
    backbone.config.use_cache = False  # a cache costs memory, and with packed inputs lets examples see each other
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None  # BERT's: an unused weight has no gradient
    return tokenizer, backbone


def add_adapters(backbone: Any, cfg: Config) -> Any:
    """Return the backbone frozen, with LoRA adapters (https://arxiv.org/abs/2106.09685) in float32."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.modeling_layers import GradientCheckpointingLayer

    linears = sorted({name.rsplit(".", 1)[-1] for name, module in backbone.named_modules()
                      if getattr(module, "weight", None) is not None and module.weight.ndim == 2
                      and not isinstance(module, nn.Embedding)})
    unknown = [name for name in cfg["lora_target_modules"] if name not in linears]
    if unknown:
        raise UserError(f"lora_target_modules: {', '.join(unknown)} not in {cfg['model_name']}, "
                        f"whose linear layers are {', '.join(linears)}")
    adapted = get_peft_model(backbone, LoraConfig(
        r=cfg["lora_r"], lora_alpha=cfg["lora_alpha"], target_modules=list(cfg["lora_target_modules"])))
    dropout = SharedDropout(cfg["lora_dropout"])
    for module in adapted.modules():
        if isinstance(module, GradientCheckpointingLayer):
            # A layer that is recomputed gets the very tensor of its first pass, and has to draw its masks anew.
            module.register_forward_pre_hook(lambda *_: dropout.forget())
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False  # autocast casts the weights: a float32 copy of each input is waste
            module.lora_dropout["default"] = dropout
    return adapted


class SharedDropout(nn.Dropout):
    """Dropout that gives adapters with the same input (q, k and v; gate and up) one mask and one copy of it to keep.

    On a CPU, where torch draws slowly, an element's fate hangs on 16 random bits: a mask takes a sixth of the time.
    """

    latest: tuple[Tensor, Tensor] | None = None  # of a pass under way: it holds the graph, and so all activations

    def forward(self, states: Tensor) -> Tensor:
        """Return the states with elements dropped, or what was returned for this very tensor a moment ago."""
        if not self.training or not self.p:
            self.forget()
            return states
        if self.latest is None or self.latest[0] is not states:
            self.latest = (states, self._drop_on_cpu(states) if states.is_cpu else super().forward(states))
        return self.latest[1]

    def forget(self) -> None:
        """Let go of the latest input."""
        self.latest = None

    def _drop_on_cpu(self, states: Tensor) -> Tensor:
        draws = torch.empty(math.ceil(states.numel() / 4), dtype=torch.int64).random_(-(2**63), None)
        bits = draws.view(torch.int16)[: states.numel()].view(states.shape)
        return states.masked_fill(bits < round(2**16 * self.p) - 2**15, 0.0) / (1 - self.p)


def forget_dropped(model: nn.Module) -> None:
    """Let go of the last pass, which SharedDropout remembers."""
    for module in model.modules():
        if isinstance(module, SharedDropout):
            module.forget()


def fingerprint_weights(backbone: nn.Module) -> str:
    """Return a hash of names, shapes and some values of the backbone: adapters fit no other one, and load on many.

    Values are hashed as bf16, so that the same weights loaded as float32 on a CPU give the same hash.
    """
    digest = hashlib.sha256()
    for name, weight in backbone.named_parameters():
        if not weight.is_floating_point():
            continue  # packed 4-bit values, which may be rounded otherwise on another device
        flat = weight.detach().flatten()
        sample = flat[:: max(1, len(flat) // 64)].to(torch.bfloat16).view(torch.int16)
        digest.update(f"{name} {tuple(weight.shape)}".encode() + sample.cpu().numpy().tobytes())
    return digest.hexdigest()


class BudgetRegressionModel(nn.Module):
    """A backbone, its adapters and a regression head: token ids in, reasoning tokens out.

    Args:
        config: CONFIG or another mapping with its keys.
        dtype: of the frozen backbone and of the arithmetic inside it: bf16 on a GPU, float32 elsewhere (the default
            looks at the machine). Whatever is trained is kept in float32: bf16 weights under AdamW at small learning
            rates do not move.

    Raises:
        UserError: the backbone cannot be loaded, or the configuration does not fit it.
    """

    target_offset: Tensor
    target_scale: Tensor

    def __init__(self, config: Config, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype = dtype or (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
        self.prompt_template = PROMPT_TEMPLATE
        self.max_length = config["max_length"]
        self.max_tokens = config["max_tokens_per_micro_batch"]
        self.log_target = config["target_transform"] == "log"
        self.huber_delta = config["huber_delta"]

        weights_dtype = self.dtype if config["lora_r"] else torch.float32
        self.tokenizer, backbone = load_tokenizer_and_backbone(config["model_name"], weights_dtype,
                                                               config["quantization"])
        self._check_max_length(backbone)
        self.backbone_fingerprint = fingerprint_weights(backbone)
        self.packed = choose_packed(config["attention"], backbone, self.max_length)
        if self.packed:
            set_packed(backbone)
        self.causal = is_causal(backbone)
        checkpoint_activations(backbone, every=1 if config["activation_checkpointing"] == "on" else 0)
        self.head = build_head(backbone.config.get_text_config().hidden_size, config["head_dropout"])
        self.backbone = add_adapters(backbone, config) if config["lora_r"] else backbone
        # The head's output is in units of target_scale around target_offset, in tokens or their logarithm.
        self.register_buffer("target_offset", torch.tensor(0.0))
        self.register_buffer("target_scale", torch.tensor(1.0))
        self.register_state_dict_post_hook(self._drop_frozen)

    def _check_max_length(self, backbone: Any) -> None:
        longest = getattr(backbone.config, "max_position_embeddings", None) or self.max_length
        learnt = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
        if learnt is not None and learnt.padding_idx is not None:
            longest -= learnt.padding_idx + 1  # RoBERTa's positions begin behind the padding token's id
        template = encode(self.tokenizer, [""], self.max_length, self.prompt_template)[0][0]
        if not 2 * len(template) <= self.max_length <= longest:
            raise UserError(f"max_length must be between {2 * len(template)} (twice the template) and {longest} "
                            f"(the backbone's positions), got {self.max_length}")

    def set_target(self, median_budget: float) -> None:
        """Centre the output on the training median, in units of `huber_delta` tokens seen from there."""
        if self.log_target:
            self.target_offset.fill_(math.log(median_budget))
            self.target_scale.fill_(math.log1p(self.huber_delta / median_budget))
        else:
            self.target_offset.fill_(median_budget)
            self.target_scale.fill_(self.huber_delta)

    def to_scaled(self, tokens: Tensor) -> Tensor:
        """Return budgets in tokens, (B,), as the head sees them, (B,)."""
        return ((tokens.log() if self.log_target else tokens) - self.target_offset) / self.target_scale

    def to_tokens(self, scaled: Tensor) -> Tensor:
        """Return the head's output, (B,), in tokens, (B,): at least 1."""
        target = self.target_offset + self.target_scale * scaled
        tokens = target.clamp(max=math.log(LONGEST_BUDGET)).exp() if self.log_target else target
        return tokens.clamp(1.0, LONGEST_BUDGET)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, *,
                lengths: Sequence[int] | None = None, scaled: bool = False) -> Tensor:
        """Return the predicted budgets in tokens, (B,).

        Args:
            input_ids: (B, T), padded on either side; with `lengths` in its stead, what `collate` returned.
            attention_mask: (B, T), 1 for real tokens.
            lengths: B real tokens each.
            scaled: return the head's output instead, which the loss works on.
        """
        if attention_mask is not None:
            real = attention_mask.bool()
            lengths = real.sum(dim=1).tolist()
            rows = input_ids[real].split(lengths)
            input_ids = torch.cat(rows)[None] if self.packed else nn.utils.rnn.pad_sequence(rows, batch_first=True)
        elif lengths is None:
            raise TypeError("forward needs an attention_mask, or lengths")
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            hidden = self._last_hidden(input_ids, list(lengths))
        with torch.autocast(input_ids.device.type, enabled=False):  # bf16 outputs would step by 0.4 %
            output = self.head(hidden.float()).squeeze(-1)
        return output if scaled else self.to_tokens(output)

    def collate(self, ids: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Return encoded queries as the arguments of `forward`, on the model's device."""
        input_ids = collate(ids, self.packed).to(self.target_scale.device, non_blocking=True)
        return {"input_ids": input_ids, "lengths": [len(row) for row in ids]}

    def plan(self, lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
        """Return micro-batches of at most `max_tokens`, as lists of places in `lengths`, for `collate`."""
        if self.packed:
            return plan_packed(lengths, max_tokens)
        # A GPU reads all weights and launches all kernels anew for each micro-batch; a CPU is busy with few tokens.
        return plan_padded(lengths, max_tokens, overhead=32 if self.target_scale.device.type == "cpu" else 512)

    def _last_hidden(self, input_ids: Tensor, lengths: list[int]) -> Tensor:
        """Return the hidden state of each query's last token, (B, D), from (1, N) packed or (B, T) right-padded ids.

        Its place comes from the lengths, never from a token id: where the padding token is also the end-of-text token,
        a search for the id stops inside the text (https://github.com/huggingface/transformers/issues/35352).
        """
        if self.packed:
            packing = Packing.of(lengths, input_ids.device)
            return self.backbone(input_ids=input_ids, position_ids=packing.position_ids(), packing=packing,
                                 ).last_hidden_state[0]
        last = send(lengths, torch.int64, input_ids.device) - 1
        # Causal attention never looks to the right, where the padding is: without a mask its kernels are faster.
        mask = None if self.causal else (torch.arange(input_ids.shape[1], device=last.device) <= last[:, None]).long()
        hidden = self.backbone(input_ids=input_ids, attention_mask=mask).last_hidden_state
        return hidden[torch.arange(len(last), device=last.device), last]

    def predict(self, queries: Sequence[str], processes: Any = None) -> list[float]:
        """Return the budget of each query in tokens, in the order given. Round up for a request field.

        With several `processes` (accelerate's Accelerator), each computes a share and every one gets them all.
        """
        if isinstance(queries, str):
            raise TypeError("predict takes a list of queries, not one string")
        ids, _ = encode(self.tokenizer, queries, self.max_length, self.prompt_template)
        was_training = self.training
        try:
            return predict_encoded(self.eval(), ids, self.max_tokens, processes=processes).tolist()
        finally:
            self.train(was_training)

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: str = "auto", model_name: str = "",
                        merge: bool = False) -> BudgetRegressionModel:
        """Return a trained model on `device`, in eval mode, with its tokenizer.

        Args:
            path: a checkpoint that training wrote.
            device: "auto" (an accelerator if there is one), or a torch device.
            model_name: where the backbone is now, if not where it was in training.
            merge: add the adapters to the backbone's weights: faster for few queries at a time, and on a GPU rounded
                to bf16, so that budgets move a little.

        Raises:
            UserError: the file is not a whole checkpoint, or belongs to another backbone or head.
        """
        checkpoint = read_checkpoint(Path(path))
        cfg = {**CONFIG, **checkpoint["config"], "activation_checkpointing": "off"}
        cfg["model_name"] = model_name or cfg["model_name"]
        if merge and cfg["quantization"] != "none":
            raise UserError("merging would round the adapters to the 4 bits of the backbone: leave it out")
        place = pick_device() if device == "auto" else torch.device(device)
        model = cls(cfg, dtype=torch.bfloat16 if place.type == "cuda" else torch.float32)
        model.restore(checkpoint, Path(path), cfg["model_name"])
        model = model.to(place).eval()
        if merge and cfg["lora_r"]:
            model.backbone = model.backbone.merge_and_unload()
        return model

    def restore(self, checkpoint: Mapping[str, Any], path: Path, model_name: str) -> None:
        """Load adapters, head and template from a checkpoint after checking that they belong to this backbone."""
        if checkpoint["backbone_fingerprint"] != self.backbone_fingerprint:
            raise UserError(f"{path} was trained on another backbone than {model_name} as it is now "
                            f"(it says {checkpoint['config']['model_name']})")
        try:
            self.load_state_dict(checkpoint["model_state_dict"])
        except RuntimeError as error:
            raise UserError(f"{path} does not fit this model: {error}") from None
        self.prompt_template = checkpoint["prompt_template"]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load adapters and head, strict on those; the frozen backbone is not in a checkpoint."""
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = [key for key in result.missing_keys if key in self.state_dict()]
        if strict and (missing or result.unexpected_keys):
            raise RuntimeError(f"missing {missing[:3]}, unexpected {result.unexpected_keys[:3]}")
        return result

    @staticmethod
    def _drop_frozen(module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
        """Keep what training changes, adapters, head and buffers: 0.2 GB of the 3B model instead of 6.6."""
        trained = {prefix + name for name, parameter in module.named_parameters() if parameter.requires_grad}
        for key in [key for key in state_dict if key.startswith(f"{prefix}backbone.") and key not in trained]:
            del state_dict[key]


@torch.inference_mode()
def predict_encoded(model: BudgetRegressionModel, ids: Sequence[list[int]], max_tokens: int, *, title: str = "",
                    processes: Any = None, stop: StopSignal | None = None) -> np.ndarray:
    """Return the predicted budgets of encoded queries in tokens, shape (N,), in the order given.

    A batch for which the GPU has not enough memory is cut in two.

    Args:
        model: in eval mode.
        ids: token ids of each query.
        max_tokens: of a batch, padding included.
        title: of the progress bar; empty = no bar.
        processes: accelerate's Accelerator: each process computes a share, every one gets the whole.
        stop: looked at after every batch.

    Raises:
        Stopped: a signal came.
    """
    rank, n_processes = (processes.process_index, processes.num_processes) if processes else (0, 1)
    todo = model.plan([len(row) for row in ids], max_tokens)[rank::n_processes][::-1]
    done: list[tuple[list[int], Tensor]] = []  # fetched from the device at the end, so that it never waits for us
    with tqdm(total=len(ids), desc=title, leave=False, disable=None if title else True, unit=" queries") as bar:
        while todo:
            indices = todo.pop()
            try:
                done.append((indices, model(**model.collate([ids[i] for i in indices]))))
            except torch.OutOfMemoryError:
                if len(indices) == 1:
                    raise
                todo += [indices[1::2], indices[::2]]
                continue
            bar.update(len(indices) * n_processes)
            if stop is not None and stop.number:
                raise Stopped(stop.number)
    predicted = np.zeros(len(ids))
    for indices, tokens in done:
        predicted[indices] = tokens.double().cpu().numpy()
    if n_processes == 1:
        return predicted
    from accelerate.utils import reduce

    together = reduce(torch.tensor(predicted, dtype=torch.float32, device=processes.device), "sum")
    return together.double().cpu().numpy()


# ----------------------------------------------------------------------------------------------------------------------
# 6. Loss, schedule, optimizer
# ----------------------------------------------------------------------------------------------------------------------


def huber_sum(scaled: Tensor, target: Tensor, censored: Tensor) -> Tensor:
    """Return the sum of the Huber losses over a micro-batch; the step divides by its count of examples.

    Args:
        scaled: (B,), predictions in units of huber_delta.
        target: (B,), in the same units.
        censored: (B,) bool; such a target is a lower bound, so predicting more than it costs nothing.
    """
    error = scaled - target
    error = torch.where(censored, error.clamp(max=0), error)
    return F.huber_loss(error, torch.zeros_like(error), reduction="sum")


def warmup_length(cfg: Config, total_steps: int) -> tuple[int, int]:
    """Return the warm-up in optimizer steps, and what was asked for.

    It is at most a tenth of the run: a short run would be all warm-up.
    """
    wanted = round(cfg["warmup_ratio"] * total_steps) if cfg["warmup_ratio"] else cfg["warmup_steps"]
    return min(wanted, total_steps // 10), wanted


def lr_factor(step: int, warmup: int, total_steps: int, schedule: str) -> float:
    """Return the share of the peak learning rate at a step, counted from 0.

    >>> [round(lr_factor(step, warmup=2, total_steps=6, schedule="linear"), 2) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total_steps - warmup)
    return {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[schedule]


def build_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW over what is trained; matrices decay, biases and norms do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, fused=trained[0].is_cuda)


# ----------------------------------------------------------------------------------------------------------------------
# 7. Evaluation
# ----------------------------------------------------------------------------------------------------------------------

Metrics = dict[str, Any]  # metric -> number, or None where it is not defined (a rank correlation with a constant)


def regression_metrics(budget: np.ndarray, predicted: np.ndarray, censored: np.ndarray) -> Metrics:
    """Return the error metrics of predicted budgets; shares are between 0 and 1, the rest is in tokens.

    A censored budget is a lower bound: predicting less is an underrun, and nothing else can be said of such a row.

    Args:
        budget: (N,) tokens.
        predicted: (N,) tokens.
        censored: (N,) bool.

    Returns:
        rows, mae, rmse, mape, median_ape (median absolute percentage error), spearman, underrun_rate (predicted below
        the budget), overrun_rate, mean_underrun and mean_overrun (tokens missing or left over in such rows).
    """
    from scipy.stats import spearmanr
    from sklearn import metrics

    under = np.maximum(budget - predicted, 0.0)
    true, guess = budget[~censored], predicted[~censored]
    over = np.maximum(guess - true, 0.0)
    result: Metrics = {"rows": len(budget), "underrun_rate": float(np.mean(under > 0)),
                       "mean_underrun": float(under[under > 0].mean()) if under.any() else 0.0}
    if not len(true):
        return result
    varies = len(true) > 1 and np.ptp(true) > 0 and np.ptp(guess) > 0
    return {
        **result,
        "overrun_rate": float(np.mean(over > 0)),
        "mean_overrun": float(over[over > 0].mean()) if over.any() else 0.0,
        "mae": float(metrics.mean_absolute_error(true, guess)),
        "rmse": float(metrics.root_mean_squared_error(true, guess)),
        "mape": float(metrics.mean_absolute_percentage_error(true, guess)),
        "median_ape": float(np.median(np.abs(guess - true) / true)),
        "spearman": float(spearmanr(true, guess).statistic) if varies else None,
    }


def fit_baselines(rows: Sequence[Row]) -> Callable[[Sequence[Row]], dict[str, np.ndarray]]:
    """Fit what a GPU has to beat, and return a function from rows to each baseline's predictions in tokens.

    The training median, and tf-idf of words and word pairs, digits and punctuation included, with ridge regression and
    with boosted trees on the logarithm of the budget: each as strong as we could make it in a few lines.
    """
    from sklearn.ensemble import HistGradientBoostingRegressor
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge

    rows = [row for row in rows if not row.censored] or rows
    queries, budget = [row.query for row in rows], np.array([row.budget for row in rows])
    settings = {"ngram_range": (1, 2), "sublinear_tf": True, "token_pattern": r"\w+|[^\w\s]", "dtype": np.float32}
    wide = TfidfVectorizer(max_features=50_000, **settings).fit(queries)
    narrow = TfidfVectorizer(max_features=1_000, **settings).fit(queries)  # trees want it dense
    ridge = Ridge(alpha=1.0).fit(wide.transform(queries), np.log(budget))
    trees = HistGradientBoostingRegressor(loss="absolute_error", random_state=0)
    trees.fit(narrow.transform(queries).toarray(), np.log(budget))

    def predict(others: Sequence[Row]) -> dict[str, np.ndarray]:
        texts = [row.query for row in others]
        return {
            "tf-idf + trees": np.exp(trees.predict(narrow.transform(texts).toarray())),
            "tf-idf + ridge": np.exp(ridge.predict(wide.transform(texts))),
            "training median": np.full(len(texts), np.median(budget)),
        }

    return predict


def build_report(rows: Sequence[Row], predicted: np.ndarray, baselines: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the metrics over all rows, by domain, by budget decile, and of each baseline."""
    budget, censored = np.array([row.budget for row in rows]), np.array([row.censored for row in rows], dtype=bool)
    domains, deciles = np.array([row.domain for row in rows]), budget_deciles(budget)

    def metrics_of(chosen: np.ndarray) -> Metrics:
        bounds = {"min_budget": float(budget[chosen].min()), "max_budget": float(budget[chosen].max())}
        return bounds | regression_metrics(budget[chosen], predicted[chosen], censored[chosen])

    return {
        "metrics": regression_metrics(budget, predicted, censored),
        "baselines": {name: regression_metrics(budget, guess, censored) for name, guess in baselines.items()},
        "by_domain": {str(name): metrics_of(domains == name) for name in np.unique(domains)},
        "by_budget_decile": [metrics_of(deciles == decile) for decile in np.unique(deciles)],
    }


def one_line(text: str) -> str:
    """Return text from a data file so that any console can print it on one line."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


def format_metrics(name: str, metrics: Metrics) -> str:
    """Return one line of a table, at most 80 columns."""
    def number(key: str, form: str, factor: float = 1) -> str:
        value = metrics.get(key)
        return format("-" if value is None else format(value * factor, form), ">9")

    return (f"  {one_line(name)[:24]:<24}{metrics['rows']:>6,}{number('mae', ',.1f')}{number('median_ape', '.0f', 100)}"
            f"{number('spearman', '.3f')}{number('underrun_rate', '.1f', 100)}{number('mean_underrun', ',.0f')}")


def better_baselines(metrics: Metrics, baselines: Mapping[str, Metrics]) -> list[str]:
    """Return the baselines that are at least as good as the model, with their MAE."""
    mae = metrics.get("mae")
    return [f"{name} ({each['mae']:,.1f})" for name, each in baselines.items()
            if mae is not None and each["mae"] <= mae]


def say_report(report: Mapping[str, Any], title: str, say: Callable[[str], None]) -> None:
    """Print a report: the model beside the baselines, then by domain and by budget."""
    headings = ("MAE", "MdAPE %", "Spearman", "under %", "missing")
    say(f"\n{title[:26]:<26}{'rows':>6}" + "".join(f"{heading:>9}" for heading in headings))
    say(format_metrics("budget model", report["metrics"]))
    for name, metrics in report["baselines"].items():
        say(format_metrics(name, metrics))
    by_domain = sorted(report["by_domain"].items(), key=lambda item: -item[1]["rows"])
    if len(by_domain) > 1:
        say("by domain" + (f", the 10 largest of {len(by_domain)}" if len(by_domain) > 10 else ""))
        for name, metrics in by_domain[:10]:
            say(format_metrics(name or "(none)", metrics))
    say("by true budget")
    for metrics in report["by_budget_decile"]:
        say(format_metrics(f"{metrics['min_budget']:,.0f} to {metrics['max_budget']:,.0f}", metrics))
    better = better_baselines(report["metrics"], report["baselines"])
    if better:
        say(f"NOT BETTER than {', '.join(better)}\n(README: When the error is high)")


def write_report(report: Mapping[str, Any], rows: Sequence[Row], predicted: np.ndarray, stem: str, log_dir: str) -> str:
    """Write DIR/STEM_metrics.json and, a line a row, DIR/STEM_predictions.jsonl; return where."""
    write_json(Path(log_dir) / f"{stem}_metrics.json", report)
    path = Path(log_dir) / f"{stem}_predictions.jsonl"
    with atomic_file(path) as file:
        for row, tokens in zip(rows, predicted.tolist(), strict=True):
            file.write(json_line({**row.fields, "predicted_budget": round(tokens, 2)}))
    return f"Written: {path} and {stem}_metrics.json"


def plot_predictions(rows: Sequence[Row], predicted: np.ndarray, report: Mapping[str, Any], path: Path) -> None:
    """Draw predicted against true budgets on logarithmic axes, a dot a row, as a PNG."""
    from matplotlib.figure import Figure  # optional; `evaluate_command` says how to install it

    figure = Figure(figsize=(6.4, 6.0), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    axes.set(xlabel="true budget (tokens)", ylabel="predicted budget (tokens)")
    # Colours and marks of Okabe and Ito's palette, told apart by colour-blind readers too.
    looks = [("#0072B2", "o"), ("#E69F00", "^"), ("#009E73", "s"), ("#CC79A7", "D"), ("#56B4E9", "v"), ("#D55E00", "P")]
    largest = sorted(report["by_domain"], key=lambda name: -report["by_domain"][name]["rows"])[: len(looks) - 1]
    names = [row.domain if row.domain in largest else "other domains" for row in rows]
    for name, (colour, mark) in zip([*largest, "other domains"], looks, strict=False):
        at = [i for i, each in enumerate(names) if each == name]
        if at:
            axes.scatter([rows[i].budget for i in at], predicted[at], s=14, c=colour, marker=mark, alpha=0.5, lw=0,
                         label=one_line(name) or "queries")
    ends = [min(predicted.min(), *(row.budget for row in rows)), max(predicted.max(), *(row.budget for row in rows))]
    axes.plot(ends, ends, color="0.3", lw=1, label="predicted = true; starved below")
    mae, spearman = report["metrics"].get("mae"), report["metrics"].get("spearman")
    axes.set_title(f"{len(rows):,} queries" + (f", MAE {mae:,.0f} tokens" if mae is not None else "")
                   + (f", Spearman {spearman:.2f}" if spearman is not None else ""))
    for text in axes.legend(frameon=False, fontsize=8).get_texts():
        text.set_parse_math(False)  # a domain's name is a name, not a formula
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=130)


def rows_trained_on(cfg: Config, data_fingerprint: str, say: Callable[[str], None]) -> list[Row]:
    """Return the rows a checkpoint was trained on; where they cannot be told any more, its whole training file."""
    def quiet(_: str) -> None:
        pass

    with suppress(UserError):
        splits = load_splits({**cfg, "test_path": "", "allow_leakage": True}, quiet)
        if fingerprint_rows(splits) == data_fingerprint:
            return splits["train"]
    say(f"NOTE: {cfg['train_path']} or {cfg['val_path']} is not what the run had: baselines see all of the former")
    return list(usable_rows(cfg["train_path"], True, "skip", quiet))


def evaluate_command(args: argparse.Namespace, say: Callable[[str], None] = print) -> None:
    """Score a checkpoint on a file of rows, beside baselines fitted on the rows it was trained on."""
    if args.plot and util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: pip install matplotlib")
    rows = list(usable_rows(args.data, True, args.on_bad_row, say))
    checkpoint = read_checkpoint(Path(args.checkpoint))
    cfg = {**CONFIG, **checkpoint["config"]}
    cfg |= {key: getattr(args, key) for key in ("train_path", "log_dir") if getattr(args, key)}
    if args.train_path and not Path(args.train_path).is_file():
        raise UserError(f"cannot read {args.train_path}: no such file")
    model = BudgetRegressionModel.from_checkpoint(args.checkpoint, model_name=args.model_name or "")
    say(f"{args.checkpoint} on {describe_device(next(model.parameters()).device)}")
    examples, n_cut = encode_rows(rows, model)
    say(describe_rows(args.data, rows, n_cut))
    started = time.perf_counter()
    max_tokens = args.max_tokens_per_micro_batch or model.max_tokens
    predicted = predict_encoded(model, examples.ids, max_tokens, title="evaluate")
    seconds = time.perf_counter() - started

    baselines: dict[str, np.ndarray] = {}
    if Path(cfg["train_path"]).is_file():
        train_rows = rows_trained_on(cfg, checkpoint["data_fingerprint"], say)
        baselines = fit_baselines(train_rows)(rows)
        known = {row.query.strip() for row in train_rows}
        n_known = sum(row.query.strip() in known for row in rows)
        if n_known:
            say(f"WARNING: {n_known:,} of these queries were trained on: the figures flatter the model")
    else:
        say(f"No baselines: {cfg['train_path']} is not here; name the training rows with --train_path")
    report = build_report(rows, predicted, baselines)
    say_report(report, Path(args.data).name, say)
    say(f"{len(rows):,} queries in {seconds:.1f} s")
    say(write_report(report, rows, predicted, Path(args.data).stem, cfg["log_dir"]))
    if args.plot:
        plot_predictions(rows, predicted, report, Path(args.plot))
        say(f"Drawn: {args.plot}")


# ----------------------------------------------------------------------------------------------------------------------
# 8. Checkpoints
# ----------------------------------------------------------------------------------------------------------------------

CHECKPOINT_KEYS = (
    "epoch", "model_state_dict", "val_mae", "val_metrics", "config", "prompt_template", "backbone_fingerprint",
    "data_fingerprint",
)


@dataclasses.dataclass
class Progress:
    """Where a run is. With the seed it decides everything that follows: order, micro-batches and dropout masks."""

    epoch: int = 0  # epochs completed
    examples_seen: int = 0  # of the current epoch
    step: int = 0  # optimizer steps done
    evaluated_step: int = 0  # the last one that was validated
    loss_sum: float = 0.0  # over the current epoch's examples
    best_mae: float = math.inf
    best_epoch: float = 0.0
    validations_since_best: int = 0
    seconds: float = 0.0  # spent in steps, over all starts
    token_limit: int = 0  # of a micro-batch: max_tokens_per_micro_batch, or what was found to fit into memory
    finished: bool = False


def free_memory(model: nn.Module) -> None:
    """Give the memory of a failed pass back to the GPU."""
    forget_dropped(model)
    gc.collect()
    torch.cuda.empty_cache()


@dataclasses.dataclass
class Run:
    """A training run: what it works on, and how it gets in and out of a checkpoint."""

    cfg: Config
    accelerator: Any
    log: RunLog
    stop: StopSignal
    splits: dict[str, list[Row]]
    examples: dict[str, Examples]
    model: BudgetRegressionModel
    parallel_model: nn.Module  # the model as accelerate wraps it for several processes
    optimizer: Any
    scheduler: torch.optim.lr_scheduler.LambdaLR
    data_fingerprint: str
    progress: Progress = dataclasses.field(default_factory=Progress)
    val_metrics: Metrics = dataclasses.field(default_factory=dict)
    checkpoint_every: int = 0  # recompute the activations of every so-manieth layer; 0 = of none
    last_save: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def path(self) -> Path:
        """The folder of the checkpoints."""
        return Path(self.cfg["output_dir"])

    @property
    def step_size(self) -> int:
        """Examples of an optimizer step, over all processes."""
        return self.cfg["batch_size"] * self.cfg["grad_accum_steps"]

    def __post_init__(self) -> None:
        """Begin with the limit of the configuration."""
        self.progress.token_limit = self.cfg["max_tokens_per_micro_batch"]

    def use_less_memory(self, longest: int) -> None:
        """Halve the token limit after GPU memory ran out; once every micro-batch is one example, recompute all layers.

        Args:
            longest: tokens of the longest example that has to fit.

        Raises:
            UserError: nothing is left to shrink.
        """
        self.optimizer.zero_grad(set_to_none=True)
        free_memory(self.model)
        limit = self.progress.token_limit
        if limit > longest:
            self.progress.token_limit = limit // 2
            self.log.say(f"Out of GPU memory: max_tokens_per_micro_batch is {limit // 2:,} from here on, was {limit:,}")
        elif self.cfg["activation_checkpointing"] == "auto" and self.checkpoint_every != 1:
            self.recompute_layers(every=1)
            self.log.say("Out of GPU memory: every layer is recomputed from here on")
        else:
            raise UserError(f"out of GPU memory, though every micro-batch is one example of at most {longest:,} tokens:"
                            " --activation_checkpointing on, --quantization nf4, a smaller --max_length or "
                            "--model_name takes less")

    def recompute_layers(self, every: int) -> None:
        """Recompute every `every`-th layer in the backward pass from here on; 0 = none."""
        checkpoint_activations(self.model, every)
        self.checkpoint_every = every

    def save(self, name: str, *, resumable: bool = True) -> None:
        """Write output_dir/NAME, whole or not at all; without the optimizer it is a third of the size."""
        self.last_save = time.monotonic()
        if not self.accelerator.is_main_process:
            return
        self.log.save()
        payload: dict[str, Any] = {
            "epoch": self.progress.epoch,
            "model_state_dict": self.model.state_dict(),
            "val_mae": self.val_metrics.get("mae"),
            "val_metrics": self.val_metrics,
            "config": dict(self.cfg),
            "prompt_template": self.model.prompt_template,
            "backbone_fingerprint": self.model.backbone_fingerprint,
            "data_fingerprint": self.data_fingerprint,
            "versions": versions(),
        }
        if resumable:
            payload |= {
                "optimizer_state_dict": self.optimizer.state_dict(),
                "scheduler_state_dict": self.scheduler.state_dict(),
                "progress": dataclasses.asdict(self.progress),
                "history": self.log.history,
            }
        buffer = io.BytesIO()  # torch.save straight into a file ends the process on a full disk; writing bytes raises
        torch.save(payload, buffer)
        with atomic_file(self.path / name) as file:
            file.write(buffer.getbuffer())

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint, exactly where it was.

        Raises:
            UserError: its run differs from this one in something that decides what is learnt.
        """
        checkpoint = read_checkpoint(path, resumable=True)
        theirs = {**CONFIG, **checkpoint["config"]}  # a key that is newer than the run had its default's effect
        changed = [f"{key} was {theirs[key]!r}, is {self.cfg[key]!r}" for key in CONFIG
                   if key not in FREE_ON_RESUME and theirs[key] != self.cfg[key]]
        if checkpoint["data_fingerprint"] != self.data_fingerprint:
            changed.append("the training or validation rows changed")
        if changed:
            raise UserError(f"{path} belongs to a run that differs: {'; '.join(changed)}\n"
                            "  Go on with its settings, choose another --output_dir, or drop it with --overwrite.")
        self.model.restore(checkpoint, path, self.cfg["model_name"])
        self.optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        self.scheduler.load_state_dict(checkpoint["scheduler_state_dict"])
        self.progress = Progress(**checkpoint["progress"])
        limit = self.cfg["max_tokens_per_micro_batch"]
        if theirs["max_tokens_per_micro_batch"] != limit or not self.progress.token_limit:  # asked for since, or older
            self.progress.token_limit = limit
        self.val_metrics = dict(checkpoint["val_metrics"])
        self.log.history.update(checkpoint["history"])


def read_checkpoint(path: Path, *, resumable: bool = False) -> dict[str, Any]:
    """Return a checkpoint's content; only tensors, numbers, strings and containers are read, nothing is executed.

    Raises:
        UserError: there is no such file, or it is not a whole checkpoint of this program.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror}") from None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its unpickler and zip reader meet in broken bytes
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} is not a whole checkpoint ({reason[:100]}): use another one") from None
    missing = [key for key in CHECKPOINT_KEYS if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        raise UserError(f"{path} is not a checkpoint of this program: it has no {', '.join(missing)}")
    if resumable and "progress" not in checkpoint:
        raise UserError(f"{path} has no optimizer state to go on from: resume from last.pt or an epoch_*.pt")
    return checkpoint


def checkpoint_to_resume(cfg: Config) -> Path | None:
    """Return the checkpoint that the run goes on from, or None to start anew.

    Raises:
        UserError: a run stands in output_dir that would be overwritten.
    """
    folder, last = Path(cfg["output_dir"]), Path(cfg["output_dir"]) / "last.pt"
    is_named = cfg["resume"] not in ("auto", "off")
    if cfg["overwrite"] or not any(folder.glob("*.pt")):
        return Path(cfg["resume"]) if is_named else None
    remedy = "choose another --output_dir, or replace it with --overwrite"
    finished = False
    try:
        finished = read_checkpoint(last, resumable=True)["progress"]["finished"]
    except UserError as error:
        if not is_named:  # a named checkpoint goes on whatever became of last.pt
            raise UserError(f"{folder} holds checkpoints, but {error}\n  Name one with --resume, {remedy}") from None
    if finished:
        raise UserError(f"{folder} holds a finished run: {remedy}")
    if cfg["resume"] == "off":
        raise UserError(f"{folder} holds an unfinished run: go on with --resume auto, {remedy}")
    return Path(cfg["resume"]) if is_named else last


def check_folders(cfg: Config) -> None:
    """Raise a UserError if a folder to write into is not one, or must not be written."""
    for key in ("output_dir", "log_dir"):
        existing = nearest_existing(Path(cfg[key]))
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise UserError(f"{key} {cfg[key]}: cannot write into {existing}")


def nearest_existing(path: Path) -> Path:
    """Return the path, or the first folder above it that exists."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())


def check_space(cfg: Config, model: BudgetRegressionModel) -> None:
    """Raise a UserError if the checkpoints of this run will not fit on the disk."""
    weights = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    full = 3 * weights  # with AdamW's two moments
    # last.pt and the copy that replaces it, best_model.pt likewise, one file an epoch; a tenth for logs and the rest
    needed = 1.1 * ((2 + cfg["num_epochs"]) * full + 2 * weights)
    free = shutil.disk_usage(nearest_existing(Path(cfg["output_dir"]))).free
    if free < needed:
        raise UserError(f"{cfg['output_dir']}: the checkpoints need {needed / 1e6:,.0f} MB, the disk has "
                        f"{free / 1e6:,.0f} MB free: make room, or choose another --output_dir")


# ----------------------------------------------------------------------------------------------------------------------
# 9. Training
# ----------------------------------------------------------------------------------------------------------------------


def describe_rows(name: str, rows: Sequence[Row], n_cut: int) -> str:
    """Return one line of at most 80 columns: how many rows, and the quantiles of their budgets."""
    low, middle, high, most = np.quantile([row.budget for row in rows], [0, 0.5, 0.9, 1])
    cut = f"; {n_cut:,} cut" if n_cut else ""
    return f"{name}: {len(rows):,} rows, budget {low:,.0f} / {middle:,.0f} / {high:,.0f} / {most:,.0f}{cut}"


def accumulate_gradients(run: Run, indices: Sequence[int]) -> Tensor:
    """Run one step's training examples forward and backward; return the sum of their losses in this process, ().

    The gradient is the sum over all examples of the step divided by their count, however they are cut into
    micro-batches and shared among processes.
    """
    examples, device, n_processes = run.examples["train"], run.accelerator.device, run.accelerator.num_processes
    ranked = sorted(indices, key=lambda i: -len(examples.ids[i]))
    mine = ranked[run.accelerator.process_index :: n_processes]
    weight = 1.0 if mine else 0.0  # a process that got no example still takes part, with one that counts for nothing
    mine = mine or ranked[:1]
    lengths = [len(examples.ids[i]) for i in mine]
    plan = run.model.plan(lengths, run.progress.token_limit)
    loss_sum = torch.zeros((), device=device)
    for number, members in enumerate(plan, start=1):
        chosen = [mine[i] for i in members]
        batch = run.model.collate([examples.ids[i] for i in chosen])
        target = run.model.to_scaled(send(examples.budget[chosen], torch.float32, device))
        censored = send(examples.censored[chosen], torch.bool, device)
        is_last = number == len(plan)  # the processes exchange gradients once a step
        with nullcontext() if is_last else run.accelerator.no_sync(run.parallel_model):
            loss = weight * huber_sum(run.parallel_model(**batch, scaled=True), target, censored)
            # Averaging over processes divides by their number, which is undone here.
            run.accelerator.backward(loss * (n_processes / len(indices)))
        loss_sum += loss.detach()
    forget_dropped(run.model)
    return loss_sum


def fit_memory(run: Run) -> None:
    """Find how many layers must be recomputed for the longest micro-batch to fit into GPU memory, by running it.

    Raises:
        UserError: not even the longest example alone fits.
    """
    run.model.train()  # a backbone is loaded in eval mode, in which no layer is recomputed
    longest = max(run.examples["train"].ids, key=len)
    ladder = {"off": [0], "on": [1], "auto": [0, 4, 2, 1]}[run.cfg["activation_checkpointing"]]
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    # AdamW's moments are not there before the first step: two float32 values for each that is trained.
    n_bytes = 0 if run.optimizer.state else 2 * sum(parameter.nbytes for parameter in trained)
    moments = torch.empty(n_bytes, dtype=torch.uint8, device=run.accelerator.device)
    while True:
        ids = [longest] * max(1, run.progress.token_limit // len(longest))
        for every in ladder:
            run.recompute_layers(every)
            free_memory(run.model)
            torch.cuda.reset_peak_memory_stats()
            with suppress(torch.OutOfMemoryError):
                for parameter in trained:
                    parameter.grad = torch.zeros_like(parameter)  # what the second micro-batch of a step finds
                for batch in ([longest[:16]], ids):  # a short one first: kernels are loaded while there is room
                    run.model(**run.model.collate(batch), scaled=True).sum().backward()
                run.optimizer.zero_grad(set_to_none=True)
                forget_dropped(run.model)
                peak = torch.cuda.max_memory_allocated() / 2**30
                what = f"every {every} layers" if every > 1 else "every layer" if every else "no layer"
                run.log.say(f"Memory {peak:.1f} GiB at most for {len(longest) * len(ids):,} tokens, the largest "
                            f"micro-batch; recomputing {what}")
                del moments
                return
        run.use_less_memory(longest=len(longest))


def train_step(run: Run, indices: Sequence[int]) -> int:
    """Take one optimizer step on the training examples `indices` and record it; return a signal that came, or 0.

    Raises:
        UserError: the loss or the gradient is not finite; the weights are as they were before the step.
    """
    started, progress, accelerator = time.perf_counter(), run.progress, run.accelerator
    loss_sum = None
    while loss_sum is None:
        # Dropout masks are a function of (seed, step, process): a resumed run draws the same with nothing stored.
        stream = np.random.SeedSequence([run.cfg["seed"], progress.step, accelerator.process_index])
        torch.manual_seed(int(stream.generate_state(1)[0]))
        # In place of an except clause, which would keep the tensors of the failed attempt alive.
        with suppress(torch.OutOfMemoryError):
            loss_sum = accumulate_gradients(run, indices)
        if loss_sum is None and accelerator.num_processes > 1:  # the others may wait for gradients that were half sent
            raise UserError(f"out of GPU memory with micro-batches of {progress.token_limit:,} tokens: halve "
                            "--max_tokens_per_micro_batch; the run goes on from its last save")
        if loss_sum is None:
            run.use_less_memory(longest=max(len(run.examples["train"].ids[i]) for i in indices))
    # One exchange tells every process the loss, and a signal that any of them got.
    status = accelerator.gather(torch.stack([loss_sum, torch.full_like(loss_sum, run.stop.number)])[None])
    loss_total, signal_number = float(status[:, 0].sum()), int(status[:, 1].max())
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    norm = float(accelerator.clip_grad_norm_(trained, run.cfg["max_grad_norm"] or math.inf))
    if not (math.isfinite(loss_total) and math.isfinite(norm)):
        raise UserError(f"step {progress.step + 1}: the loss is {loss_total}, the gradient's norm {norm}; "
                        "last.pt is from before.\n  Lower --learning_rate, or look for damaged weights in the backbone")
    learning_rate = run.scheduler.get_last_lr()[0]
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    progress.step += 1
    progress.examples_seen += len(indices)
    progress.loss_sum += loss_total
    seconds = time.perf_counter() - started
    progress.seconds += seconds
    run.log.record("steps", progress.step, {
        "epoch": progress.epoch + progress.examples_seen / len(run.splits["train"]), "loss": loss_total / len(indices),
        "learning_rate": learning_rate, "grad_norm": norm, "seconds": seconds, "examples": len(indices),
        "tokens": sum(len(run.examples["train"].ids[i]) for i in indices),
    })
    return signal_number


def predict_split(run: Run, split: str) -> np.ndarray:
    """Return predictions for a whole split in tokens, (N,), in every process; each of them computes its share."""
    accelerator = run.accelerator
    # A process that left alone would keep the others waiting: with several, a signal waits for the next step.
    stop = run.stop if accelerator.num_processes == 1 else None
    run.model.eval()
    predicted = predict_encoded(run.model, run.examples[split].ids, run.progress.token_limit, processes=accelerator,
                                title=split if accelerator.is_main_process else "", stop=stop)
    run.model.train()
    if not np.isfinite(predicted).all():
        raise UserError(f"{split}: {np.sum(~np.isfinite(predicted)):,} predictions are not finite: "
                        "lower --learning_rate")
    return predicted


def validate(run: Run) -> None:
    """Score the model on the validation rows, say and record it, and keep it if it is the best so far."""
    progress, examples = run.progress, run.examples["val"]
    run.val_metrics = regression_metrics(examples.budget, predict_split(run, "val"), examples.censored)
    mae = run.val_metrics["mae"]
    is_best = mae < progress.best_mae
    epoch = progress.epoch + progress.examples_seen / len(run.splits["train"])
    progress.evaluated_step = progress.step
    progress.validations_since_best = 0 if is_best else progress.validations_since_best + 1
    if is_best:
        progress.best_mae, progress.best_epoch = mae, epoch
    train_loss = progress.loss_sum / progress.examples_seen
    run.log.say(f"Epoch {epoch:.3g}/{run.cfg['num_epochs']}  Train Loss: {train_loss:.4f}  Val MAE: {mae:,.2f} tokens"
                + ("  <- New best!" if is_best else ""))
    run.log.record("validations", progress.step, {"epoch": epoch, "train_loss": train_loss, **run.val_metrics})
    if is_best:
        run.save("best_model.pt", resumable=False)
    run.save("last.pt")


def out_of_patience(run: Run) -> bool:
    """Return whether the validations have been without a new best for too long."""
    return 0 < run.cfg["early_stopping_patience"] <= run.progress.validations_since_best


def train_epoch(run: Run) -> None:
    """Train to the end of the current epoch, validating where it is due.

    Raises:
        Stopped: a signal came.
    """
    cfg, progress, n_train = run.cfg, run.progress, len(run.splits["train"])
    weights = sampling_weights(run.splits["train"], cfg["balance_by"])
    order = epoch_order(n_train, cfg["seed"], progress.epoch, weights)
    n_steps = math.ceil(n_train / run.step_size)
    with tqdm(total=n_steps, initial=progress.examples_seen // run.step_size, desc=f"epoch {progress.epoch + 1}",
              disable=None if run.accelerator.is_main_process else True, unit="step", leave=False) as bar:
        while True:
            done = progress.examples_seen == n_train
            due = done or (cfg["eval_every"] and progress.step % cfg["eval_every"] == 0)
            if due and progress.evaluated_step < progress.step:
                validate(run)
            if done or out_of_patience(run):
                return
            signal_number = train_step(run, order[progress.examples_seen : progress.examples_seen + run.step_size])
            latest = run.log.history["steps"][-1]
            bar.set_postfix(loss=f"{latest['loss']:.4f}", lr=f"{latest['learning_rate']:.1e}", refresh=False)
            bar.update()
            if bar.disable and progress.step % math.ceil(n_steps / 10) == 0:  # a file wants lines, not a bar
                run.log.say(f"  step {progress.step:,}  loss {latest['loss']:.4f}  learning rate "
                            f"{latest['learning_rate']:.1e}  {latest['examples'] / latest['seconds']:.1f} examples/s")
            if signal_number:
                raise Stopped(signal_number)
            if time.monotonic() - run.last_save > 60 * cfg["save_every_minutes"]:
                run.save("last.pt")


def set_up(cfg: Config, accelerator: Any, log: RunLog) -> Run:
    """Read the data, load the model, and take up an unfinished run; what can be refused is refused here."""
    splits = load_splits(cfg, log.say)
    check_folders(cfg)
    to_resume = checkpoint_to_resume(cfg)
    torch.manual_seed(cfg["seed"])  # of the head's and the adapters' first values
    model = BudgetRegressionModel(cfg).to(accelerator.device)
    check_space(cfg, model)
    log.say("Rows, with minimum / median / 90 % quantile / maximum of the budgets in tokens")
    examples = {}
    for name, rows in splits.items():
        examples[name], n_cut = encode_rows(rows, model)
        log.say("  " + describe_rows(name, rows, n_cut))
    model.set_target(float(np.median(examples["train"].budget)))

    total_steps = math.ceil(len(splits["train"]) / (cfg["batch_size"] * cfg["grad_accum_steps"])) * cfg["num_epochs"]
    warmup, wanted = warmup_length(cfg, total_steps)
    sizes = [parameter.numel() for parameter in model.backbone.parameters()]
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    log.say(f"Model  {cfg['model_name']}: {sum(sizes) / 1e6:,.1f} M; trained, with head: "
            f"{sum(trained) / 1e6:,.1f} M")
    log.say(f"Plan   {total_steps:,} steps, {warmup:,} of them warm-up"
            + (f" (a tenth of the run, not {wanted:,})" if warmup < wanted else ""))
    optimizer = build_optimizer(model, cfg["learning_rate"], cfg["weight_decay"])
    schedule = functools.partial(lr_factor, warmup=warmup, total_steps=total_steps, schedule=cfg["lr_schedule"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)

    log.history["config"] = dict(cfg)
    parallel_model, prepared_optimizer = accelerator.prepare(model, optimizer)
    run = Run(cfg, accelerator, log, StopSignal(), splits, examples, model, parallel_model, prepared_optimizer,
              scheduler, fingerprint_rows(splits))
    if to_resume is not None:
        run.restore(to_resume)
        log.say(f"Going on from {to_resume} at step {run.progress.step:,}")
        if math.isfinite(run.progress.best_mae) and not (run.path / "best_model.pt").is_file():
            run.progress.best_mae = math.inf
            log.say(f"No best_model.pt in {run.path}: the best from here on will be kept")
    if accelerator.device.type == "cuda":
        fit_memory(run)
    if to_resume is None and accelerator.is_main_process:
        for old in ("last.pt", "best_model.pt", *(path.name for path in run.path.glob("epoch_*.pt"))):
            (run.path / old).unlink(missing_ok=True)  # of a run that --overwrite replaces
        run.save("last.pt")  # a disk or folder that cannot be written shows now, and any kill from here can be resumed
    return run


def train(cfg: Config) -> None:
    """Train on the rows of cfg["train_path"], writing checkpoints to output_dir and the history to log_dir.

    Raises:
        UserError: the data, the settings or the machine do not allow it.
        Stopped: a signal came; last.pt holds the run.
    """
    from accelerate import Accelerator

    # The model's forward sets the precision itself, so that Python callers get the numbers that training measured.
    tracker = None if cfg["tracker"] == "none" else cfg["tracker"]
    accelerator = Accelerator(mixed_precision="no", log_with=tracker, project_dir=cfg["log_dir"])
    log = RunLog(accelerator, cfg["log_dir"])
    log.say(f"{'=' * 80}\nBudget model: how many reasoning tokens does a query need?\n{'=' * 80}")
    log.say(f"Device {describe_device(accelerator.device)}; processes: {accelerator.num_processes}")
    changed = ", ".join(f"{key} {cfg[key]}" for key, default in CONFIG.items() if cfg[key] != default)
    log.say(textwrap.fill(f"Config {changed or 'as it stands'}", 80, subsequent_indent=" " * 7, break_on_hyphens=False))
    run = set_up(cfg, accelerator, log)
    if tracker:
        accelerator.init_trackers("budget-model", {key: str(value) for key, value in cfg.items()})
    run.stop.listen()
    run.model.train()
    try:
        while run.progress.epoch < cfg["num_epochs"] and not out_of_patience(run):
            train_epoch(run)
            if run.progress.examples_seen == len(run.splits["train"]):  # not where patience ran out on the way
                run.progress.epoch, run.progress.examples_seen, run.progress.loss_sum = run.progress.epoch + 1, 0, 0.0
                run.save(f"epoch_{run.progress.epoch}.pt")
                run.save("last.pt")
        report_run(run)
        run.progress.finished = True
        run.save("last.pt")
    except Stopped as stopped:
        run.save("last.pt")
        name = signal.Signals(stopped.args[0]).name
        log.say(f"Stopped by {name} at step {run.progress.step:,} and saved: the same command goes on from here")
        raise
    finally:
        accelerator.end_training()


def noise_floor(train_path: str) -> str:
    """Return what the data card beside the training rows says of the best possible MAE; empty where there is none."""
    path = Path(train_path).with_name("data_card.json")
    try:
        floor = json.loads(path.read_text(encoding="utf-8"))["noise"]["noise_floor"]
        return (f"Noise floor: the median of a query's other traces misses one more trace by {floor['mae']:,.1f} "
                f"tokens in the mean\n  ({path})")
    except (OSError, ValueError, KeyError, TypeError):  # no card, or one of rows without traces
        return ""


def report_run(run: Run) -> None:
    """Score the best checkpoint on validation and test rows, beside the baselines, and say how good the run was."""
    cfg, progress, log, path = run.cfg, run.progress, run.log, run.path / "best_model.pt"
    run.accelerator.wait_for_everyone()
    latest = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    try:
        run.model.restore(read_checkpoint(path), path, cfg["model_name"])
        predicted = {split: predict_split(run, split) for split in ("val", "test") if split in run.splits}
    finally:
        run.model.load_state_dict(latest)  # what last.pt has to hold, also if a signal came
    if not run.accelerator.is_main_process:
        return
    baselines = fit_baselines(run.splits["train"])
    for split, tokens in predicted.items():
        rows = run.splits[split]
        report = build_report(rows, tokens, baselines(rows))
        say_report(report, "validation" if split == "val" else split, log.say)
        log.say(write_report(report, rows, tokens, split, cfg["log_dir"]))
        log.history[split] = {**report["metrics"], "baselines": report["baselines"]}
    if floor := noise_floor(cfg["train_path"]):
        log.say(f"\n{floor}")
    underrun = 100 * log.history["val"]["underrun_rate"]
    log.say(f"\nBest Val MAE: {progress.best_mae:,.2f} tokens, after epoch {progress.best_epoch:.3g}: {path}")
    for name, value, excellent, good, poor in (("MAE", progress.best_mae, 500, 750, 1500),
                                               ("Underrun %", underrun, 60, 70, 80)):
        verdict = next((word for word, limit in (("excellent", excellent), ("good", good), ("fair", poor))
                        if value < limit), "needs improvement")
        log.say(f"  {name} {value:,.1f}: {verdict} (excellent < {excellent}, good < {good}, poor >= {poor})")
    better = better_baselines(log.history["val"], log.history["val"]["baselines"])
    if better:
        log.say(f"  But as good, and cheaper: {', '.join(better)}")
    tokens_per_s = sum(entry["tokens"] for entry in log.history["steps"]) / max(progress.seconds, 1e-9)
    gpu = f"; peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else ""
    log.say(f"Trained for {progress.seconds / 60:.1f} minutes, {tokens_per_s:,.0f} tokens/s{gpu}")


# ----------------------------------------------------------------------------------------------------------------------
# 10. Prediction
# ----------------------------------------------------------------------------------------------------------------------

WINDOW = 4096  # rows held in memory at once; sorted by length among themselves


def predict_file(model: BudgetRegressionModel, path: str, n_rows: int, output: IO[bytes] | None,
                 processes: Any) -> None:
    """Write every usable row of a file with its predicted_budget, in whole tokens rounded up, in the same order.

    Of several `processes`, each computes a share of every window; the one with an output writes.
    """
    rows = (item for item in iter_rows(path, labelled=False) if isinstance(item, Row))
    with tqdm(total=n_rows, desc="predict", disable=None if output else True, unit=" queries") as bar:
        while window := list(itertools.islice(rows, WINDOW)):
            budgets = model.predict([row.query for row in window], processes)
            for row, budget in zip(window, budgets, strict=True):
                if output:
                    output.write(json_line({**row.fields, "predicted_budget": math.ceil(budget)}))
            bar.update(len(window))


def predict_command(args: argparse.Namespace) -> None:
    """Print the budgets of the queries given as arguments, or write those of a file."""
    from accelerate import Accelerator

    processes = Accelerator(mixed_precision="no")  # one process, or several under `accelerate launch`

    def say(text: str) -> None:
        if processes.is_main_process:
            print(text, file=sys.stderr)

    n_rows = 0
    if args.input:  # read to the end before the weights are loaded, so that a bad row costs no time
        if Path(args.input).exists() and not Path(args.input).is_file():
            raise UserError(f"cannot read {args.input} twice: give a file, not a pipe or a folder")
        n_rows = sum(1 for _ in usable_rows(args.input, False, args.on_bad_row, say))
    empty = [number for number, query in enumerate(args.queries, start=1) if not query.strip()]
    if empty:
        raise UserError(f"query {empty[0]} is empty")
    model = BudgetRegressionModel.from_checkpoint(args.checkpoint, str(processes.device), args.model_name or "",
                                                  args.merge_adapters)
    model.max_tokens = args.max_tokens_per_micro_batch or model.max_tokens
    if args.input:
        destination = nullcontext(sys.stdout.buffer) if not args.output else atomic_file(Path(args.output))
        with destination if processes.is_main_process else nullcontext() as file:
            predict_file(model, args.input, n_rows, file, processes)
        if args.output:
            say(f"Written: {args.output}, {n_rows:,} rows")
    elif processes.is_main_process:
        for query, budget in zip(args.queries, model.predict(args.queries), strict=True):
            print(f"{math.ceil(budget)}\t{one_line(query)}")


# ----------------------------------------------------------------------------------------------------------------------
# 11. Entry
# ----------------------------------------------------------------------------------------------------------------------


def quieten_libraries() -> None:
    """Silence what other packages print: our own lines say what a user needs."""
    import huggingface_hub
    import transformers

    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # peft imports it where it is installed
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments[:1] in (["train"], ["evaluate"], ["predict"]) else "train"
    # Micro-batches differ in size: memory blocks that grow are not left over in pieces. Read when a GPU is first used.
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # the newer name of the same settings
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    try:
        if command == "train":
            cfg = parse_train_arguments(arguments)
            quieten_libraries()
            train(cfg)
        else:
            args = parse_command(command, arguments)
            quieten_libraries()
            (evaluate_command if command == "evaluate" else predict_command)(args)
            sys.stdout.flush()  # a reader that is gone shows here, not in the interpreter's last moments
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # one message, whatever the number of processes
            print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:  # where no smaller micro-batch would help: the weights, or one long query
        print(f"error: out of GPU memory ({str(error).split('. ')[0]}): --quantization nf4 or a smaller --model_name "
              "takes less", file=sys.stderr)
        return 2
    except Stopped as stopped:
        return 128 + int(stopped.args[0])
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        forget_stdout()
    return 0


if __name__ == "__main__":
    sys.exit(main())
