#!/usr/bin/env python3
"""What every method writes for the reference model, as one digest each, so that two commits can be compared.

usage: same_bytes.py --record FILE      at the commit to compare with, with that commit's interpreter
       same_bytes.py --against FILE     at this one; exit 1 if any recipe writes other tensors

Bytes are the same for the same machine and number of threads: record and compare with the same ``OMP_NUM_THREADS``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch

import moebius
from moebius import CalibrationSettings, Recipe, quantize_model

#: Method, bits and options: every method, every budget at which a default changes, and every kind of unit.
RECIPES: tuple[tuple[str, float | None, dict[str, object]], ...] = (
    ("moebius", 0.5, {}),
    ("moebius", 1.0, {}),
    ("moebius", 2.0, {"rest": "int8"}),
    ("moebius", 3.0, {}),
    ("moebius", 0.5, {"refine": True, "refine_steps": 4}),
    ("mobie", None, {}),
    ("mobie", None, {"side": "output", "null_space": "expert", "nges_relative": False}),
    ("mobie", None, {"side": "hidden", "gain": True, "router": "binary", "glas_groups": 4}),
    ("mobie", None, {"cejd": False, "glas": False, "nges": False}),
    ("rtn", 1, {}),
    ("rtn", 4, {"rest": "int4"}),
    ("gptq", 2, {}),
    ("gptq", 3, {"gain": True}),
    ("gptq", 2, {"act_order": True}),
    ("awq", 2, {}),
    ("moequant", 2, {}),
    ("mxmoe", 2.25, {}),
    ("gptvq", 2, {}),
    ("vptq", 2, {"idre": True, "bcos": "mean_variance"}),
    ("nowag", 2, {}),
    ("kbvq", 2, {}),
    ("bitsmoe", 2, {}),
    ("billm", None, {}),
    ("arb", None, {"nges": True, "glas": True}),
)


def digest(folder: Path) -> str:
    """Of every tensor by name, type, shape and content, and of what the config says of the packed modules."""
    tensors = json.loads((folder / "moebius_manifest.json").read_text())["tensors"]
    modules = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
    content = {name: [entry["dtype"], entry["shape"], entry["sha256"]] for name, entry in tensors.items()}
    return hashlib.sha256(json.dumps([content, modules], sort_keys=True).encode()).hexdigest()


def written() -> dict[str, str]:
    """Digest by recipe."""
    found = {}
    settings = CalibrationSettings(windows=8, window_length=128)
    with tempfile.TemporaryDirectory() as folder:
        for number, (method, bits, options) in enumerate(RECIPES):
            out = Path(folder) / str(number)
            quantize_model(moebius.reference_path(), out, Recipe.make(method, bits, **options), settings)
            name = " ".join([method, *([f"{bits:g}"] if bits else []), *(f"{k}={v}" for k, v in options.items())])
            found[name] = digest(out)
            print(f"{found[name][:12]}  {name}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--record", type=Path)
    group.add_argument("--against", type=Path)
    arguments = parser.parse_args()
    found = {"threads": str(torch.get_num_threads()), **written()}
    if arguments.record:
        arguments.record.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    wanted = json.loads(arguments.against.read_text())
    if found["threads"] != wanted["threads"]:
        print(f"recorded on {wanted['threads']} threads, compared on {found['threads']}: not comparable")
        return 1
    known = found.keys() & wanted.keys() - {"threads"}
    other = [name for name in found if name in known and found[name] != wanted[name]]
    print(f"{len(known) - len(other)} of {len(known)} recipes write the same bytes")
    for name in other:
        print(f"  other: {name}")
    for name in found.keys() - known - {"threads"}:
        print(f"  not recorded there: {name}")
    return 1 if other else 0


if __name__ == "__main__":
    sys.exit(main())
