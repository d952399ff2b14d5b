"""The default CONFIG on the exact shape of Llama-3.2-3B, without weights: what is trained, and how much is saved."""

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

import train_sft_l4

SHAPE = LlamaConfig(
    vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
    num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
)


def test_a_checkpoint_holds_208_mb_and_624_mb_with_the_optimizer():
    with torch.device("meta"):
        backbone = train_sft_l4.add_adapters(LlamaModel(SHAPE), train_sft_l4.CONFIG)
        head = train_sft_l4.build_head(SHAPE.hidden_size, train_sft_l4.CONFIG["head_dropout"])
    adapters = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    n_adapters = sum(parameter.numel() for parameter in adapters)
    assert n_adapters == 48_627_712
    assert sum(parameter.numel() for parameter in backbone.parameters()) - n_adapters == 3_212_749_824
    megabytes = 4 * (n_adapters + sum(parameter.numel() for parameter in head.parameters())) / 1e6  # float32
    assert round(megabytes) == 208
    assert round(3 * megabytes) == 624  # AdamW's two moments


def bytes_kept(n_layers: int, n_tokens: int) -> int:
    """Return what a training step keeps for its backward pass, weights aside, of a query in a backbone of n layers."""
    shape = LlamaConfig(**{**SHAPE.to_dict(), "num_hidden_layers": n_layers, "vocab_size": 64, "dtype": "bfloat16"})
    with torch.device("meta"):
        backbone = LlamaModel(shape).to(torch.bfloat16)
    backbone.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.fill_(0.01)
    train_sft_l4.set_packed(backbone)
    model = train_sft_l4.add_adapters(backbone, train_sft_l4.CONFIG).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), storage)  # held, so that no other takes its address
        return tensor

    packing = train_sft_l4.Packing.of([n_tokens], torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.ones(1, n_tokens, dtype=torch.long), position_ids=packing.position_ids(), packing=packing)
    return sum(size for address, (size, _) in kept.items() if address not in weights)


def test_a_step_keeps_157_kib_per_token_and_layer():
    """That is on a CPU, where a dropout mask has two bytes an element; on a GPU it has one, and the sum is 140."""
    per_token = [(bytes_kept(n_layers, 96) - bytes_kept(n_layers, 32)) / 64 for n_layers in (2, 3)]
    assert (per_token[1] - per_token[0]) / 2**10 == pytest.approx(156.5, abs=1)
