"""Measure speed: the real training step beside what people run instead, prediction, and how near the limit they are.

    python tests/benchmark.py                        # a random Llama of 512 x 8; some minutes on two CPU cores
    python tests/benchmark.py --backbone 3b          # Llama-3.2-3B's shape, random weights, in 22 GiB of GPU memory
    python tests/benchmark.py --backbone FOLDER      # any local backbone, for example data/demo/backbone
    python tests/benchmark.py --table                # no measuring: print the README's tables from the figures kept
    python tests/benchmark.py --profile              # no comparison: where the time of our step goes

The contenders take turns in one process, round by round after a warm-up round, each on the round's own rows; what is
compared is the ratio within a round, so that a machine that drifts favours none of them. Every step has 32 examples:

    ours      train_step of train_sft_l4.py, whatever the script does at the moment
    padded    the same with --attention padded
    compiled  (asked for by --with compiled) the same with every decoder layer compiled
    classic   every query padded to 512 tokens, 16 micro-batches of 2, activation checkpointing; same model and loss
    trainer   Trainer.train() of transformers with a sequence classification model, each micro-batch padded to its
              longest query and of the size that is fastest here; its time is that of its steps, without start-up

All have the same LoRA. Ours and classic compute the same loss and gradient, which is checked first; the Trainer's
head is one linear layer and its loss the squared error, as they come. The limit is a large matrix product, measured in
the same run: a LoRA step has to do 4 x parameters x tokens operations. It writes tests/benchmark_results/.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this file is run by its path, from any folder

import train_sft_l4 as script  # noqa: E402

# The head of attention is hidden_size / num_attention_heads wide: 64 and 128.
SHAPES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
              "intermediate_size": 1408, "vocab_size": 8192, "max_position_embeddings": 2048},
    # https://huggingface.co/meta-llama/Llama-3.2-3B-Instruct/blob/main/config.json
    "3b": {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8,
           "intermediate_size": 8192, "vocab_size": 128256, "max_position_embeddings": 131072,
           "tie_word_embeddings": True,
           "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
                               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}},
}
MAX_LENGTH = 512  # tokens
STEP_SIZE = 32  # examples of an optimizer step
CLASSIC_BATCH = 2  # examples of a micro-batch of the classic recipe
GPU_MEMORY = 22 * 2**30  # bytes; what a 24 GB L4 leaves to one process
# Largest relative difference of loss and of gradient between ours and classic. They add the same numbers in another
# order, which bf16's 8 bits of mantissa show through 28 layers; a mistake in a divisor would be 0.5 and more.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}
TRAINER_BATCHES = (4, 8, 16, 32)
GROWTH_ROWS = (1_000, 5_000, 15_000, 50_000)
GROWTH_TOKENS = (32, 128, 512)
# NVIDIA's data sheet of the L4: dense bf16 operations and bytes of memory traffic in a second.
L4_FLOPS, L4_BYTES = 121e12, 300e9


@dataclass
class Contender:
    """A recipe, and what was measured of it."""

    title: str
    model: nn.Module
    visit: Callable[[Sequence[int]], list[float]]  # trains on these examples; the seconds of each of its steps
    optimizer: Callable[[], Any]  # the Trainer makes its own in its first round
    seconds: list[float] = field(default_factory=list)  # a round's mean step
    computed_tokens: int = 0  # by the backbone, padding included
    peak_bytes: int = 0
    failure: str = ""

    def held(self) -> dict[int, int]:
        """Return the bytes of each tensor that stays between its turns, by the tensor's identity."""
        optimizer = self.optimizer()
        states = optimizer.state.values() if optimizer is not None else []
        tensors = [*self.model.parameters(), *self.model.buffers(),
                   *(value for state in states for value in state.values() if isinstance(value, Tensor))]
        return {id(tensor): tensor.nbytes for tensor in tensors}


# ----------------------------------------------------------------------------------------------------------------------
# Rows and backbones
# ----------------------------------------------------------------------------------------------------------------------


