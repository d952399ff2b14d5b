"""The model: the promised Python use, pooling and padding, what is trained and saved, unfit checkpoints."""

import copy
import functools
import json
import math
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.attention.varlen
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModel

import train_sft_l4
from train_sft_l4 import BudgetRegressionModel, UserError

QUERIES = [
    "Solve 2x + 5 = 13",
    "Multiply 3 4 5 and show it.",
    "a",
    "Write a program that sorts the list 9 8 7 6 5 4 and prints it.",
    "What is the capital of France, and why?",
]

LONG_FORM = """
import torch
from transformers import AutoTokenizer
from train_sft_l4 import BudgetRegressionModel, CONFIG, PROMPT_TEMPLATE

model = BudgetRegressionModel(CONFIG)
checkpoint = torch.load("checkpoints/best_model.pt")          # weights_only=True, torch's default, suffices
model.load_state_dict(checkpoint["model_state_dict"])
model = model.to("cuda").eval()
tokenizer = AutoTokenizer.from_pretrained(CONFIG["model_name"])
encoding = tokenizer(PROMPT_TEMPLATE.format(query="Solve 2x + 5 = 13"), max_length=512, padding="max_length",
                     truncation=True, return_tensors="pt").to("cuda")       # padded on either side
tokens = model(encoding["input_ids"], encoding["attention_mask"]).item()
"""

SHORT_FORM = """
model = BudgetRegressionModel.from_checkpoint("checkpoints/best_model.pt")  # backbone, adapters, head, tokenizer, device, eval()
budgets = model.predict(["Solve 2x + 5 = 13", "Prove that sqrt(2) is irrational"])   # tokens, in the order given
"""  # noqa: E501


def randomized(config) -> BudgetRegressionModel:
    """Return a model in eval mode whose adapters and head all matter, which freshly made ones do not."""
    torch.manual_seed(3)
    model = BudgetRegressionModel(config)
    model.set_target(1000.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@pytest.fixture(params=["packed", "padded", "encoder"])
def model(request, config) -> BudgetRegressionModel:
    if request.param == "encoder":
        config |= {"model_name": request.getfixturevalue("bert"), "lora_target_modules": ["query", "value", "dense"]}
    model = randomized(config | {"attention": "padded" if request.param == "padded" else "auto"})
    assert (model.packed, model.causal) == (request.param == "packed", request.param != "encoder")
    return model


@pytest.fixture(scope="module")
def loaded(trained) -> BudgetRegressionModel:
    return BudgetRegressionModel.from_checkpoint(trained.best)


def test_the_promised_python_runs_and_its_two_forms_agree(as_a_user):
    names = as_a_user(LONG_FORM + SHORT_FORM)
    assert len(names["budgets"]) == 2
    assert names["tokens"] == pytest.approx(names["budgets"][0], rel=1e-5)
    assert names["budgets"][0] != names["budgets"][1]


def test_the_promised_python_gives_the_same_number_with_padding_on_the_left(as_a_user):
    right = as_a_user(LONG_FORM)["tokens"]
    left_form = LONG_FORM.replace("encoding = tokenizer", 'tokenizer.padding_side = "left"\nencoding = tokenizer')
    names = as_a_user(left_form)
    assert names["encoding"]["attention_mask"][0, 0] == 0
    assert names["tokens"] == pytest.approx(right, rel=1e-5)


def test_the_promised_python_measures_what_training_measured(loaded, trained):
    lines = (trained.folder / "logs/val_predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert loaded.predict([row["query"] for row in rows]) == pytest.approx(
        [row["predicted_budget"] for row in rows], abs=0.011)


def encoded(model: BudgetRegressionModel, queries=QUERIES) -> list[list[int]]:
    ids, n_cut = train_sft_l4.encode(model.tokenizer, queries, model.max_length, model.prompt_template)
    assert not n_cut
    assert len({len(row) for row in ids}) == len(ids)
    return ids


def padded(ids: list[list[int]], width: int, on_the_left: bool, pad_id: int) -> dict:
    rows, masks = [], []
    for row in ids:
        filler, real, unreal = [pad_id] * (width - len(row)), [1] * len(row), [0] * (width - len(row))
        rows.append(filler + row if on_the_left else row + filler)
        masks.append(unreal + real if on_the_left else real + unreal)
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


def test_a_number_is_backbone_plus_adapters_then_the_head_on_the_last_token(config):
    model = randomized(config)
    backbone = AutoModel.from_pretrained(config["model_name"]).eval()
    state = model.state_dict()
    with torch.no_grad():
        for name, module in backbone.named_modules():
            down, up = (state.get(f"backbone.base_model.model.{name}.lora_{side}.default.weight") for side in "AB")
            if down is not None:
                module.weight += config["lora_alpha"] / config["lora_r"] * up @ down
        for ids in encoded(model):
            x = backbone(torch.tensor([ids])).last_hidden_state[0, -1]
            for layer in (0, 4):
                x = functional.linear(x, state[f"head.{layer}.weight"], state[f"head.{layer}.bias"])
                norm = (state[f"head.{layer + 1}.{name}"] for name in ("weight", "bias"))
                x = functional.layer_norm(x, x.shape, *norm).relu()
            expected = 1000 + 1000 * functional.linear(x, state["head.8.weight"], state["head.8.bias"])
            torch.testing.assert_close(model(**model.collate([ids])), expected, rtol=1e-4, atol=0)


def test_padding_does_not_change_a_number(model):
    ids = encoded(model)
    with torch.inference_mode():
        alone = torch.cat([model(**model.collate([row])) for row in ids])
        assert alone.std() > 10
        for width in (max(map(len, ids)), 64, 512):
            for on_the_left in (False, True):
                for pad_id in (0, 1, 2, 77):
                    together = model(**padded(ids, width, on_the_left, pad_id))
                    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)


