"""The default CONFIG on the exact shape of Llama-3.2-3B, without weights: what is trained, and how much is saved."""

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
