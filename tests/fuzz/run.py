"""Packed checkpoints with something changed in them: each is refused in one line of a Moebius error, or runs; none crashes.

``python -m tests.fuzz.run --count 10000`` (``make fuzz``) tries so many, each by one way to open it. A child process takes a
batch of them; one that dies is recorded with its signal, and the next goes on behind it.
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
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from tests.fuzz.mutate import KINDS
from tests.opening import OTHER_WAYS, WAYS, FaultError, logits

BATCH = 50
SECONDS = 120
ALL_WAYS = {**WAYS, **OTHER_WAYS}
GOOD = ("refused", "ran")


class Tried(NamedTuple):
    """How a mutation ended: ``refused``, ``ran``, or what went wrong."""

    number: int
    kind: str
    way: str
    outcome: str


class Fuzz:
    """Seeded mutations of some checkpoints: everything about one follows from its number.

    Args:
        originals: packed checkpoints.
        seed: other seeds, other mutations.
        kinds: of :data:`tests.fuzz.mutate.KINDS`.
        ways: of :data:`ALL_WAYS`.

    Attributes:
        tell: called with the outcomes of every batch, and how many there are by then.
    """

    def __init__(
        self, originals: Sequence[Path], seed: int = 0, kinds: Iterable[str] = KINDS, ways: Iterable[str] = ALL_WAYS
    ) -> None:
        self.originals, self.seed, self.kinds, self.ways = tuple(originals), seed, tuple(kinds), tuple(ways)
        self.tell: Callable[[list[Tried], int], None] | None = None
        self.wanted = [logits(folder) for folder in self.originals]

    def plan(self, number: int) -> tuple[int, str, str]:
        """Which original is changed, in which manner, and how it is opened."""
        number, kind = divmod(number, len(self.kinds))
        number, way = divmod(number, len(self.ways))
        return number % len(self.originals), self.kinds[kind], self.ways[way]

    def one(self, number: int, folder: Path) -> str:
        """Make a mutation in ``folder`` and open it."""
        original, kind, way = self.plan(number)
        shutil.copytree(self.originals[original], folder)
        KINDS[kind](folder, random.Random(f"{self.seed}-{number}"))
        os.environ["MOEBIUS_HASHES"] = "1"
        changed = {path.name for path in folder.iterdir() if _differs(path, self.originals[original] / path.name)}
        try:
            refused = ALL_WAYS[way](folder)
            if not refused and kind == "byte" and way == "from_pretrained" and all(n.endswith("safetensors") for n in changed):
                same = torch.equal(logits(folder), self.wanted[original])
                return "ran" if same else f"loaded other weights from {changed}, with hashes on"
        except FaultError as error:
            return str(error)
        return "refused" if refused else "ran"

    def run(self, count: int) -> list[Tried]:
        """The outcome of every mutation."""
        tried: list[Tried] = []
        while len(tried) < count:
            outcomes = self._batch(range(begin := len(tried), min(begin + BATCH, count)))
            tried += [Tried(begin + place, *self.plan(begin + place)[1:], outcome) for place, outcome in enumerate(outcomes)]
            if self.tell:
                self.tell(tried[begin:], len(tried))
        return tried

    def _batch(self, numbers: range) -> list[str]:
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.close(read)
            self._work(numbers, write)
        os.close(write)
        with os.fdopen(read) as lines:
            outcomes = [json.loads(line) for line in lines]
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            outcomes.append(f"killed by {signal.Signals(os.WTERMSIG(status)).name}")
        elif status:
            outcomes.append(f"ended the process with exit code {os.WEXITSTATUS(status)}")
        return outcomes

    def _work(self, numbers: range, write: int) -> NoReturn:
        """In a child, which must not go on as a second test run whatever happens; what it prints is of no interest."""
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            if "ASAN_OPTIONS" not in os.environ:  # what a sanitizer says is of interest
                os.dup2(quiet, 2)
            os.dup2(quiet, 1)
            with tempfile.TemporaryDirectory() as temporary:
                for number in numbers:
                    signal.alarm(SECONDS)  # a hang dies of SIGALRM
                    outcome = self.one(number, folder := Path(temporary) / "packed")
                    os.write(write, (json.dumps(outcome) + "\n").encode())
                    shutil.rmtree(folder)
            os._exit(0)
        finally:
            os._exit(3)


def _differs(path: Path, original: Path) -> bool:
    return not path.is_file() or not original.is_file() or path.read_bytes() != original.read_bytes()


def _tell(batch: list[Tried], count: int) -> None:
    for number, kind, way, outcome in (t for t in batch if t.outcome not in GOOD):
        print(f"{number} ({kind}, {way}): {outcome}", flush=True)
    if count // 1000 > (count - len(batch)) // 1000:
        print(f"{count} mutations", flush=True)


def main() -> int:
    """Try mutations and count how they end; 1 if any ended in a crash, a hang, a wrong load or a bare Python error."""
    from tests.packed import save_every_format, save_quantized

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--ways", nargs="*", default=list(ALL_WAYS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        originals = [save_every_format(Path(temporary) / "formats"), *save_quantized(Path(temporary) / "quantized")]
        fuzz = Fuzz(originals, options.seed, options.kinds, options.ways)
        fuzz.tell = _tell
        tried = fuzz.run(options.count)
    wrong = [t for t in tried if t.outcome not in GOOD]
    for kind in fuzz.kinds:
        table = Counter(t.outcome if t.outcome in GOOD else "wrong" for t in tried if t.kind == kind)
        print(f"{kind:8s} " + ", ".join(f"{table[outcome]} {outcome}" for outcome in (*GOOD, "wrong")))
    refused = sum(t.outcome == "refused" for t in tried)
    print(f"{len(tried)} mutations in {time.monotonic() - begin:.0f} s: {refused} refused, {len(wrong)} wrong, the others ran")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
