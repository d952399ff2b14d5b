"""The command line and CONFIG: overrides, refusals, help, and what importing the module does."""

import ast
import copy
import json
import re
import sys

import pytest
from conftest import ROOT, SCRIPT, run_command

import train_sft_l4
from train_sft_l4 import CONFIG, main, parse_train_arguments

SOURCE = SCRIPT.read_text(encoding="utf-8")
FIXED = {
    "model_name": "meta-llama/Llama-3.2-3B-Instruct", "batch_size": 2, "grad_accum_steps": 16, "num_epochs": 3,
    "learning_rate": 2e-4, "max_length": 512, "huber_delta": 1000.0, "weight_decay": 0.01, "warmup_steps": 500,
    "lora_r": 32, "lora_alpha": 64, "lora_dropout": 0.05,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "train_path": "data/train.jsonl", "val_path": "data/val.jsonl", "test_path": "data/test.jsonl",
}


def changed(*arguments) -> dict:
    """Return what the arguments change of CONFIG."""
    cfg = parse_train_arguments([str(each) for each in arguments])
    assert list(cfg) == list(CONFIG)
    for key, value in cfg.items():
        assert type(value) is type(CONFIG[key]), key
    return {key: value for key, value in cfg.items() if value != CONFIG[key]}


def test_the_promised_keys_have_the_promised_values():
    assert {key: CONFIG[key] for key in FIXED} == FIXED
    assert {key: type(CONFIG[key]) for key in FIXED} == {key: type(value) for key, value in FIXED.items()}


def test_without_arguments_the_configuration_is_config():
    assert changed() == {}


@pytest.mark.parametrize(("arguments", "expected"), [
    (["--learning_rate", "1e-4"], {"learning_rate": 1e-4}),
    (["--learning-rate", "1e-4"], {"learning_rate": 1e-4}),
    (["--learning_rate=1e-4"], {"learning_rate": 1e-4}),
    (["--learning-rate=1"], {"learning_rate": 1.0}),
    (["--num_epochs", "7", "--seed", "1"], {"num_epochs": 7, "seed": 1}),
    (["--lora_target_modules", "query,key,value"], {"lora_target_modules": ["query", "key", "value"]}),
    (["--lora-target-modules=query, value,"], {"lora_target_modules": ["query", "value"]}),
    (["--overwrite"], {"overwrite": True}),
    (["--overwrite", "--seed=1"], {"overwrite": True, "seed": 1}),
    (["--overwrite", "true"], {"overwrite": True}),
    (["--overwrite=Yes"], {"overwrite": True}),
    (["--overwrite=1"], {"overwrite": True}),
    (["--overwrite", "false"], {}),
    (["--overwrite=0"], {}),
    (["--allow-leakage", "no"], {}),
    (["--val_path="], {"val_path": ""}),
    (["--model_name", "a/b", "--model_name", "c/d"], {"model_name": "c/d"}),
])
def test_a_flag_overrides_its_key(arguments, expected):
    assert changed(*arguments) == expected


def test_every_key_is_a_flag_in_both_spellings():
    for key, value in CONFIG.items():
        text = ",".join(value) if isinstance(value, list) else str(value)
        assert changed(f"--{key}={text}", f"--{key.replace('_', '-')}={text}") == {}


@pytest.fixture
def config_file(tmp_path):
    def write(content) -> str:
        path = tmp_path / "overrides.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return str(path)

    return write


def test_a_file_overrides_several_keys_and_flags_win_over_it(config_file):
    path = config_file({"num_epochs": 9, "learning_rate": 1, "lora_target_modules": ["a"], "overwrite": True})
    from_file = {"num_epochs": 9, "learning_rate": 1.0, "lora_target_modules": ["a"], "overwrite": True}
    assert changed("--config", path) == from_file
    assert changed("--num_epochs", 4, "--config", path, "--overwrite=no") == {
        "num_epochs": 4, "learning_rate": 1.0, "lora_target_modules": ["a"]}
    assert changed("--config", path, "--num_epochs", CONFIG["num_epochs"])["learning_rate"] == 1.0
    assert "num_epochs" not in changed("--config", path, "--num_epochs", CONFIG["num_epochs"])


@pytest.mark.parametrize(("content", "message"), [
    ({"lerning_rate": 1}, "unknown key 'lerning_rate'"),
    ({"num_epochs": 2.0}, "num_epochs must be int, got 2.0"),
    ({"num_epochs": True}, "num_epochs must be int, got True"),
    ({"learning_rate": "1e-4"}, "learning_rate must be float, got '1e-4'"),
    ({"learning_rate": True}, "learning_rate must be float, got True"),
    ({"overwrite": 1}, "overwrite must be bool, got 1"),
    ({"model_name": None}, "model_name must be str, got None"),
    ({"lora_target_modules": "q_proj"}, "lora_target_modules must be a list of strings, got 'q_proj'"),
    ({"lora_target_modules": ["a", 1]}, "lora_target_modules must be a list of strings, got ['a', 1]"),
    ({"a": 1, "seed": "x", "b": 2}, "unknown key 'a'; seed must be int, got 'x'; unknown key 'b'"),
    ([1], "expected one JSON object, got list"),
])
def test_a_wrong_file_is_refused_by_name(config_file, capsys, content, message):
    path = config_file(content)
    assert main(["--config", path]) == 2
    assert capsys.readouterr().err == f"error: --config {path}: {message}\n"


