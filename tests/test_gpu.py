"""What only a CUDA device can show: the packed kernel's numbers, memory that runs out, and the peak of the 3B model."""

import copy
import gc

import benchmark
import numpy as np
import pytest
import torch
from conftest import save_llama
from test_training import set_up, shake

import train_sft_l4

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
WITHOUT_DROPOUT = {"lora_dropout": 0.0, "head_dropout": 0.0}


@pytest.fixture
def wide(config, tmp_path) -> dict:
    """CONFIG for a backbone whose heads are as wide as those of the 3B model."""
    folder = save_llama(tmp_path / "wide", seed=1, hidden_size=512, num_attention_heads=4, num_key_value_heads=2,
                        intermediate_size=1024, num_hidden_layers=4, initializer_range=0.05,
                        max_position_embeddings=1024)
    return config | WITHOUT_DROPOUT | {"model_name": folder, "overwrite": True}


@pytest.fixture
def little_memory():
    """Return a function that leaves this process so many bytes of the device."""
    def leave(n_bytes: int) -> None:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_allocated() + n_bytes) / total))

    yield leave
    torch.cuda.set_per_process_memory_fraction(1.0)


def outputs_and_gradients(run, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    run.model.to(device).train()
    examples = run.examples["train"]
    outputs = run.model(**run.model.collate(examples.ids[:16]), scaled=True)
    run.model.zero_grad()
    outputs.square().sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None])
    return outputs.detach().double().cpu(), gradients.double().cpu()


def test_packed_on_a_gpu_is_one_by_one_on_a_cpu(wide):
    runs = {attention: set_up(wide | {"attention": attention}) for attention in ("packed", "padded")}
    found = {}
    for attention, run in runs.items():
        shake(run.model)
        found[attention] = outputs_and_gradients(run, "cuda")
    run = runs["padded"]
    run.model.dtype = torch.float32
    run.model.float()
    expected = outputs_and_gradients(run, "cpu")
    errors = {attention: [float((ours - exact).norm() / exact.norm())
                          for ours, exact in zip(found[attention], expected, strict=True)] for attention in runs}
    for ours, padded in zip(errors["packed"], errors["padded"], strict=True):
        assert ours < 1.5 * padded + 0.01
        assert padded < 0.2  # bf16 keeps 8 bits


@pytest.mark.parametrize("last_only", [False, True])
def test_the_kernel_computes_what_the_loop_computes_beyond_one_block(last_only, monkeypatch):
    lengths = [1, 7, 130, 300, 512]  # the kernel works in blocks of 128 keys
    n_keys = sum(lengths)
    n_queries = len(lengths) if last_only else n_keys
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, n, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
                         for heads, n in ((24, n_queries), (8, n_keys), (8, n_keys)))
    packing = train_sft_l4.Packing.of(lengths, query.device)

    def run() -> list[torch.Tensor]:
        output, _ = train_sft_l4.attend_packed(None, query, key, value, packing=packing, scaling=128**-0.5,
                                               last_only=last_only)
        return [output, *torch.autograd.grad(output.float().square().sum(), (query, key, value))]

    found = run()
    monkeypatch.setattr(train_sft_l4, "has_varlen_kernel", lambda _: False)
    for ours, expected in zip(found, run(), strict=True):
        assert (ours - expected).float().norm() / expected.float().norm() < 0.02


def long_examples() -> train_sft_l4.Examples:
    """Return rows whose activations are large beside the 20 MiB in which the allocator takes memory."""
    ids = np.random.default_rng(0).integers(3, 300, (64, 400)).tolist()
    return train_sft_l4.Examples(ids, np.full(64, 1000.0), np.zeros(64, dtype=bool))


def prepared(config: dict) -> train_sft_l4.Run:
    run = set_up(config | {"max_length": 512, "max_tokens_per_micro_batch": 12_800})
    run.examples["train"] = long_examples()
    run.model.train()
    gc.collect()  # what an earlier run left in cycles
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return run


def test_a_step_that_runs_out_of_memory_is_done_again_to_the_same_result(wide, little_memory, capsys):
    steps, needed = [], 0
    for share in (1.0, 0.6):
        run = prepared(wide | {"activation_checkpointing": "off"})
        before = torch.cuda.memory_allocated()
        if share < 1:
            little_memory(int(share * needed))
        train_sft_l4.train_step(run, range(64))
        needed = torch.cuda.max_memory_allocated() - before
        steps.append((run.progress.token_limit, copy.deepcopy(run.model.state_dict()), run.log.history["steps"][0]))
        del run
    (limit, weights, step), (less, same_weights, same_step) = steps
    assert less < limit
    assert "Out of GPU memory: max_tokens_per_micro_batch is" in capsys.readouterr().out
    assert same_step["loss"] == pytest.approx(step["loss"], rel=0.02)
    assert same_step["grad_norm"] == pytest.approx(step["grad_norm"], rel=0.05)
    for name, tensor in weights.items():
        torch.testing.assert_close(same_weights[name], tensor, rtol=0.05, atol=3e-3, msg=name)


def test_layers_are_recomputed_when_the_largest_micro_batch_asks_for_it(wide, little_memory):
    run = prepared(wide | {"lora_dropout": 0.05})
    before = torch.cuda.memory_allocated()
    train_sft_l4.fit_memory(run)
    assert run.checkpoint_every == 0
    needed = torch.cuda.max_memory_allocated() - before
    free = torch.cuda.memory_allocated()
    assert free - before < 2**24  # nothing of the trial is kept
    little_memory(int(0.7 * needed))
    train_sft_l4.fit_memory(run)
    assert run.checkpoint_every > 0
    assert run.progress.token_limit == 12_800


def test_the_default_config_needs_at_most_20_gib(tmp_path):
    folder = f"{tmp_path}/backbone"
    benchmark.write_backbone(benchmark.SHAPES["3b"], folder, with_weights=False)
    original = train_sft_l4.load_tokenizer_and_backbone
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(
        min(1.0, benchmark.GPU_MEMORY / torch.cuda.get_device_properties(0).total_memory))
    try:
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        def load(name, dtype, _quantization):
            with torch.device("cuda"):
                backbone = AutoModel.from_config(AutoConfig.from_pretrained(name), dtype=dtype)
            backbone.config.use_cache = False
            return AutoTokenizer.from_pretrained(name), backbone

        train_sft_l4.load_tokenizer_and_backbone = load
        ids = np.random.default_rng(0).integers(3, 128_256, (64, 512)).tolist()  # every row as long as a row can be
        examples = train_sft_l4.Examples(ids, np.full(64, 1000.0), np.zeros(64, dtype=bool))
        run = benchmark.make_run(train_sft_l4.CONFIG | {"model_name": folder}, examples, str(tmp_path))
        run.model.train()
        train_sft_l4.fit_memory(run)
        torch.cuda.reset_peak_memory_stats()
        for start in (0, 32):
            train_sft_l4.train_step(run, range(start, start + 32))
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"peak {peak:.1f} GiB")
        assert run.checkpoint_every == 0
        assert run.progress.token_limit == train_sft_l4.CONFIG["max_tokens_per_micro_batch"]
        assert peak <= 20
    finally:
        train_sft_l4.load_tokenizer_and_backbone = original
        torch.cuda.set_per_process_memory_fraction(1.0)
