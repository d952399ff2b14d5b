"""What the tests share: a tiny backbone and encoder on disk, synthetic rows, a configuration, and one trained run."""

import importlib.util
import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # the tensors are tiny: more threads only wait for each other
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

import train_sft_l4

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_sft_l4.py"


def make_rows(count: int, seed: int) -> list[dict]:
    """Return rows of two domains whose heavy-tailed budgets the query explains in part."""
    rng, rows = random.Random(seed), []
    for number in range(count):
        size = rng.randrange(1, 9)
        numbers = " ".join(str(rng.randrange(10**3)) for _ in range(size))
        if number % 2:
            query, domain = f"Multiply {numbers} and show it.", "maths"
        else:
            query, domain = f"Write a program that sorts the list {numbers} and prints it {seed}.", "code"
        budget = round(math.exp(4 + size / 2 + rng.gauss(0, 0.3)))
        rows.append({"query": query, "optimal_budget": budget, "domain": domain})
    for row in rows[:: count // 2]:
        row["censored"] = True
    return rows


def write_rows(path: Path, rows: list) -> str:
    """Write rows as JSONL, bytes and strings as they are, and return the path."""
    lines = [row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
             for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


def read_rows(path: Path) -> list[dict]:
    """Return the objects of a JSONL file, NaN and Infinity refused."""
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in Path(path).read_bytes().split(b"\n") if line]


def save_tokenizer(folder: Path, bos: str, eos: str, pad: str, template: str):
    """Write a byte-level BPE tokenizer trained on the synthetic queries, and return it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = [bos, eos, pad]
    texts = [train_sft_l4.PROMPT_TEMPLATE.format(query=row["query"]) for row in make_rows(60, seed=0)]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.post_processor = processors.TemplateProcessing(
        template, special_tokens=[(token, bpe.token_to_id(token)) for token in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token=eos, pad_token=pad)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_llama(folder: Path, seed: int, **shape: int) -> str:
    """Write a two-layer Llama of random weights, or one of another shape, with its tokenizer; return the folder."""
    from transformers import LlamaConfig, LlamaModel

    tokenizer = save_tokenizer(folder, "<s>", "</s>", "<pad>", "<s> $A")
    torch.manual_seed(seed)
    LlamaModel(LlamaConfig(**{
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2} | shape)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"), seed=1)


@pytest.fixture(scope="session")
def other_llama(tmp_path_factory) -> str:
    """The same shapes, other weights."""
    return save_llama(tmp_path_factory.mktemp("other_llama"), seed=2)


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> str:
    """A tiny encoder with learnt absolute positions and a pooler."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    tokenizer = save_tokenizer(folder, "[CLS]", "[SEP]", "[PAD]", "[CLS] $A [SEP]")
    torch.manual_seed(1)
    BertModel(BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, pad_token_id=2, initializer_range=0.2)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for seed, (name, count) in enumerate({"train": 98, "val": 24, "test": 24}.items(), start=1):
        write_rows(folder / f"{name}.jsonl", make_rows(count, seed))
    return folder


def tiny_config(llama: str, data: Path, folder: Path) -> dict:
    """Return CONFIG for the tiny backbone: two epochs of 13 steps, each of 8 examples but for the last one, of 2."""
    return dict(train_sft_l4.CONFIG) | {
        "model_name": llama, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj", "down_proj"],
        "train_path": f"{data}/train.jsonl", "val_path": f"{data}/val.jsonl", "test_path": f"{data}/test.jsonl",
        "output_dir": f"{folder}/checkpoints", "log_dir": f"{folder}/logs", "max_length": 64,
        "batch_size": 2, "grad_accum_steps": 4, "num_epochs": 2, "learning_rate": 1e-3,
        "max_tokens_per_micro_batch": 256,
    }


@pytest.fixture
def config(llama, data, tmp_path) -> dict:
    return tiny_config(llama, data, tmp_path)


def run_command(*arguments, cwd: Path, program=(sys.executable, SCRIPT), **options) -> subprocess.CompletedProcess:
    """Run the script, or another program, in a folder, with its output in pipes."""
    command = [str(part) for part in (*program, *arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False, **options)


@pytest.fixture(scope="session")
def trained(llama, data, tmp_path_factory):
    """One run of the real command, with a config file: its folder, configuration, console and history."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_config(llama, data, folder)
    (folder / "config.json").write_text(json.dumps(config))
    process = run_command("--config", "config.json", cwd=folder)
    assert process.returncode == 0, process.stderr
    history = json.loads((folder / "logs/training_history.json").read_text())
    return SimpleNamespace(folder=folder, config=config, process=process, history=history,
                           best=folder / "checkpoints/best_model.pt")


@pytest.fixture
def as_a_user(trained, monkeypatch):
    """Return a function that runs Python text as a user of the trained run would, in its folder, with its CONFIG."""
    for key, value in trained.config.items():
        monkeypatch.setitem(train_sft_l4.CONFIG, key, value)
    monkeypatch.chdir(trained.folder)

    def run(text: str) -> dict:
        names: dict = {}
        exec(text if torch.cuda.is_available() else text.replace('.to("cuda")', '.to("cpu")'), names)
        return names

    return run


@pytest.fixture(scope="session")
def demo():
    """The module data/demo.py."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "data" / "demo.py")
    module = sys.modules["demo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    """A run takes the signals over; give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