def make_rows(n_rows: int, median_tokens: float, vocab_size: int, seed: int) -> script.Examples:
    """Return random token ids, their lengths lognormal with sigma 0.5, and random budgets."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(np.rint(rng.lognormal(math.log(median_tokens), 0.5, n_rows)), 4, MAX_LENGTH).astype(int)
    ids = [rng.integers(3, vocab_size, length).tolist() for length in lengths]  # 0 to 2 are special tokens
    return script.Examples(ids, rng.lognormal(math.log(1000), 1.0, n_rows), np.zeros(n_rows, dtype=bool))


def write_backbone(shape: dict[str, Any], folder: str, with_weights: bool) -> None:
    """Write a Llama of this shape with random weights, and a tokenizer that spells bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    config = LlamaConfig(**shape, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if with_weights:
        torch.manual_seed(0)
        LlamaModel(config).save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    letters = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>",
                            eos_token="<eos>").save_pretrained(folder)


def share_weights(folder: str, device: torch.device) -> None:
    """Let every later load from `folder` in this process return new modules around one set of bf16 weights.

    Three copies of 6.4 GB would leave no room in 22 GiB. The weights are random and made on the device.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    with device:
        backbone = AutoModel.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    weights = {id(parameter): parameter for parameter in backbone.parameters()}

    def load(*_args: Any, output_loading_info: bool = False, **_options: Any) -> Any:
        model = copy.deepcopy(backbone, dict(weights))  # what stands in the memo is taken as it is, not copied
        return (model, {"missing_keys": []}) if output_loading_info else model

    def load_classifier(*_args: Any, dtype: torch.dtype, **options: Any) -> nn.Module:
        config = AutoConfig.from_pretrained(folder, **options)
        with torch.device("meta"):
            classifier = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
        classifier.model = load()
        classifier.score = nn.Linear(config.hidden_size, config.num_labels, bias=False, device=device, dtype=dtype)
        return classifier

    AutoModel.from_pretrained = load
    AutoModelForSequenceClassification.from_pretrained = load_classifier


# ----------------------------------------------------------------------------------------------------------------------
# The contenders
# ----------------------------------------------------------------------------------------------------------------------


def timed(step: Callable[[Sequence[int]], Any], indices: Sequence[int]) -> list[float]:
    """Call `step` on each optimizer step's examples; return the seconds of each call."""
    seconds = []
    for start in range(0, len(indices), STEP_SIZE):
        wait_for_device()
        started = time.perf_counter()
        step(indices[start : start + STEP_SIZE])
        wait_for_device()
        seconds.append(time.perf_counter() - started)
    return seconds


def wait_for_device() -> None:
    """Return when the accelerator, if there is one, has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def make_run(cfg: script.Config, examples: script.Examples, log_dir: str) -> script.Run:
    """Return a training run as `set_up` makes it, on rows that are token ids already."""
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="no")
    model = script.BudgetRegressionModel(cfg).to(accelerator.device)
    model.set_target(float(np.median(examples.budget)))
    optimizer = script.build_optimizer(model, cfg["learning_rate"], cfg["weight_decay"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    rows = [script.Row("", float(budget), "", "", False, {}, "") for budget in examples.budget]
    parallel_model, prepared_optimizer = accelerator.prepare(model, optimizer)
    return script.Run(
        cfg=cfg, accelerator=accelerator, log=script.RunLog(accelerator, log_dir), stop=script.StopSignal(),
        splits={"train": rows}, examples={"train": examples}, model=model, parallel_model=parallel_model,
        optimizer=prepared_optimizer, scheduler=scheduler, data_fingerprint="",
    )


def classic_gradients(model: script.BudgetRegressionModel, examples: script.Examples, indices: Sequence[int]) -> Tensor:
    """Run a step's examples forward and backward, 2 at a time, all padded to 512; return the sum of losses, ().

    It calls backbone and head itself: the model's own forward would drop the columns that are padding throughout.
    """
    device, loss_sum = next(model.parameters()).device, torch.zeros(())
    for start in range(0, len(indices), CLASSIC_BATCH):
        chosen = indices[start : start + CLASSIC_BATCH]
        rows = [examples.ids[i] for i in chosen]
        input_ids = torch.tensor([row + [0] * (MAX_LENGTH - len(row)) for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = (torch.arange(MAX_LENGTH, device=device) < lengths[:, None]).long()
        with torch.autocast(device.type, torch.bfloat16, enabled=model.dtype is torch.bfloat16):
            hidden = model.backbone(input_ids=input_ids, attention_mask=mask).last_hidden_state
        output = model.head(hidden[torch.arange(len(chosen), device=device), lengths - 1].float()).squeeze(-1)
        target = model.to_scaled(torch.tensor(examples.budget[chosen], dtype=torch.float32, device=device))
        loss = script.huber_sum(output, target, torch.zeros_like(target, dtype=torch.bool))
        (loss / len(indices)).backward()
        loss_sum += loss.detach().cpu()
    return loss_sum


def ours(title: str, cfg: script.Config, examples: script.Examples, scratch: str) -> tuple[Contender, script.Run]:
    """Return the script's own training step, and the run it works on."""
    run = make_run(cfg, examples, scratch)
    run.model.train()
    return Contender(title, run.model, lambda indices: timed(lambda step: script.train_step(run, step), indices),
                     lambda: run.optimizer), run