@pytest.mark.parametrize("content", [b"{", b"\xff{}", b'{"learning_rate": 1' + b"0" * 400 + b"}"])
def test_a_file_that_cannot_be_read_is_refused(config_file, capsys, content):
    path = config_file(content)
    assert main(["--config", path]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_missing_file_is_refused(capsys):
    assert main(["--config", "/nowhere.json"]) == 2
    assert "cannot read --config /nowhere.json" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), [
    (["--num_epochs", "two"], "--num_epochs: expected int, got 'two'"),
    (["--num_epochs", "2.5"], "--num_epochs: expected int, got '2.5'"),
    (["--learning-rate", "fast"], "--learning_rate: expected float, got 'fast'"),
    (["--overwrite", "maybe"], "--overwrite: expected bool, got 'maybe'"),
    (["--seed=", "--lora_r=x"], "--seed: expected int, got ''; --lora_r: expected int, got 'x'"),
    (["--lr_schedule", "step"], "lr_schedule must be one of linear, cosine, constant, got 'step'"),
    (["--on_bad_row", "fix"], "on_bad_row must be one of error, skip, got 'fix'"),
    (["--activation_checkpointing", "true"], "activation_checkpointing must be one of auto, off, on, got 'true'"),
    (["--learning_rate", "nan"], "learning_rate must be finite, got nan"),
    (["--learning_rate", "0"], "learning_rate must be greater than 0, got 0.0"),
    (["--huber_delta", "0"], "huber_delta must be greater than 0, got 0.0"),
    (["--lora_dropout", "1"], "lora_dropout must be at least 0 and below 1, got 1.0"),
    (["--head_dropout", "-0.1"], "head_dropout must be at least 0 and below 1, got -0.1"),
    (["--warmup_ratio", "-0.5"], "warmup_ratio must be at least 0 and below 1, got -0.5"),
    (["--val_fraction", "0.6"], "val_fraction must be above 0 and at most 0.5, got 0.6"),
    (["--lora_target_modules", ","], "lora_target_modules must not be empty"),
    (["--train_path="], "train_path must not be empty"),
])
def test_a_wrong_value_is_refused_by_name(capsys, arguments, message):
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_every_size_that_cannot_be_is_named_in_one_message(capsys):
    sizes = {"batch_size": 0, "grad_accum_steps": -1, "num_epochs": 0, "max_length": 0, "lora_r": -2, "lora_alpha": 0,
             "warmup_steps": -1, "max_tokens_per_micro_batch": 0, "max_train_examples": -1, "eval_every": -5,
             "early_stopping_patience": -1, "seed": -1}
    assert main([f"--{key}={value}" for key, value in sizes.items()]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    for key, value in sizes.items():
        assert re.search(rf"\b{key} must be at least \d+, got {value}\b", error), key
    assert error.count(" must be ") == len(sizes)


@pytest.mark.parametrize("key", [key for key, value in CONFIG.items() if isinstance(value, float)])
@pytest.mark.parametrize("value", ["inf", "nan", "-inf"])
def test_a_number_that_is_not_finite_is_refused(capsys, key, value):
    """JSON cannot hold it, so that the history could not be written."""
    assert main([f"--{key}={value}"]) == 2
    assert f"error: {key} must " in capsys.readouterr().err


def test_a_seed_that_no_generator_takes_is_refused(capsys):
    assert main(["--seed", str(2**64)]) == 2
    assert "seed" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "named"), [
    (["--lerning_rate", "1"], "unrecognized arguments: --lerning_rate 1"),
    (["--num_epoch=1"], "unrecognized arguments: --num_epoch=1"),
    (["evalute"], "unrecognized arguments: evalute"),
    (["--config"], "argument --config: expected one argument"),
    (["evaluate", "--data=a", "--checkpoint=b", "--num_epochs=1"], "unrecognized arguments: --num_epochs=1"),
    (["evaluate", "--checkpoint=b"], "the following arguments are required: --data"),
    (["predict", "query"], "the following arguments are required: --checkpoint"),
])
def test_an_unknown_or_missing_flag_is_named_with_exit_code_2(capsys, arguments, named):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {named}\n")


def test_a_tracker_that_is_not_installed_is_named(capsys, monkeypatch):
    monkeypatch.setattr(train_sft_l4.util, "find_spec", lambda name: None)
    assert main(["--tracker", "wandb"]) == 2
    assert capsys.readouterr().err == "error: tracker wandb needs a package: pip install wandb\n"


