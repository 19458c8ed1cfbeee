"""Packed checkpoints with something changed in them: each is refused in a Moebius error, or runs; none ends the process.

``python -m tests.fuzz.mutate --count 10000`` (``make fuzz``) tries so many. A child takes a batch of them; one that dies is
recorded with its signal, and the next goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moebius  # noqa: F401 - registers the quantizer
from moebius.checkpoint.manifest import write_manifest
from moebius.errors import MoebiusError

BATCH = 25
SECONDS = 60
KINDS = ("number", "tensor", "bytes")
_ODD: tuple[Any, ...] = (0, -1, 1, 2, 3, 7, 8, 9, 17, 255, 65536, 10**9, 1 << 40, 1 << 70, 1.5, True, None, "x", [], {})


def mutate(folder: Path, kind: str, chance: random.Random) -> None:
    """Change one thing in a checkpoint, in place. ``number`` and ``tensor`` leave the manifest true."""
    if kind == "number":
        path = folder / "config.json"
        config = json.loads(path.read_text())
        leaves = _leaves(config["quantization_config"]["modules"])
        holder, key = chance.choice(leaves)
        holder[key] = chance.choice([*_ODD, holder[key] + 1, holder[key] - 1] if type(holder[key]) is int else _ODD)
        path.write_text(json.dumps(config))
    elif kind == "tensor":
        file = chance.choice(sorted(folder.glob("packed-*.safetensors")))
        tensors = load_file(file)
        name = chance.choice(sorted(name for name, tensor in tensors.items() if tensor.numel()))  # no guards
        raw = tensors[name].contiguous().view(torch.uint8).flatten()
        raw[chance.randrange(len(raw))] = chance.randrange(256)
        save_file(tensors, file, metadata={"format": "pt"})
        write_manifest(folder)
    else:
        file = chance.choice(sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")))
        content = bytearray(file.read_bytes())
        place = chance.randrange(min(len(content), 4096))
        content[place] = chance.randrange(256)
        file.write_bytes(content[:place] if chance.random() < 0.2 else content)


def _leaves(value: Any) -> list[tuple[Any, Any]]:
    """Where the numbers and words of a JSON value are."""
    found: list[tuple[Any, Any]] = []
    for key, item in value.items():
        found += _leaves(item) if isinstance(item, dict) else [(value, key)]
    return found


def outcome(folder: Path) -> str:
    """``refused``, ``ran``, or the error that was not Moebius's."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.inference_mode():
            model(torch.arange(4).view(1, -1))
    except MoebiusError:
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    return "ran"


def run(original: Path, count: int, seed: int, kinds: tuple[str, ...] = KINDS) -> list[tuple[int, str, str]]:
    """The outcome of every mutation: its number, its kind, and a word, an error, or ``killed by SIGNAL``."""
    results: list[tuple[int, str, str]] = []
    while len(results) < count:
        begin = len(results)
        read, write = os.pipe()
        child = os.fork()
        if not child:
            _work(original, range(begin, min(begin + BATCH, count)), seed, kinds, write)
        os.close(write)
        with os.fdopen(read) as lines:
            results += [(number, kinds[number % len(kinds)], json.loads(line)) for number, line in enumerate(lines, begin)]
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            number = len(results)
            results.append((number, kinds[number % len(kinds)], f"killed by {signal.Signals(os.WTERMSIG(status)).name}"))
        elif status:
            raise RuntimeError(f"mutation {len(results)} could not be made")
    return results


def _work(original: Path, numbers: range, seed: int, kinds: tuple[str, ...], write: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        for number in numbers:
            signal.alarm(SECONDS)  # a hang dies of SIGALRM
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(shutil.copytree(original, Path(temporary) / "packed"))
                mutate(folder, kinds[number % len(kinds)], random.Random(f"{seed}-{number}"))
                os.write(write, (json.dumps(outcome(folder)) + "\n").encode())
        os._exit(0)
    finally:
        os._exit(1)  # a child that fails must not go on as a second test run


def main() -> int:
    """Try mutations and count how they end; 1 if any ended in a crash, a hang or a bare Python error."""
    from tests.packed import save_packed_tiny

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        results = run(save_packed_tiny("olmoe", Path(temporary)), options.count, options.seed)
    for (kind, word), times in Counter((kind, word) for _, kind, word in results).most_common():
        first = next(number for number, *rest in results if rest == [kind, word])
        print(f"{times:6d} {kind:7s} {word} (first: {first})")
    return int(any(word not in ("refused", "ran") for *_, word in results))


if __name__ == "__main__":
    sys.exit(main())