def compile_layers(model: script.BudgetRegressionModel) -> None:
    """Compile each decoder layer for any number of tokens; attention, which looks at the lengths, stays as it is."""
    from transformers import AttentionInterface

    AttentionInterface.register("packed, not compiled", torch.compiler.disable(script.attend_packed))
    layers = next(m for m in model.backbone.modules() if isinstance(m, nn.ModuleList))
    layers[0].self_attn.config._attn_implementation = "packed, not compiled"  # one config, shared by all layers
    for layer in layers[:-1]:  # the last one has few tokens
        layer.compile(dynamic=True)


def make_classic(cfg: script.Config, examples: script.Examples, device: torch.device) -> Contender:
    """Return the recipe that most scripts for this task use."""
    model = script.BudgetRegressionModel({**cfg, "activation_checkpointing": "on", "attention": "padded"}).to(device)
    model.set_target(float(np.median(examples.budget)))
    optimizer = script.build_optimizer(model, cfg["learning_rate"], cfg["weight_decay"])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step(indices: Sequence[int]) -> None:
        classic_gradients(model, examples, indices)
        nn.utils.clip_grad_norm_(trained, cfg["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Contender(f"padded to {MAX_LENGTH}, recomputing", model.train(), lambda indices: timed(step, indices),
                     lambda: optimizer)


def make_trainer(cfg: script.Config, examples: script.Examples, device: torch.device, n_steps: int,
                 scratch: str) -> Contender:
    """Return what the transformers documentation leads to, with the micro-batch that is fastest here."""
    import peft
    import transformers

    class StepTimer(transformers.TrainerCallback):
        seconds: list[float]
        started: float

        def on_step_begin(self, *_args: Any, **_state: Any) -> None:
            wait_for_device()
            self.started = time.perf_counter()

        def on_step_end(self, *_args: Any, **_state: Any) -> None:
            wait_for_device()
            self.seconds.append(time.perf_counter() - self.started)

    on_gpu = device.type == "cuda"
    tokenizer = transformers.AutoTokenizer.from_pretrained(cfg["model_name"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
        cfg["model_name"], dtype=torch.bfloat16 if on_gpu else torch.float32, num_labels=1, problem_type="regression",
        pad_token_id=tokenizer.pad_token_id)
    classifier.config.use_cache = False
    model = peft.get_peft_model(classifier, peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS, r=cfg["lora_r"], lora_alpha=cfg["lora_alpha"],
        lora_dropout=cfg["lora_dropout"], target_modules=list(cfg["lora_target_modules"])))
    timer = StepTimer()
    trainer = transformers.Trainer(
        model=model, train_dataset=[], data_collator=transformers.DataCollatorWithPadding(tokenizer), callbacks=[timer],
        args=transformers.TrainingArguments(
            output_dir=scratch, max_steps=n_steps, learning_rate=cfg["learning_rate"],
            weight_decay=cfg["weight_decay"], max_grad_norm=cfg["max_grad_norm"], logging_strategy="no",
            save_strategy="no", eval_strategy="no", report_to="none", disable_tqdm=True, bf16=on_gpu,
            use_cpu=device.type == "cpu", dataloader_pin_memory=on_gpu, remove_unused_columns=False))
    trainer.remove_callback(transformers.PrinterCallback)
    median = float(np.median(examples.budget))

    def visit(indices: Sequence[int]) -> list[float]:
        trainer.train_dataset = [
            {"input_ids": examples.ids[i], "attention_mask": [1] * len(examples.ids[i]),
             "labels": (float(examples.budget[i]) - median) / cfg["huber_delta"]} for i in indices]
        timer.seconds = []
        trainer.train()
        return timer.seconds

    def set_batch(size: int) -> None:
        trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps = size, STEP_SIZE // size
        trainer._train_batch_size = size  # what it took from the arguments when it was made

    seconds: dict[int, float] = {}
    for size in TRAINER_BATCHES:
        set_batch(size)
        with suppress(torch.OutOfMemoryError):
            seconds[size] = statistics.mean(visit(range(n_steps * STEP_SIZE))[n_steps > 1 :])
        model.zero_grad(set_to_none=True)
        gc.collect()
    if not seconds:
        return Contender("Trainer", model, visit, lambda: trainer.optimizer, failure="out of memory")
    best = min(seconds, key=lambda size: seconds[size])
    print("Trainer, seconds a step by micro-batch:", ", ".join(f"{k}: {v:.2f}" for k, v in seconds.items()))
    set_batch(best)
    return Contender(f"Trainer, {best} x {STEP_SIZE // best}", model, visit, lambda: trainer.optimizer)


# ----------------------------------------------------------------------------------------------------------------------
# Measuring
# ----------------------------------------------------------------------------------------------------------------------


def check_same_gradient(run: script.Run, model: script.BudgetRegressionModel) -> dict[str, float]:
    """Check that ours and classic compute the same loss and gradient from the same weights, without dropout.

    Returns:
        The relative differences of the loss and of the gradient.

    Raises:
        RuntimeError: they differ, so that comparing their speeds would mean nothing.
    """
    torch.manual_seed(0)
    with torch.no_grad():  # fresh adapters and a fresh head give every query the same number
        for parameter in run.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.load_state_dict(run.model.state_dict())
    indices = list(range(2 * CLASSIC_BATCH))
    losses, gradients = [], []
    for each, accumulate in ((run.model, lambda: script.accumulate_gradients(run, indices)),
                             (model, lambda: classic_gradients(model, run.examples["train"], indices))):
        each.eval()
        losses.append(float(accumulate()))
        gradients.append(torch.cat([p.grad.flatten() for p in each.parameters() if p.grad is not None]).double().cpu())
        each.zero_grad(set_to_none=True)
        each.train()
    ours, classic = gradients
    difference = {"loss": abs(losses[0] / losses[1] - 1), "gradient": float((ours - classic).norm() / classic.norm())}
    if not max(difference.values()) <= TOLERANCE[model.dtype]:
        raise RuntimeError(f"ours and the classic recipe do not compute the same: relative differences {difference}")
    return difference


def best_seconds(work: Callable[[], Any], repeats: int = 7) -> float:
    """Return the seconds of the fastest of several calls."""
    seconds = []
    for _ in range(repeats):
        wait_for_device()
        started = time.perf_counter()
        work()
        wait_for_device()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def measure_limits(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Return what the device can do: operations a second in a matrix product, bytes a second in a copy."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    source = torch.zeros(2**30 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {"flops": 2 * size**3 / best_seconds(lambda: left @ right),
            "bytes_per_s": 2 * source.nbytes / best_seconds(lambda: target.copy_(source))}  # it is read and written


def linear_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the backbone's matrices, which every token is multiplied with; adapters, embeddings and head are not."""
    return [module.weight for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and "lora_" not in name and "head" not in name]


def measure_prediction(model: script.BudgetRegressionModel, examples: script.Examples, limits: Mapping[str, float],
                       rounds: int) -> dict[str, float]:
    """Measure one query at a time, the same in a batch, and one query against reading all weights once."""
    ids = examples.ids[: 4 * STEP_SIZE]
    middle = sorted(ids, key=len)[len(ids) // 2]
    model.eval()
    ratios, batched = [], []
    for number in range(1 + rounds):
        looped = best_seconds(lambda: [script.predict_encoded(model, [row], model.max_tokens) for row in ids], 1)
        together = best_seconds(lambda: script.predict_encoded(model, ids, model.max_tokens), 1)
        if number:  # the first round is a warm-up
            ratios.append(looped / together)
            batched.append(together)
    read = sum(weight.nbytes for weight in linear_weights(model)) / limits["bytes_per_s"]
    result = {"queries_per_s": len(ids) / statistics.median(batched), "batch_over_loop": statistics.median(ratios),
              "reading_weights_ms": 1000 * read}
    for name in ("one_query_ms", "one_query_merged_ms"):
        seconds = [best_seconds(lambda: script.predict_encoded(model, [middle], model.max_tokens), 1)
                   for _ in range(30)]
        result[name] = 1000 * statistics.median(seconds[5:])
        if name == "one_query_ms":
            model.backbone = model.backbone.merge_and_unload()
    return result


def measure_growth(run: script.Run, vocab_size: int, n_steps: int) -> list[dict[str, Any]]:
    """Return seconds of an epoch by rows and tokens: the time of its steps is measured, and multiplied by their number.

    What an epoch does beside its steps, putting its rows in order, is measured in full.
    """
    result = []
    run.model.train()
    for tokens in GROWTH_TOKENS:
        rng = np.random.default_rng(1)
        ids = rng.integers(3, vocab_size, ((1 + n_steps) * STEP_SIZE, tokens)).tolist()
        run.examples["train"] = script.Examples(ids, np.full(len(ids), 1000.0), np.zeros(len(ids), dtype=bool))
        seconds = timed(lambda step: script.train_step(run, step), range(len(ids)))[1:]
        for rows in GROWTH_ROWS:
            order = best_seconds(functools.partial(script.epoch_order, rows, 0, 0), 1)
            result.append({"tokens": tokens, "rows": rows,
                           "seconds": order + math.ceil(rows / STEP_SIZE) * statistics.median(seconds)})
    return result


def l4_estimate(n_rows: int, mean_tokens: float, n_parameters: int) -> dict[str, float]:
    """Return the least minutes of an epoch on an L4, and the tokens a second, by the arithmetic alone: an estimate."""
    seconds = n_rows * mean_tokens * 4 * n_parameters / L4_FLOPS
    return {"rows": n_rows, "mean_tokens": mean_tokens, "least_minutes": seconds / 60,
            "most_tokens_per_s": n_rows * mean_tokens / seconds}


def take_turn(contender: Contender, others: Sequence[Contender], indices: Sequence[int], n_settling: int) -> float:
    """Let a contender train on `indices`; return its seconds a step, without the first `n_settling` steps.

    Peak memory is the contender's own: what the others keep on the device meanwhile is taken off.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.empty_cache()  # every turn begins alike: the Trainer empties it too
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.mean(contender.visit(indices)[n_settling:])
    script.forget_dropped(contender.model)
    if on_gpu:
        held = {key: size for other in others for key, size in other.held().items()}
        not_its_own = sum(held[key] for key in held.keys() - contender.held().keys())
        contender.peak_bytes = max(contender.peak_bytes, torch.cuda.max_memory_allocated() - not_its_own)
    return seconds


def measure(contenders: Mapping[str, Contender], rounds: Sequence[Sequence[int]], n_settling: int) -> None:
    """Let the contenders take turns on each round's examples. The first round is a warm-up and is not counted."""
    for contender in contenders.values():
        def count(_module: nn.Module, inputs: tuple[Tensor], _output: Tensor, to: Contender = contender) -> None:
            to.computed_tokens += inputs[0].numel()

        # Tokens are counted where they enter the model: as they are computed, whatever was planned.
        next(m for m in contender.model.modules() if isinstance(m, nn.Embedding)).register_forward_hook(count)
    for number, indices in enumerate(rounds):
        line = []
        for name, contender in contenders.items():
            if contender.failure:
                continue
            others = [other for other in contenders.values() if other is not contender]
            try:
                seconds = take_turn(contender, others, indices, n_settling)
            except torch.OutOfMemoryError:
                if name == "ours":
                    raise
                contender.failure = "out of memory"
                contender.model.zero_grad(set_to_none=True)
                line.append(f"{name} {contender.failure}")
            else:
                contender.seconds.append(seconds)
                line.append(f"{name} {seconds:.2f}")
            gc.collect()  # outside the clock
        if number == 0:
            for contender in contenders.values():
                contender.seconds, contender.computed_tokens = [], 0
        print(f"round {number}/{len(rounds) - 1}" if number else "warm-up  ", " ", "  ".join(line), "s a step",
              flush=True)


def summarize(contenders: Mapping[str, Contender], tokens: Sequence[int], n_steps: int,
              tokens_per_s: float) -> dict[str, dict[str, Any]]:
    """Return what was measured of each contender.

    Args:
        contenders: after `measure`.
        tokens: useful ones, in the examples of each round that counts.
        n_steps: optimizer steps of a turn.
        tokens_per_s: that the device could train on if it did nothing but the products it has to do.
    """
    result: dict[str, dict[str, Any]] = {}
    for name, contender in contenders.items():
        if contender.failure:
            result[name] = {"title": contender.title, "failure": contender.failure}
            continue
        ratios = [theirs / ours for theirs, ours in zip(contender.seconds, contenders["ours"].seconds, strict=True)]
        median = statistics.median(contender.seconds)
        if sum(tokens) > contender.computed_tokens:
            raise RuntimeError(f"{name} left out tokens: it saw {contender.computed_tokens:,} of {sum(tokens):,}")
        result[name] = {
            "title": contender.title,
            "examples_per_s": STEP_SIZE / median,
            "useful_tokens_per_s": statistics.mean(tokens) / n_steps / median,
            "share_of_limit": statistics.mean(tokens) / n_steps / median / tokens_per_s,
            "padding_efficiency": sum(tokens) / contender.computed_tokens,
            "peak_gib": contender.peak_bytes / 2**30 if contender.peak_bytes else "not measured",
            "ours_is_faster": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
            "seconds_per_step": contender.seconds,
        }
    return result


def table(result: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the contenders' figures as a Markdown table."""
    lines = ["| | examples/s | tokens/s | of them useful | share of the limit | peak GiB | ours is faster by |",
             "|---|--:|--:|--:|--:|--:|--:|"]
    for name, entry in result.items():
        if "failure" in entry:
            lines.append(f"| {entry['title']} | {entry['failure']} | | | | | |")
            continue
        ratio = entry["ours_is_faster"]
        peak = "" if isinstance(entry["peak_gib"], str) else f"{entry['peak_gib']:.1f}"
        faster = "" if name == "ours" else f"{ratio['median']:.3g}x ({ratio['min']:.3g} to {ratio['max']:.3g})"
        useful = entry["padding_efficiency"]
        lines.append(f"| {entry['title']} | {entry['examples_per_s']:.3g} | {entry['useful_tokens_per_s']:,.0f} | "
                     f"{useful:.0%} | {entry['share_of_limit']:.0%} | {peak} | {faster} |")
    return "\n".join(lines)


def growth_table(growth: Sequence[Mapping[str, Any]]) -> str:
    """Return the minutes of an epoch by rows and tokens as a Markdown table."""
    lines = ["| tokens a query | " + " | ".join(f"{rows:,} rows" for rows in GROWTH_ROWS) + " |",
             "|--:|" + "--:|" * len(GROWTH_ROWS)]
    for tokens in GROWTH_TOKENS:
        minutes = [f"{entry['seconds'] / 60:,.1f}" for entry in growth if entry["tokens"] == tokens]
        lines.append(f"| {tokens} | {' | '.join(minutes)} |")
    return "\n".join(lines)


def report(figures: Mapping[str, Any]) -> str:
    """Return the README's text about one file of figures."""
    machine, flags, limits = figures["machine"], figures["flags"], figures["limits"]
    backbone = {"small": "a random Llama of 512 x 8", "3b": "Llama-3.2-3B's shape in 22 GiB"}.get(
        flags["backbone"], flags["backbone"])
    where = machine["device"] + ("" if "gpu" in machine["versions"] else f", {machine['threads']} threads")
    limit = f"{limits['flops'] / 1e12:,.3g} TFLOP/s"
    paragraphs = [
        f"{where}; {backbone}; queries of {flags['median_tokens']:g} tokens in the median, 32 a step; limit {limit}; "
        f"torch {machine['versions']['torch']}, {machine['date']}.",
        table(figures["contenders"])]
    if "prediction" in figures:
        found = figures["prediction"]
        paragraphs += [
            f"Prediction: {found['queries_per_s']:,.3g} queries/s batched, {found['batch_over_loop']:.2g} times as "
            f"many as one at a time. One query takes {found['one_query_ms']:.3g} ms, with merged adapters "
            f"{found['one_query_merged_ms']:.3g} ms; reading the weights once takes "
            f"{found['reading_weights_ms']:.2g} ms.",
            "Minutes an epoch, by rows and tokens (steps measured, then multiplied by their number):",
            growth_table(figures["growth"])]
    return "\n\n".join(line if line.startswith("|") else textwrap.fill(line, 120) for line in paragraphs) + "\n"


def readme_text() -> str:
    """Return what the README says of speed, from all figures that are kept, and what is not measured."""
    kept = [json.loads(path.read_text()) for path in sorted((ROOT / "tests" / "benchmark_results").glob("*.json"))]
    texts = [report(figures) for figures in kept]
    if not any("gpu" in figures["machine"]["versions"] for figures in kept):
        mean = 100 * math.exp(0.5**2 / 2)  # of the lognormal with median 100 and sigma 0.5
        least = l4_estimate(15_000, mean, 28 * (2 * 3072 * 3072 + 2 * 3072 * 1024 + 3 * 3072 * 8192))
        texts.append(textwrap.fill(
            "On a GPU: **not measured**. An estimate for the L4: if nothing but the necessary products took time, its "
            f"{L4_FLOPS / 1e12:.0f} TFLOP/s would train the 3B model on {least['rows']:,} queries of "
            f"{least['mean_tokens']:.0f} tokens in {least['least_minutes']:.1f} minutes an epoch "
            f"({least['most_tokens_per_s']:,.0f} tokens/s); at 40 % of that in "
            f"{least['least_minutes'] / 0.4:.0f} minutes.", 120) + "\n")
    return "\n".join(texts)


def device_name(device: torch.device) -> str:
    """Return the name of the processor that computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return where and with what the figures were measured."""
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True,
                         text=True, check=False)
    return {"device": device_name(device), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "load_before": os.getloadavg()[0], "system": platform.system(), "versions": script.versions(),
            "commit": git.stdout.strip() or "unknown", "date": date.today().isoformat()}


def print_profile(contender: Contender, indices: Sequence[int]) -> None:
    """Print the operators that take most of a step, after a step that is not counted."""
    contender.visit(indices[:STEP_SIZE])
    with torch.profiler.profile(acc_events=True) as profiler:
        contender.visit(indices[STEP_SIZE : 2 * STEP_SIZE])
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=key, row_limit=12, max_name_column_width=40))


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; what depends on the device is filled in."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="small", metavar="small|3b|FOLDER")
    parser.add_argument("--rounds", type=int, default=5, help="that count, after the warm-up round (default: 5)")
    parser.add_argument("--steps", type=int, default=4 if on_gpu else 1,
                        help="that count, of a contender's turn (default: 4 on a GPU, 1 elsewhere)")
    parser.add_argument("--median-tokens", type=float, default=60, help="of a query with its template (default: 60)")
    parser.add_argument("--max-tokens", type=int, default=script.CONFIG["max_tokens_per_micro_batch"],
                        help="max_tokens_per_micro_batch of ours (default: CONFIG's)")
    parser.add_argument("--lora-targets", default=",".join(script.CONFIG["lora_target_modules"]), metavar="NAMES",
                        help="linear layers with adapters, separated by commas (default: CONFIG's)")
    parser.add_argument("--without", action="append", default=[], choices=("padded", "classic", "trainer"),
                        help="leave a contender out")
    parser.add_argument("--with", action="append", default=[], choices=("compiled",), dest="also",
                        help="take a contender in")
    parser.add_argument("--table", action="store_true", help="print the README's text from the figures kept and stop")
    parser.add_argument("--profile", action="store_true", help="profile a step of ours and stop")
    args = parser.parse_args(argv)
    if min(args.rounds, args.steps, args.median_tokens, args.max_tokens) < 1:
        parser.error("rounds, steps and tokens must be at least 1")
    if args.backbone == "3b" and not on_gpu:
        parser.error("--backbone 3b needs a CUDA device")
    if torch.cuda.device_count() > 1:
        parser.error("the Trainer would spread over all GPUs: name one in CUDA_VISIBLE_DEVICES")
    if args.backbone not in SHAPES and not Path(args.backbone).is_dir():
        parser.error(f"--backbone {args.backbone}: no such folder")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write the figures."""
    args = parse_arguments(argv)
    if args.table:
        print(readme_text())
        return
    script.quieten_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        compare(args, scratch)


def compare(args: argparse.Namespace, scratch: str) -> None:
    """Measure the contenders that `args` leaves in."""
    from transformers import AutoConfig

    device = script.pick_device()
    machine = describe_machine(device)
    if device.type == "cpu" and machine["load_before"] > 0.5:  # threads that wait for a core hold all the others up
        print(f"NOTE: the machine is busy, its load is {machine['load_before']:.1f}: these figures may not repeat")
    folder = args.backbone
    if args.backbone in SHAPES:
        folder = f"{scratch}/backbone"
        write_backbone(SHAPES[args.backbone], folder, with_weights=args.backbone == "small")
    if args.backbone == "3b":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, GPU_MEMORY / total))
        share_weights(folder, device)
    n_settling = 1 if device.type == "cuda" else 0  # steps of a turn that fill the emptied memory pool
    turn = STEP_SIZE * (n_settling + args.steps)
    vocab_size = AutoConfig.from_pretrained(folder).vocab_size
    examples = make_rows(turn * (1 + args.rounds), args.median_tokens, vocab_size, seed=0)
    cfg = {**script.CONFIG, "model_name": folder, "max_tokens_per_micro_batch": args.max_tokens,
           "lora_target_modules": args.lora_targets.split(",")}

    limits = measure_limits(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    our_contender, run = ours("this script", cfg, examples, scratch)
    contenders = {"ours": our_contender}
    if args.profile:
        print_profile(our_contender, range(len(examples.ids)))
        return
    if "padded" not in args.without:
        contenders["padded"], _ = ours("this script, padded", {**cfg, "attention": "padded"}, examples, scratch)
    if "compiled" in args.also:
        contenders["compiled"], compiled = ours("this script, compiled", cfg, examples, scratch)
        compile_layers(compiled.model)
    difference: dict[str, float] = {}
    if "classic" not in args.without:
        contenders["classic"] = make_classic(cfg, examples, device)
        difference = check_same_gradient(run, contenders["classic"].model)
        print("ours and classic compute the same: relative difference of the loss {loss:.1e}, of the gradient "
              "{gradient:.1e}".format(**difference))
    if "trainer" not in args.without:
        contenders["trainer"] = make_trainer(cfg, examples, device, n_settling + args.steps, scratch)

    rounds = [range(start, start + turn) for start in range(0, len(examples.ids), turn)]
    measure(contenders, rounds, n_settling)
    tokens = [sum(len(examples.ids[i]) for i in indices) for indices in rounds[1:]]
    n_parameters = sum(weight.numel() for weight in linear_weights(run.model.backbone))
    result = summarize(contenders, tokens, n_settling + args.steps, limits["flops"] / (4 * n_parameters))
    name = args.backbone if args.backbone in SHAPES else Path(folder).resolve().name
    slug = re.sub(r"[^a-z0-9]+", "-", f"{machine['device']}".lower().replace("(r)", "").replace("(tm)", "")).strip("-")
    path = ROOT / "tests" / "benchmark_results" / f"{slug}_{name}.json"
    figures = {"machine": machine, "flags": vars(args) | {"backbone": name}, "limits": limits, "contenders": result,
               "difference_ours_classic": difference}
    keep = not args.without and args.rounds >= 3
    if keep:
        script.write_json(path, figures)  # what there is, should the rest not come to its end
    figures["growth"] = measure_growth(run, vocab_size, args.steps)
    figures["prediction"] = measure_prediction(run.model, examples, limits, args.rounds)  # last: it merges the adapters
    print(f"\n{report(figures)}")
    if keep:
        script.write_json(path, figures)
        print(f"Written: {path.relative_to(ROOT)}")
    else:
        print("Not kept: figures are kept of all contenders and at least 3 rounds")


if __name__ == "__main__":
    main()