def test_a_text_that_ends_in_the_padding_token_is_read_to_its_end(model):
    end = model.tokenizer.eos_token_id
    ids = [[0, 40, 41, 42, end], [0, 40, 41, end, end, end, 50, 51, 52]]
    with torch.inference_mode():
        alone = torch.cat([model(**model.collate([row])) for row in ids])
        shorter = model(**model.collate([ids[0][:-1]]))
        for on_the_left in (False, True):
            together = model(**padded(ids, 9, on_the_left, end))
            torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)
    assert abs(shorter.item() - alone[0].item()) > 1


def test_forward_returns_a_number_a_row(model):
    with torch.inference_mode():
        output = model(**model.collate(encoded(model)))
    assert output.shape == (len(QUERIES),)
    assert output.dtype == torch.float32


def test_forward_needs_to_know_the_lengths(model):
    with pytest.raises(TypeError, match="attention_mask, or lengths"):
        model(torch.tensor([[5, 6]]))


DECODERS = {  # what differs between their layers: biases of q, k and v; norms of q and k; heads wider than the rest
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": None, "head_dim": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
}


@pytest.fixture(params=train_sft_l4.PACKABLE)
def decoder(request, llama, tmp_path) -> str:
    """A folder with a tiny backbone of a type that is packed."""
    from transformers import AutoConfig

    shutil.copytree(llama, tmp_path / "decoder")
    torch.manual_seed(4)
    AutoModel.from_config(AutoConfig.for_model(request.param, **{
        "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
    } | DECODERS[request.param])).save_pretrained(tmp_path / "decoder")
    return str(tmp_path / "decoder")


