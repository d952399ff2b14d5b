"""What only a CUDA device can show: the packed kernel's numbers, memory that runs out, and the peak of the 3B model."""

import copy

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
                        intermediate_size=1024, num_hidden_layers=4, initializer_range=0.05)
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
    for attention in runs:
        for ours, exact in zip(found[attention], expected, strict=True):
            assert (ours - exact).norm() / exact.norm() < 0.05, attention  # bf16 keeps 8 bits
    for ours, padded in zip(found["packed"], found["padded"], strict=True):
        assert (ours - padded).norm() / padded.norm() < 0.05


def test_a_step_that_runs_out_of_memory_is_done_again_to_the_same_result(wide, little_memory, capsys):
    steps = []
    for n_bytes in (2**35, 3 * 2**20):
        run = set_up(wide | {"activation_checkpointing": "off"})
        run.model.train()
        little_memory(n_bytes)
        train_sft_l4.train_step(run, range(16))
        steps.append((run.progress.token_limit, copy.deepcopy(run.model.state_dict()), run.log.history["steps"][0]))
        torch.cuda.set_per_process_memory_fraction(1.0)
    (limit, weights, step), (less, same_weights, same_step) = steps
    assert less < limit
    assert "Out of GPU memory: max_tokens_per_micro_batch is" in capsys.readouterr().out
    assert same_step["loss"] == pytest.approx(step["loss"], rel=0.02)
    assert same_step["grad_norm"] == pytest.approx(step["grad_norm"], rel=0.05)
    for name, tensor in weights.items():
        torch.testing.assert_close(same_weights[name], tensor, rtol=0.05, atol=3e-3, msg=name)


def test_layers_are_recomputed_when_the_largest_micro_batch_asks_for_it(wide, little_memory):
    run = set_up(wide | {"max_tokens_per_micro_batch": 8192})
    run.model.train()
    train_sft_l4.fit_memory(run)
    assert run.checkpoint_every == 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train_sft_l4.fit_memory(run)
    needed = torch.cuda.max_memory_allocated() - before
    little_memory(int(0.7 * needed))
    train_sft_l4.fit_memory(run)
    assert run.checkpoint_every > 0 or run.progress.token_limit < 8192


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
