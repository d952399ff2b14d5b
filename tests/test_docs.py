"""The documents: every command parses, every example runs, and what they say of CONFIG, files and flags is true."""

import json
import re
import shlex

import pytest
from conftest import ROOT

import train_sft_l4
from train_sft_l4 import CONFIG

DOCUMENTS = ("README.md", "UPLOAD_INSTRUCTIONS.md")
FENCE = re.compile(r"^[ \t]*```(\w*)[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    """Return the fenced code blocks of a document in a language."""
    return [body for each, body in FENCE.findall(text_of(document)) if each == language]


def arguments_of_commands(document: str) -> list[list[str]]:
    """Return the arguments of every shell command of a document, also behind && or |, that runs the script."""
    found = []
    for line in re.sub(r"\\\n\s*", " ", "\n".join(blocks(document, "bash"))).split("\n"):
        lexer = shlex.shlex(re.sub(r"\s2>&1", "", line), posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, "&&"]:
            if not set(word) <= set("&|;<>"):
                command.append(word)
                continue
            if "train_sft_l4.py" in command and command[0] in ("python", "python3", "accelerate", "torchrun"):
                found.append(command[command.index("train_sft_l4.py") + 1 :])
            command = []
    return found


def parse(arguments: list[str]) -> None:
    """Parse the arguments as `main` does, and run nothing."""
    if arguments[:1] in (["evaluate"], ["predict"]):
        train_sft_l4.parse_command(arguments[0], arguments[1:])
    else:
        train_sft_l4.parse_train_arguments(arguments[1:] if arguments[:1] == ["train"] else arguments)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_that_runs_the_script_parses(document, demo, tmp_path, monkeypatch):
    (tmp_path / "data/demo").mkdir(parents=True)
    (tmp_path / "data/demo/config.json").write_text(json.dumps(demo.DEMO_CONFIG))
    monkeypatch.chdir(tmp_path)
    found = arguments_of_commands(document)
    assert found
    for arguments in found:
        try:
            parse(arguments)
        except (SystemExit, train_sft_l4.UserError) as error:
            pytest.fail(f"{document}: train_sft_l4.py {shlex.join(arguments)}: {error}")


def test_every_command_that_prepares_data_parses():
    import test_prepare

    prepare = test_prepare.load()
    commands = [shlex.split(line) for line in "\n".join(blocks("README.md", "bash")).split("\n")
                if line.startswith("python data/prepare.py ")]
    assert {arguments[2] for arguments in commands} == {"sample", "label", "split"}
    for arguments in commands:
        prepare.parse_arguments(arguments[2:])


def test_the_documents_show_training_evaluation_and_prediction():
    commands = [arguments[0] if arguments else "" for document in DOCUMENTS
                for arguments in arguments_of_commands(document)]
    assert {"", "evaluate", "predict", "--config"} <= set(commands)


def test_the_python_examples_run(as_a_user):
    examples = blocks("README.md", "python")
    assert len(examples) >= 2
    names = [as_a_user(example) for example in examples]
    budgets = next(each["budgets"] for each in names if "budgets" in each)
    tokens = next(each["tokens"] for each in names if "tokens" in each)
    assert tokens == pytest.approx(budgets[0], rel=1e-5)


def test_the_data_example_is_a_valid_file(tmp_path):
    example = next(block for block in blocks("README.md", "json") if '"query"' in block)
    path = tmp_path / "example.jsonl"
    path.write_text(example, encoding="utf-8")
    rows = list(train_sft_l4.usable_rows(str(path), True, "error", pytest.fail))
    assert len(rows) >= 3
    assert {row.censored for row in rows} == {True, False}


def known_flags(monkeypatch) -> set[str]:
    """Return every flag of every command, as the parsers have them."""
    seen: set[str] = set()
    original = train_sft_l4.argparse.ArgumentParser.add_argument

    def note(parser, *names, **options):
        seen.update(name for name in names if name.startswith("--"))
        return original(parser, *names, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train_sft_l4.argparse.ArgumentParser, "add_argument", note)
        train_sft_l4.parse_train_arguments([])
        train_sft_l4.parse_command("evaluate", ["--checkpoint=a", "--data=b"])
        train_sft_l4.parse_command("predict", ["--checkpoint=a", "query"])
    return seen


def test_every_flag_that_the_readme_names_exists(monkeypatch):
    prose = re.sub("`pip [^`]*`", "", FENCE.sub("", text_of("README.md")))
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", prose))
    assert "--overwrite" in named
    assert not named - known_flags(monkeypatch)


def test_what_the_readme_says_of_config_is_so():
    table = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (`[^|]+`(?:, `[^|]+`)*) \|", text_of("README.md"), re.MULTILINE)
    checked = []
    for keys, values in table:
        for key, value in zip(re.findall(r"`(\w+)`", keys), re.findall(r"`([^`]+)`", values), strict=True):
            assert train_sft_l4.parse_value(value, CONFIG[key]) == CONFIG[key], key
            checked.append(key)
    assert len(checked) >= 6
    assert len(set(checked)) == len(checked)


def test_every_file_that_the_readme_lists_is_written_by_a_run(trained):
    section = text_of("README.md").split("## What a run writes", 1)[1].split("\n## ", 1)[0]
    named = set(re.findall(r"`((?:checkpoints|logs)/[\w.]+)`", section))
    assert {"checkpoints/best_model.pt", "logs/training_history.json"} <= named
    assert not [name for name in named if not (trained.folder / name).is_file()]


def test_every_number_that_the_readme_explains_is_logged(trained):
    section = text_of("README.md").split("| number | meaning |", 1)[1].split("\n\n", 1)[0]
    explained = {name for cell in re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE)
                 for name in re.findall(r"`([a-z_]+)`", cell)}
    logged = {*trained.history["steps"][0], *trained.history["validations"][0]}
    assert "underrun_rate" in explained
    assert not explained - logged
    assert not set(trained.history["val"]) - explained - {"rows", "baselines"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_a_document_links_to_exists(document):
    links = re.findall(r"\]\(([^)#]+)", text_of(document))
    assert not [link for link in links if "://" not in link and not (ROOT / link).exists()]


def test_what_the_readme_says_of_the_demo_is_so(demo):
    text = text_of("README.md")
    families = sum(len(each) for each in demo.FAMILIES.values())
    assert {int(number) for number in re.findall(r"(\d+) kinds of problem", text)} == {families}
    assert {int(number) for number in re.findall(r"of (\d+) test problems", text)} == {
        families * demo.ROWS_PER_FAMILY["test"]}


def test_what_the_readme_says_of_speed_is_what_the_kept_figures_say():
    import benchmark

    assert benchmark.readme_text().strip() in text_of("README.md")