def test_packed_is_one_by_one_in_outputs_and_gradients(config, decoder):
    config |= {"model_name": decoder, "lora_dropout": 0.0, "head_dropout": 0.0}
    packed, plain = (randomized(config | {"attention": attention}) for attention in ("packed", "padded"))
    assert (packed.packed, plain.packed) == (True, False)
    ids = encoded(packed)
    outputs = packed(**packed.collate(ids), scaled=True)
    alone = torch.cat([plain(torch.tensor([row]), torch.ones(1, len(row)), scaled=True) for row in ids])
    torch.testing.assert_close(outputs, alone, rtol=1e-5, atol=1e-6)
    assert alone.std() > 0.01
    for output in (outputs, alone):
        (output * torch.arange(1.0, 1 + len(ids))).sum().backward()
    n_compared = 0
    for (name, found), expected in zip(packed.named_parameters(), plain.parameters(), strict=True):
        if expected.grad is not None:
            n_compared += 1
            assert expected.grad.abs().max() > 0
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3,
                                       atol=1e-4 * float(expected.grad.abs().max()), msg=name)
    assert n_compared == len([name for name in packed.state_dict() if "target" not in name])


@pytest.mark.parametrize("last_only", [False, True])
def test_packed_attention_is_attention_query_by_query(last_only):
    torch.manual_seed(5)
    lengths, scaling = [3, 1, 6], 0.3
    query, key, value = (torch.randn(1, heads, 10, 8) for heads in (4, 2, 2))
    packing = train_sft_l4.Packing.of(lengths, query.device)
    asked = query[:, :, packing.offsets[1:] - 1] if last_only else query
    found, weights = train_sft_l4.attend_packed(None, asked, key, value, packing=packing, scaling=scaling,
                                                last_only=last_only)
    expected = []
    for begin, length in zip((0, 3, 4), lengths, strict=True):
        for place in [length - 1] if last_only else range(length):
            seen = slice(begin, begin + place + 1)  # of its own query, up to itself
            for head in range(4):
                scores = key[0, head // 2, seen] @ query[0, head, begin + place] * scaling
                expected.append(scores.softmax(0) @ value[0, head // 2, seen])
    torch.testing.assert_close(found, torch.stack(expected).reshape(1, -1, 4, 8))
    assert weights is None


def test_packed_attention_on_a_gpu_passes_the_kernel_what_it_takes():
    """The shapes and flags of the call, by fake tensors: no GPU is needed, and no number computed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        query, key, value = (torch.empty(1, heads, 10, 128, dtype=torch.bfloat16, device="cuda")
                             for heads in (24, 8, 8))
        packing = train_sft_l4.Packing([3, 1, 6], torch.empty(4, dtype=torch.int32, device="cuda"))
        for asked, last_only in ((query, False), (query.narrow(2, 0, 3), True)):
            output, _ = train_sft_l4.attend_packed(None, asked, key, value, packing=packing, scaling=0.1,
                                                   last_only=last_only)
            assert output.shape == (1, asked.shape[2], 24, 128)


def varlen_reference(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1),
                     enable_gqa=False):
    """What `torch.nn.attention.varlen.varlen_attn` documents, in plain torch: (tokens, heads, width)."""
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    assert window_size in ((-1, -1), (-1, 0))
    assert enable_gqa or query.shape[1] == key.shape[1]
    groups, outputs = query.shape[1] // key.shape[1], []
    for number in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[number] : cu_seq_q[number + 1]]
        k, v = (each[cu_seq_k[number] : cu_seq_k[number + 1]].repeat_interleave(groups, 1) for each in (key, value))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        if window_size == (-1, 0):
            hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(1 + len(k) - len(q))
            scores = scores.masked_fill(hidden, -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(outputs)


def test_the_kernel_of_a_gpu_is_called_for_the_same_numbers(config, decoder, monkeypatch):
    """Heads, groups of heads, offsets and causality of the call, with a stand-in for the kernel."""
    config |= {"model_name": decoder, "lora_dropout": 0.0, "head_dropout": 0.0}
    packed, plain = (randomized(config | {"attention": attention}) for attention in ("packed", "padded"))
    monkeypatch.setattr(train_sft_l4, "has_varlen_kernel", lambda _: True)
    calls = []
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", functools.wraps(varlen_reference)(
        lambda *args, **options: calls.append(options) or varlen_reference(*args, **options)))
    outputs = packed(**packed.collate(encoded(packed)), scaled=True)
    torch.testing.assert_close(outputs, plain(**plain.collate(encoded(plain)), scaled=True), rtol=1e-5, atol=1e-6)
    assert [options.get("window_size") for options in calls] == [(-1, 0), (-1, 0), None]


def test_packed_attention_raises_without_the_lengths(config):
    model = randomized(config)
    with pytest.raises(TypeError, match="packing"):
        model.backbone(input_ids=torch.tensor([[5, 6, 7]]))


def test_a_backbone_that_cannot_be_packed_is_padded_or_refused(config, bert, decoder):
    encoder = config | {"model_name": bert, "lora_target_modules": ["query", "value"]}
    with pytest.raises(UserError, match=r"attention packed: .* is a bert; what is packed are llama,"):
        BudgetRegressionModel(encoder | {"attention": "packed"})
    settings = json.loads((Path(decoder) / "config.json").read_text())
    if settings["model_type"] == "mistral":
        (Path(decoder) / "config.json").write_text(json.dumps(settings | {"sliding_window": 8}))
        assert not BudgetRegressionModel(config | {"model_name": decoder}).packed
        (Path(decoder) / "config.json").write_text(json.dumps(settings | {"sliding_window": config["max_length"]}))
        assert BudgetRegressionModel(config | {"model_name": decoder}).packed
        (Path(decoder) / "config.json").write_text(json.dumps(settings | {"sliding_window": 8}))
        with pytest.raises(UserError, match="attends to 8 tokens only; what is packed"):
            BudgetRegressionModel(config | {"model_name": decoder, "attention": "packed"})


def test_adapters_that_read_one_tensor_share_a_dropout_mask(config):
    config |= {"lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
    model = BudgetRegressionModel(config | {"lora_dropout": 0.5}).train()
    dropped = {}
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            key = name.split("layers.")[1].split(".lora_A")[0]
            module.register_forward_hook(
                lambda _, inputs, output, key=key: dropped.update({key: inputs[0].detach().clone()}))
    model(**model.collate(encoded(model)))
    for layer in (0, 1):
        q, k, v, o, gate, up, down = (
            dropped[f"{layer}.{name}"] for name in (
                "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                "mlp.up_proj", "mlp.down_proj"))
        assert torch.equal(gate, up)
        assert torch.equal(k, v)
        assert torch.equal(q, k) or layer == 1  # the last layer asks for the last tokens only
        masks = [each == 0 for each in (k, o, up)]
        assert all(0.3 < mask.float().mean() < 0.7 for mask in (*masks, down == 0))
        assert layer == 1 or not torch.equal(masks[0], masks[1])
    model.eval()
    assert model.predict(QUERIES) == model.predict(QUERIES)


def test_dropout_on_a_cpu_drops_the_share_it_should_and_keeps_the_mean():
    torch.manual_seed(6)
    states = torch.ones(999, 1001, requires_grad=True)
    for p in (0.05, 0.3, 0.9):
        dropped = train_sft_l4.SharedDropout(p)(states)
        kept = dropped != 0
        assert 1 - kept.float().mean() == pytest.approx(p, abs=0.002)
        assert dropped[kept].unique().tolist() == pytest.approx([1 / (1 - p)])
        assert kept.float().mean(0).std() == pytest.approx((p * (1 - p) / 999) ** 0.5, rel=0.1)  # no column is favoured
        (gradient,) = torch.autograd.grad(dropped.sum(), states)
        assert torch.equal(gradient, dropped)
    torch.manual_seed(6)
    first = train_sft_l4.SharedDropout(0.5)(states)
    torch.manual_seed(6)
    assert torch.equal(train_sft_l4.SharedDropout(0.5)(states), first)


def test_merged_adapters_give_the_same_budgets(trained, loaded):
    merged = BudgetRegressionModel.from_checkpoint(trained.best, merge=True)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert merged.predict(QUERIES) == pytest.approx(loaded.predict(QUERIES), rel=1e-4)


def test_a_batch_that_does_not_fit_into_memory_is_cut(model, monkeypatch):
    expected = model.predict(QUERIES)
    largest, forward = 2, model.forward

    def with_little_memory(input_ids, **options):
        if len(options["lengths"]) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(input_ids, **options)

    monkeypatch.setattr(model, "forward", with_little_memory)
    assert model.predict(QUERIES) == pytest.approx(expected, rel=1e-5)
    largest = 0
    with pytest.raises(torch.OutOfMemoryError):
        model.predict(QUERIES)


def test_a_quantized_backbone_trains_and_comes_back(config, tmp_path):
    pytest.importorskip("bitsandbytes")
    from conftest import save_llama

    folder = save_llama(tmp_path / "wide", seed=1, hidden_size=64)
    config |= {"model_name": folder, "quantization": "nf4", "num_epochs": 1}
    train_sft_l4.train(config)
    model = BudgetRegressionModel.from_checkpoint(f"{config['output_dir']}/best_model.pt")
    linear = model.backbone.base_model.model.layers[0].self_attn.q_proj.base_layer
    assert linear.weight.dtype == torch.uint8
    rows = [json.loads(line) for line in Path(config["log_dir"], "val_predictions.jsonl").read_text().splitlines()]
    assert model.predict([row["query"] for row in rows]) == pytest.approx(
        [row["predicted_budget"] for row in rows], rel=0.01)  # on a CPU, bitsandbytes computes in bf16 once it predicts
    checkpoint = torch.load(f"{config['output_dir']}/best_model.pt")
    with pytest.raises(UserError, match="trained on another backbone"):
        BudgetRegressionModel(config | {"quantization": "none"}).restore(checkpoint, Path("best_model.pt"), folder)


def test_predict_keeps_the_order_whatever_the_batches(model):
    alone = [model.predict([query])[0] for query in QUERIES]
    for max_tokens in (1, 40, 10_000):
        model.max_tokens = max_tokens
        assert model.predict(QUERIES) == pytest.approx(alone, rel=1e-5)
        assert model.predict(QUERIES[::-1]) == pytest.approx(alone[::-1], rel=1e-5)
    assert len(set(alone)) == len(alone)


def test_predict_of_nothing_is_nothing(model):
    assert model.predict([]) == []


def test_predict_refuses_a_bare_string(model):
    with pytest.raises(TypeError, match="a list of queries, not one string"):
        model.predict("Solve 2x + 5 = 13")


def test_predict_leaves_the_mode_and_uses_no_dropout(config):
    model = randomized(config | {"head_dropout": 0.9, "lora_dropout": 0.9}).train()
    assert model.predict(QUERIES) == model.predict(QUERIES)
    assert model.training


def test_a_cache_is_never_made(model):
    seen = []
    model.backbone.register_forward_hook(lambda module, inputs, output: seen.append(output.get("past_key_values")))
    model.train()(**model.collate(encoded(model)))
    model.predict(QUERIES)
    assert seen == [None] * len(seen)
    assert len(seen) >= 2


def test_only_adapters_and_head_are_trained_and_saved(config):
    model = BudgetRegressionModel(config)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapters = {name for name in trained if ".lora_A." in name or ".lora_B." in name}
    head = {name for name in trained if name.startswith("head.")}
    assert trained == adapters | head
    assert (len(adapters), len(head)) == (2 * 3 * 2, 10)
    assert set(model.state_dict()) == trained | {"target_offset", "target_scale"}


def test_the_bert_pooler_is_left_out(config, bert):
    model = BudgetRegressionModel(config | {"model_name": bert, "lora_r": 0})
    assert not [name for name, _ in model.named_parameters() if "pooler" in name]


def test_without_adapters_everything_is_trained_in_float32(config):
    model = BudgetRegressionModel(config | {"lora_r": 0}, dtype=torch.bfloat16)
    assert all(parameter.requires_grad and parameter.dtype is torch.float32 for parameter in model.parameters())
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()} | {"target_offset", "target_scale"}


def test_in_bf16_what_is_trained_stays_float32_and_so_does_the_output(config):
    model = BudgetRegressionModel(config, dtype=torch.bfloat16)
    with torch.no_grad():
        model.head[-1].weight.normal_()
    model.set_target(1000.0)
    dtypes = {parameter.requires_grad: set() for parameter in model.parameters()}
    for parameter in model.parameters():
        dtypes[parameter.requires_grad].add(parameter.dtype)
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}
    budgets = torch.tensor(model.predict(QUERIES))
    assert (budgets != budgets.bfloat16().float()).any()


@pytest.mark.parametrize("target_transform", ["tokens", "log"])
def test_a_fresh_model_predicts_the_median(config, target_transform):
    model = BudgetRegressionModel(config | {"target_transform": target_transform})
    model.set_target(742.0)
    assert model.predict(QUERIES) == pytest.approx([742.0] * len(QUERIES), rel=1e-6)


@pytest.mark.parametrize("target_transform", ["tokens", "log"])
def test_scaling_is_undone_and_one_unit_is_huber_delta_above_the_median(config, target_transform):
    model = BudgetRegressionModel(config | {"target_transform": target_transform, "huber_delta": 300.0})
    model.set_target(500.0)
    tokens = torch.tensor([1.0, 20.0, 500.0, 800.0, 9000.0, 1e6])
    torch.testing.assert_close(model.to_tokens(model.to_scaled(tokens)), tokens, rtol=1e-4, atol=0)
    scaled = model.to_scaled(torch.tensor([500.0, 800.0]))
    torch.testing.assert_close(scaled, torch.tensor([0.0, 1.0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target_transform", ["tokens", "log"])
def test_wild_outputs_stay_finite_budgets_of_at_least_one_token(config, target_transform):
    model = BudgetRegressionModel(config | {"target_transform": target_transform})
    model.set_target(500.0)
    wild = model.to_tokens(torch.tensor([-1e9, 1e9]))
    assert wild.tolist() == pytest.approx([1.0, train_sft_l4.LONGEST_BUDGET])


def test_loading_is_strict_on_adapters_and_head(config):
    model = BudgetRegressionModel(config)
    state = model.state_dict()
    adapter = next(name for name in state if "lora_A" in name)
    for name in ("head.0.weight", adapter, "target_scale"):
        with pytest.raises(RuntimeError, match="missing.*" + name.replace(".", r"\.")):
            model.load_state_dict({key: value for key, value in state.items() if key != name})
    with pytest.raises(RuntimeError, match=r"unexpected.*head\.99\.bias"):
        model.load_state_dict(state | {"head.99.bias": torch.zeros(1)})
    model.load_state_dict(state)


def test_a_dict_with_the_frozen_weights_loads_too(config):
    source, model = randomized(config), BudgetRegressionModel(config).eval()
    frozen = {name: parameter.detach() for name, parameter in source.named_parameters() if not parameter.requires_grad}
    assert len(frozen) == 20
    model.load_state_dict(frozen | source.state_dict())
    assert model.predict(QUERIES) == source.predict(QUERIES)


def test_a_wrong_adapter_target_is_named_with_what_there_is(config):
    with pytest.raises(UserError) as refused:
        BudgetRegressionModel(config | {"lora_target_modules": ["q_proj", "query", "w1"]})
    assert str(refused.value) == (
        f"lora_target_modules: query, w1 not in {config['model_name']}, "
        "whose linear layers are down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj")


def test_a_missing_folder_is_named_with_what_to_do(config):
    with pytest.raises(UserError, match=r"/nowhere/backbone\b.*--model_name"):
        BudgetRegressionModel(config | {"model_name": "/nowhere/backbone"})


def test_a_backbone_that_the_hub_does_not_give_says_what_to_do(config):
    with pytest.raises(UserError) as refused:
        BudgetRegressionModel(config | {"model_name": "nobody/nothing"})
    message = str(refused.value)
    assert message.startswith("cannot load nobody/nothing: ")
    for advice in ("accept the licence at https://huggingface.co/nobody/nothing", "hf auth login", "--model_name"):
        assert advice in message


@pytest.mark.parametrize("damage", ["no weights", "truncated weights", "a layer is missing", "other shapes",
                                    "no tokenizer", "config is not JSON"])
def test_a_damaged_backbone_folder_is_a_user_error(config, tmp_path, damage):
    folder = tmp_path / "damaged"
    shutil.copytree(config["model_name"], folder)
    weights = folder / "model.safetensors"
    if damage == "no weights":
        weights.unlink()
    elif damage == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "a layer is missing":  # which transformers would fill with random numbers
        save_file({name: tensor for name, tensor in load_file(weights).items() if ".1." not in name}, weights,
                  metadata={"format": "pt"})
    elif damage == "other shapes":
        config_file = folder / "config.json"
        config_file.write_text(config_file.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
    elif damage == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    else:
        (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=f"cannot load .*{folder}"):
        BudgetRegressionModel(config | {"model_name": str(folder)})


@pytest.mark.parametrize("max_length", [17, 257])
def test_max_length_must_fit_the_template_and_the_backbone(config, max_length):
    with pytest.raises(UserError, match=rf"max_length must be between \d+ .* and 256 .*, got {max_length}"):
        BudgetRegressionModel(config | {"max_length": max_length})


def test_a_checkpoint_loads_with_the_defaults_of_torch_and_holds_plain_values(trained):
    def plain(value) -> bool:
        if isinstance(value, dict):
            return type(value).__name__ in ("dict", "OrderedDict") and all(map(plain, [*value, *value.values()]))
        if isinstance(value, (list, tuple)):
            return all(map(plain, value))
        return isinstance(value, torch.Tensor) or type(value) in (str, int, float, bool, type(None))

    for name in ("best_model", "epoch_1", "epoch_2", "last"):
        checkpoint = torch.load(trained.folder / f"checkpoints/{name}.pt")
        promised = {"epoch", "model_state_dict", "val_mae", "val_metrics", "config"}
        optimizer = {"optimizer_state_dict", "scheduler_state_dict"}
        assert promised <= set(checkpoint)
        assert optimizer & set(checkpoint) == (set() if name == "best_model" else optimizer)
        assert plain(checkpoint)


def test_a_checkpoint_keeps_its_own_template_and_length(trained, monkeypatch):
    monkeypatch.setattr(train_sft_l4, "PROMPT_TEMPLATE", "{query}")
    monkeypatch.setitem(train_sft_l4.CONFIG, "max_length", 99)
    model = BudgetRegressionModel.from_checkpoint(trained.best)
    assert model.prompt_template == "Query: {query}\nReasoning tokens needed:"
    assert model.max_length == 64


def test_from_checkpoint_gives_an_eval_model_whose_backbone_may_have_moved(trained, loaded, tmp_path):
    moved = shutil.copytree(trained.config["model_name"], tmp_path / "moved")
    model = BudgetRegressionModel.from_checkpoint(str(trained.best), device="cpu", model_name=str(moved))
    assert not model.training
    assert model.predict(QUERIES) == pytest.approx(loaded.predict(QUERIES), rel=1e-3)


def refusal(path, **options) -> str:
    with pytest.raises(UserError) as refused:
        BudgetRegressionModel.from_checkpoint(path, **options)
    return str(refused.value)


def test_a_missing_checkpoint_is_named(tmp_path):
    assert refusal(tmp_path / "no.pt") == f"cannot read checkpoint {tmp_path}/no.pt: No such file or directory"
    assert refusal(tmp_path) == f"cannot read checkpoint {tmp_path}: Is a directory"


@pytest.mark.parametrize("size", [0, 1, 1000, 5000, 500_000, -1])
def test_a_truncated_checkpoint_is_refused(trained, tmp_path, size):
    path = tmp_path / "cut.pt"
    path.write_bytes(trained.best.read_bytes()[:size])
    assert refusal(path).startswith(f"{path} is not a whole checkpoint (")


def test_random_bytes_are_refused(tmp_path):
    path = tmp_path / "noise.pt"
    path.write_bytes(bytes(torch.arange(5000).mul(2654435761).remainder(251).tolist()))
    assert refusal(path).startswith(f"{path} is not a whole checkpoint (")


def test_a_foreign_checkpoint_is_refused(tmp_path):
    path = tmp_path / "foreign.pt"
    torch.save({"epoch": 1, "config": {}, "state_dict": {}}, path)
    assert refusal(path) == (f"{path} is not a checkpoint of this program: it has no model_state_dict, val_mae, "
                             "val_metrics, prompt_template, backbone_fingerprint, data_fingerprint")
    torch.save([1, 2], path)
    assert "is not a checkpoint of this program: it has no epoch, model_state_dict" in refusal(path)


class Malicious:
    """Pickles into a call."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_malicious_checkpoint_is_not_executed(trained, tmp_path, legacy):
    path, marker = tmp_path / "evil.pt", tmp_path / "executed"
    checkpoint = torch.load(trained.best) | {"val_metrics": Malicious(marker)}
    if legacy:
        path.write_bytes(pickle.dumps(checkpoint, protocol=2))
    else:
        torch.save(checkpoint, path)
    assert refusal(path).startswith(f"{path} is not a whole checkpoint (")
    assert not marker.exists()


def test_another_backbone_of_the_same_shape_is_refused(trained, other_llama):
    message = refusal(trained.best, model_name=other_llama)
    assert message == (f"{trained.best} was trained on another backbone than {other_llama} as it is now "
                       f"(it says {trained.config['model_name']})")


def test_a_head_of_another_width_is_refused(trained, tmp_path):
    path, checkpoint = tmp_path / "wide.pt", torch.load(trained.best)
    checkpoint["model_state_dict"]["head.0.weight"] = torch.zeros(1024, 33)
    torch.save(checkpoint, path)
    message = refusal(path)
    assert message.startswith(f"{path} does not fit this model: ")
    assert "head.0.weight" in message


def test_a_checkpoint_that_lacks_a_tensor_is_refused(trained, tmp_path):
    path, checkpoint = tmp_path / "lacks.pt", torch.load(trained.best)
    del checkpoint["model_state_dict"]["head.0.weight"]
    torch.save(checkpoint, path)
    assert refusal(path) == f"{path} does not fit this model: missing ['head.0.weight'], unexpected []"


def test_a_constructor_does_not_change_its_config(config):
    before = copy.deepcopy(config)
    BudgetRegressionModel(config)
    assert config == before


def test_the_log_unit_stays_meaningful_for_small_medians(config):
    model = BudgetRegressionModel(config | {"target_transform": "log"})
    model.set_target(1.0)
    assert model.target_scale.item() == pytest.approx(math.log(1001), rel=1e-6)


def test_roberta_has_fewer_positions_than_its_config_says(config, bert, tmp_path):
    from transformers import RobertaConfig, RobertaModel

    shutil.copytree(bert, tmp_path / "roberta")
    RobertaModel(RobertaConfig(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                               num_attention_heads=4, max_position_embeddings=66, pad_token_id=1)
                 ).save_pretrained(tmp_path / "roberta")
    config |= {"model_name": str(tmp_path / "roberta"), "lora_target_modules": ["query"]}
    long = ["a " * 200]
    assert BudgetRegressionModel(config | {"max_length": 64}).predict(long)
    with pytest.raises(UserError, match=r"max_length must be between \d+ .* and 64 "):
        BudgetRegressionModel(config | {"max_length": 65})
