# mypy: disallow-any-expr
"""How the API is called, as a type checker sees it. `make check` reads this file strictly; nothing runs it."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import moebius
from moebius.api import Quantized
from moebius.compare.results import ComparisonResult
from moebius.evaluate.info import CheckpointInfo
from moebius.evaluate.run import EvaluationResult
from moebius.generation.chat import Chat
from moebius.generation.complete import Written

packed = moebius.quantize("model", Path("out"), method="moebius", bits=1.0, calibration="builtin", gain=True, rest="int8")
assert_type(packed, Quantized)
assert_type(packed.size.bits_per_expert_weight, float)
assert_type(packed.seconds, dict[str, float])
assert_type(moebius.load("out"), PreTrainedModel)
assert_type(moebius.load_tokenizer("out"), PreTrainedTokenizerBase)
assert_type(moebius.generate(moebius.load("out"), "text", 5, on_text=print), Written)
assert_type(moebius.chat("out", "Be short."), Chat)
assert_type(moebius.chat("out").ask("Hello").text, str)
assert_type(moebius.evaluate("out", "model", protocol="gptq"), EvaluationResult)
assert_type(moebius.evaluate("out", "model").kl, float | None)
assert_type(moebius.compare("model", ["rtn@2"], out="comparison"), ComparisonResult)
assert_type(moebius.plan("model", bits=2).memory.total, int)
assert_type(moebius.info("out", verify=True), CheckpointInfo)
assert_type(moebius.__version__, str)