def test_config_is_never_changed(config_file):
    before = copy.deepcopy(CONFIG)
    cfg = parse_train_arguments(["--config", config_file({"num_epochs": 9}), "--seed", "1"])
    cfg["lora_target_modules"].append("extra")
    parse_train_arguments([])["lora_target_modules"].clear()
    assert before == CONFIG


def test_help_prints_every_line_of_config_with_its_comment(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    block = re.search(r"^CONFIG: .*?^}", SOURCE, re.DOTALL | re.MULTILINE).group()
    assert block in printed
    assert len(block.splitlines()) > len(CONFIG)


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_the_other_commands_have_help(capsys, command):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert "--checkpoint" in capsys.readouterr().out


def test_every_key_of_config_has_one_line_with_a_comment():
    block = re.search(r"^CONFIG: .*?^}", SOURCE, re.DOTALL | re.MULTILINE).group().splitlines()
    lines = {key: [line for line in block if line.strip().startswith(f'"{key}":')] for key in CONFIG}
    assert {key: len(found) for key, found in lines.items()} == dict.fromkeys(CONFIG, 1)
    assert not [key for key, found in lines.items() if "  # " not in found[0]]


def test_every_key_that_is_read_exists_and_every_key_that_exists_is_read():
    tree, read = ast.parse(SOURCE), set()
    tree.body = [node for node in tree.body if getattr(node, "name", "") != "validate_config"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(getattr(node.slice, "value", None), str):
            name = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            if name in ("cfg", "config", "CONFIG"):
                read.add(node.slice.value)
    assert read <= set(CONFIG)
    assert set(CONFIG) - read == {"test_path"}
    assert 'cfg[f"{name}_path"]' in SOURCE
    assert train_sft_l4.FREE_ON_RESUME | set(train_sft_l4.CHOICES) <= set(CONFIG)


def test_no_configuration_is_written_to():
    for node in ast.walk(ast.parse(SOURCE)):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Subscript):
                assert ast.unparse(target.value) not in ("config", "CONFIG", "self.cfg", "run.cfg", "self.config")


def test_the_requirements_are_the_scripts_own():
    header = re.search(r"^# /// script\n(.*?)^# ///$", SOURCE, re.DOTALL | re.MULTILINE).group(1)
    dependencies = re.search(r"dependencies = \[(.*?)\]", header, re.DOTALL).group(1)
    requirements = (ROOT / "requirements.txt").read_text().split()
    assert re.findall(r'"(.+?)"', dependencies) == requirements
    assert all(re.fullmatch(r"[a-z-]+==[\d.]+", line) for line in requirements)
    assert (ROOT / "tests/requirements.txt").read_text().startswith("-r ../requirements.txt\n")


def test_only_the_standard_library_and_the_requirements_are_imported():
    names = {"scikit-learn": "sklearn"}
    allowed = {names.get(line.split("==")[0], line.split("==")[0])
               for line in (ROOT / "requirements.txt").read_text().split()}
    allowed |= {"scipy", "psutil", "huggingface_hub", "safetensors"}  # come with them
    optional = {"matplotlib"}
    found = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    assert found - sys.stdlib_module_names - optional <= allowed


IMPORT_PROBE = """
import json, sys
import numpy, torch, tqdm
sys.argv[:] = ["x", "--no-such-flag"]
opened, executed = [], []
def watch(event, arguments):
    if event == "open" and not str(arguments[0]).endswith((".py", ".pyc")):
        opened.append(str(arguments[0]))
    if event in ("socket.connect", "subprocess.Popen", "os.system"):
        executed.append(event)
sys.addaudithook(watch)
seed, state = torch.initial_seed(), numpy.random.get_state()[1].tolist()
import train_sft_l4
heavy = {name.split(".")[0] for name in sys.modules} & {
    "transformers", "peft", "accelerate", "sklearn", "scipy", "matplotlib", "psutil", "huggingface_hub"}
print(json.dumps({"heavy": sorted(heavy), "opened": opened, "executed": executed, "argv": sys.argv,
    "cuda": torch.cuda.is_initialized(), "seeded": torch.initial_seed() != seed
    or numpy.random.get_state()[1].tolist() != state}))
"""


def test_importing_the_module_does_nothing():
    process = run_command("-c", IMPORT_PROBE, cwd=ROOT, program=[sys.executable])
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == {
        "heavy": [], "opened": [], "executed": [], "argv": ["x", "--no-such-flag"], "cuda": False, "seeded": False}


def test_main_prints_a_user_error_without_a_traceback(config, capsys):
    assert main([f"--train_path={config['train_path']}x"]) == 2
    assert capsys.readouterr().err == f"error: cannot read {config['train_path']}x: No such file or directory\n"


def test_the_file_stays_one_sittings_read():
    functions = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.FunctionDef)]
    long = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert {name: count for name, count in long.items() if count > (110 if name == "train" else 60)} == {}
