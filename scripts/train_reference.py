#!/usr/bin/env python3
"""Train the reference model on the text that ships with every Python, tokenizer included.

    python scripts/train_reference.py --out build/reference          # about 70 minutes on one core

An OLMoE-architecture model: 4 layers, 32 experts of which 4 speak per token, hidden 192, expert width 96, vocabulary 4,096.
The experts run as batched products over tiles of tokens, about twice as fast on a CPU as a loop over experts.
Writes the model in bfloat16, the tokenizer, and `training.json` (tokens seen, held-out perplexity, tokens per expert).
A killed run resumes from the last state in the output folder.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F  # noqa: N812, its common name
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moebius.calibrate.builtin_text import builtin_documents

WINDOW = 256
TILE = 64  # tokens of one expert per batched product: lopsided routing wastes at most this much padding per expert
END = "<|end|>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16, help="windows of 256 tokens per step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    tokenizer = load_or_train_tokenizer(args.out)
    train, held_out = (token_windows(tokenizer, split) for split in ("train", "held-out"))
    print(f"{train.numel():,} training tokens, {held_out.numel():,} held out", flush=True)

    model = build_model(len(tokenizer), tokenizer.eos_token_id)
    fit(model, train, held_out, args)
    report = evaluate(model.bfloat16(), held_out, windows=held_out.shape[0])
    report |= {
        "tokens_seen": args.steps * args.batch * WINDOW,
        "unigram_perplexity": unigram_perplexity(train, held_out, len(tokenizer)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "python": platform.python_version(),
        "arguments": {k: str(v) for k, v in vars(args).items() if k != "out"},
    }
    model.config.dtype = torch.bfloat16
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def load_or_train_tokenizer(out: Path) -> PreTrainedTokenizerFast:
    if not (out / "tokenizer.json").exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=4096, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        tokenizer.train_from_iterator((d.text for d in builtin_documents("train")), trainer)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token=END, bos_token=END, clean_up_tokenization_spaces=False
        ).save_pretrained(out)
    return PreTrainedTokenizerFast.from_pretrained(out)


def token_windows(tokenizer: PreTrainedTokenizerFast, split: str) -> torch.Tensor:
    """All documents of a split, each followed by the end token, cut into windows. (windows, WINDOW) int64"""
    ids: list[int] = []
    for document in builtin_documents(split):
        ids += tokenizer(document.text)["input_ids"] + [tokenizer.eos_token_id]
    return torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)


def build_model(vocabulary: int, end: int) -> OlmoeForCausalLM:
    ALL_EXPERTS_FUNCTIONS.register("tiled", tiled_experts)
    config = OlmoeConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=None,
    )
    config._experts_implementation = "tiled"
    return OlmoeForCausalLM(config)


def tiled_experts(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """All experts in two batched products over tiles of tokens, each tile of one expert. hidden_states: (tokens, hidden)"""
    order = top_k_index.flatten().argsort(stable=True)  # assignments sorted by expert
    expert, token = top_k_index.flatten()[order], order // top_k_index.shape[1]
    counts = torch.bincount(expert, minlength=self.num_experts)
    tiles = (counts + TILE - 1) // TILE  # (experts,)
    first_tile, first_row = tiles.cumsum(0) - tiles, counts.cumsum(0) - counts
    slot = first_tile[expert] * TILE + torch.arange(len(order)) - first_row[expert]
    tile_expert = torch.repeat_interleave(tiles)  # (tiles,)
    # Rounding before picking keeps the backward of the pick in 16 bit as well.
    kind = torch.bfloat16 if torch.is_autocast_enabled("cpu") else hidden_states.dtype
    gate_up, down = (weight.to(kind)[tile_expert] for weight in (self.gate_up_proj, self.down_proj))
    padded = hidden_states.new_zeros(len(tile_expert) * TILE, hidden_states.shape[1])
    padded = padded.index_copy(0, slot, hidden_states.index_select(0, token)).view(-1, TILE, hidden_states.shape[1])
    gate, up = torch.bmm(padded, gate_up.mT).chunk(2, dim=-1)  # each (tiles, TILE, inner)
    out = torch.bmm(F.silu(gate) * up, down.mT).flatten(0, 1)
    weighted = out.index_select(0, slot) * top_k_weights.flatten()[order, None].to(out.dtype)
    return torch.zeros_like(hidden_states).index_add(0, token, weighted.to(hidden_states.dtype))


def fit(model: OlmoeForCausalLM, train: torch.Tensor, held_out: torch.Tensor, args: argparse.Namespace) -> None:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95), fused=True
    )
    state_file, start = args.out / "state.pt", 0
    if state_file.exists():
        state = torch.load(state_file)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    began, running = time.time(), 0.0
    for step in range(start, args.steps):
        rate = args.learning_rate * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * cosine(step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = train[window_order(step, args.batch, train.shape[0], args.seed)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running += loss.item()
        if (step + 1) % 50 == 0:
            minutes = (time.time() - began) / 60
            left = minutes / (step + 1 - start) * (args.steps - step - 1)
            print(f"step {step + 1:5d}  loss {running / 50:.4f}  {minutes:.1f} min, {left:.1f} min left", flush=True)
            running = 0.0
        if (step + 1) % 250 == 0:
            print(f"  held-out perplexity {evaluate(model, held_out, windows=32)['held_out_perplexity']:.2f}", flush=True)
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, state_file)


def cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def window_order(step: int, batch: int, windows: int, seed: int) -> torch.Tensor:
    """The windows of a step: every epoch is its own permutation, so that a resumed run sees what the first would have."""
    first = step * batch
    picks = []
    for position in range(first, first + batch):
        epoch, index = divmod(position, windows)
        order = _epoch_permutation(epoch, windows, seed)
        picks.append(order[index])
    return torch.stack(picks)


_PERMUTATIONS: dict[int, torch.Tensor] = {}


def _epoch_permutation(epoch: int, windows: int, seed: int) -> torch.Tensor:
    if epoch not in _PERMUTATIONS:
        _PERMUTATIONS.clear() if len(_PERMUTATIONS) > 1 else None
        _PERMUTATIONS[epoch] = torch.randperm(windows, generator=torch.Generator().manual_seed(seed * 1000 + epoch))
    return _PERMUTATIONS[epoch]


@torch.no_grad()
def evaluate(model: OlmoeForCausalLM, held_out: torch.Tensor, windows: int) -> dict:
    """Perplexity on the held-out text, and how many tokens each expert of each layer received there."""
    model.eval()
    total, count = 0.0, 0
    used = torch.zeros(model.config.num_hidden_layers, model.config.num_experts, dtype=torch.long)
    for batch in held_out[:windows].split(16):
        out = model(input_ids=batch, output_router_logits=True)
        total += F.cross_entropy(out.logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
        count += batch[:, 1:].numel()
        for layer, logits in enumerate(out.router_logits):
            used[layer] += torch.bincount(
                logits.topk(model.config.num_experts_per_tok).indices.flatten(), minlength=used.shape[1]
            )
    model.train()
    return {
        "held_out_perplexity": round(math.exp(total / count), 3),
        "held_out_tokens": count,
        "tokens_per_expert": used.tolist(),
    }


def unigram_perplexity(train: torch.Tensor, held_out: torch.Tensor, vocabulary: int) -> float:
    """What a model that knows token frequencies and nothing else would score (add-one smoothing)."""
    counts = torch.bincount(train.flatten(), minlength=vocabulary).double() + 1
    return round((counts / counts.sum()).log()[held_out.flatten()].mean().neg().exp().item(), 3)


if __name__ == "__main__":
    main()
