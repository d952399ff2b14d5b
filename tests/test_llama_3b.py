"""The default CONFIG on the exact shape of Llama-3.2-3B, without weights: what is trained, and how much is saved."""

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaModel

import train_sft_l4
from train_sft_l4 import CONFIG

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


def bytes_kept(n_layers: int, n_tokens: int, config: dict | None) -> int:
    """Return what a training step keeps for its backward pass, weights aside, of a query in a backbone of n layers.

    Without a configuration, adapters are what peft makes of CONFIG's, and attention what transformers makes of it.
    """
    shape = LlamaConfig(**{**SHAPE.to_dict(), "num_hidden_layers": n_layers, "vocab_size": 64})
    with torch.device("meta"):
        backbone = LlamaModel(shape).to(torch.bfloat16)
    backbone.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.fill_(0.01)
    packing = train_sft_l4.Packing.of([n_tokens], torch.device("cpu"))
    options = {"position_ids": packing.position_ids(), "packing": packing}
    if config:
        train_sft_l4.set_packed(backbone)
        model = train_sft_l4.add_adapters(backbone, config)
    else:
        options = {"use_cache": False}
        model = peft.get_peft_model(backbone, peft.LoraConfig(**{
            name: CONFIG[f"lora_{name}" if name == "target_modules" else name]
            for name in ("lora_alpha", "lora_dropout", "target_modules")}, r=CONFIG["lora_r"]))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), storage)  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model.train()(input_ids=torch.ones(1, n_tokens, dtype=torch.long), **options)
    return sum(size for address, (size, _) in kept.items() if address not in weights)


@pytest.mark.parametrize(("config", "kib"), [(CONFIG, 140), (CONFIG | {"lora_dropout": 0.0}, 123), (None, 244.5)])
def test_what_a_step_keeps_of_a_token_in_a_layer(config, kib):
    per_token = [(bytes_kept(n_layers, 96, config) - bytes_kept(n_layers, 32, config)) / 64 for n_layers in (2, 3)]
    assert (per_token[1] - per_token[0]) / 2**10 == pytest.approx(kib, abs=1)
