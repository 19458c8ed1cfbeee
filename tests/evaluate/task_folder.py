"""A folder of small tasks for the reference model, which has read Python: definitions, and data as files and as on the hub."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

#: Question, choices, index of the right one; some are beyond the model.
CHOICES = (
    ("import os\nimport ", ["sys\n", "qqq\n", "(((\n"], 0),
    ("def f(x):\n    return ", ["x\n", "class\n", "import\n"], 0),
    ("if x is ", ["while", "for", "None"], 2),
    ("# The capital of France is ", ["None", "Paris", "self"], 1),
    ("x = 17 * 23\nassert x == ", ["0", "391", "1"], 1),
)
PAGES = (
    'def add(a, b):\n    """Return the sum."""\n    return a + b\n' * 12,
    "The quick brown fox jumps over the lazy dog.\n",
)
LINES = (
    ("if x is None:\n    return None\nif y is None:\n    return", " None"),
    ("x = 17 * 23\nassert x ==", " 391"),
)

_DEFINITIONS = {
    "next_piece": """
dataset_path: someone/next-piece
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "pages": """
dataset_path: json
dataset_kwargs:
  data_files:
    test: pages.jsonl
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
    "finish_line": """
dataset_path: json
dataset_kwargs:
  data_files:
    test: lines.jsonl
output_type: generate_until
test_split: test
doc_to_text: "{{prompt}}"
doc_to_target: "{{target}}"
target_delimiter: ""
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 8
  do_sample: false
metric_list:
  - metric: exact_match
""",
}
_DEFINITIONS["runs_code"] = _DEFINITIONS["finish_line"] + "unsafe_code: true\n"
_DEFINITIONS["broken_metric"] = _DEFINITIONS["finish_line"] + "    no_such_switch: true\n"
_DEFINITIONS["far_away"] = _DEFINITIONS["next_piece"].replace("someone/next-piece", "nobody/nothing")


def write_tasks(folder: Path) -> Path:
    """Definitions and data; ``next_piece`` has its data as the hub keeps them."""
    for name, definition in _DEFINITIONS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}{definition}")
    data = folder / "someone" / "next-piece" / "data"
    data.mkdir(parents=True)
    rows = [{"question": question, "choices": choices, "answer": answer} for question, choices, answer in CHOICES]
    pd.DataFrame(rows).to_parquet(data / "test-00000-of-00001.parquet")
    _write_lines(folder / "pages.jsonl", [{"page": page} for page in PAGES])
    _write_lines(folder / "lines.jsonl", [{"prompt": prompt, "target": target} for prompt, target in LINES])
    return folder


def write_arc(folder: Path) -> int:
    """A copy of the data set of ``arc_easy`` as the hub keeps it, of three questions; how many they are."""
    data = folder / "allenai" / "ai2_arc"
    (data / "ARC-Easy").mkdir(parents=True)
    rows = [
        {
            "id": str(i),
            "question": f"What does import {name} import?",
            "choices": {"text": [name, "nothing"], "label": ["A", "B"]},
            "answerKey": "A",
        }
        for i, name in enumerate(("os", "sys", "re"))
    ]
    splits = ("train", "validation", "test")
    for split in splits:
        pd.DataFrame(rows).to_parquet(data / "ARC-Easy" / f"{split}-00000-of-00001.parquet")
    listed = "\n".join(f"  - split: {split}\n    path: ARC-Easy/{split}-*" for split in splits)
    (data / "README.md").write_text(f"---\nconfigs:\n- config_name: ARC-Easy\n  data_files:\n{listed}\n---\n")
    return len(rows)


def _write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
