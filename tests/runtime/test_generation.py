"""Decoding: the tokens that transformers' own loop would give, from a cache that is read once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny import ARCHITECTURES, tiny_model
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from moebius.runtime import cache as caches
from moebius.runtime.attention import NAME, attend
from moebius.runtime.cache import RoomyLayer, make_room
from moebius.runtime.generation import Session, end_tokens_of


def prompt(batch: int = 1, length: int = 7) -> Tensor:
    return torch.randint(0, 250, (batch, length), generator=torch.Generator().manual_seed(3))


def stream(session: Session, ids: Tensor, new_tokens: int, **options: Any) -> Tensor:
    return torch.stack(list(session.stream(ids, new_tokens=new_tokens, **options)), 1)


def by_transformers(model: Any, ids: Tensor, new_tokens: int) -> Tensor:
    model.generation_config.eos_token_id = None
    return model.generate(ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)[:, ids.shape[1] :]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_decoding_gives_the_tokens_of_transformers(name: str) -> None:
    ids = prompt(batch=2)
    wanted = by_transformers(tiny_model(name), ids, 24)
    assert torch.equal(stream(Session(tiny_model(name)), ids, 24), wanted)


def test_the_cache_moves_when_its_room_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "_SPARE_TOKENS", 3)
    ids = prompt()
    assert torch.equal(stream(Session(tiny_model("olmoe")), ids, 20), by_transformers(tiny_model("olmoe"), ids, 20))


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "qwen3_next"])
def test_a_text_that_goes_on_is_continued_as_if_it_were_read_anew(name: str) -> None:
    model, ids = tiny_model(name), prompt()
    session = Session(model)
    first = torch.cat([ids, stream(session, ids, 5)], 1)
    longer = torch.cat([first, prompt(length=3)], 1)
    fresh = stream(Session(model), longer, 6)
    assert torch.equal(stream(session, longer, 6), fresh)
    assert torch.equal(stream(session, ids, 5), first[:, 7:])  # another text: from the beginning


def test_what_was_read_is_not_read_again() -> None:
    model = tiny_model("olmoe")
    lengths: list[int] = []
    model.register_forward_pre_hook(lambda _, __, inputs: lengths.append(inputs["input_ids"].shape[1]), with_kwargs=True)
    session, ids = Session(model), prompt()
    text = torch.cat([ids, stream(session, ids, 4)], 1)
    stream(session, torch.cat([text, prompt(length=2)], 1), 2)
    # The last token of the answer was written, but not read.
    assert lengths == [7, 1, 1, 1, 3, 1]


def test_a_stream_ends_when_every_text_has_ended() -> None:
    session, ids = Session(tiny_model("olmoe")), prompt(batch=2)
    free = stream(session, ids, 12)
    ends = {int(free[0, 2]), int(free[1, 5])}
    until = [next(i for i, token in enumerate(row.tolist()) if token in ends) for row in free]
    held = stream(session, ids, 12, end_tokens=ends)
    assert held.shape[1] == max(until) + 1
    for row, wanted, end in zip(held, free, until, strict=True):
        assert row.tolist() == wanted[: end + 1].tolist() + [int(wanted[end])] * (held.shape[1] - end - 1)


def test_end_tokens_are_those_of_the_generation_settings() -> None:
    model = tiny_model("olmoe")
    assert end_tokens_of(model) == {256}
    model.generation_config.eos_token_id = [1, 2]
    assert end_tokens_of(model) == {1, 2}
    model.generation_config.eos_token_id = None
    assert end_tokens_of(model) == set()


def test_draws_follow_the_seed_and_the_temperature() -> None:
    session, ids = Session(tiny_model("olmoe")), prompt(batch=64, length=2)
    first = stream(session, ids[:1].expand(64, 2), 1, temperature=1.0, seed=1)
    assert torch.equal(first, stream(session, ids[:1].expand(64, 2), 1, temperature=1.0, seed=1))
    assert not torch.equal(first, stream(session, ids[:1].expand(64, 2), 1, temperature=1.0, seed=2))
    cold = stream(session, ids[:1].expand(64, 2), 1, temperature=1e-4, seed=1)
    assert torch.equal(cold, stream(session, ids[:1].expand(64, 2), 1))


# --- the attention of one query -------------------------------------------------------------------------------------------


class Heads(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def random_states(heads: int, key_heads: int, length: int, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    return (
        torch.randn(2, heads, 1, width, generator=generator),
        torch.randn(2, key_heads, length, width, generator=generator),
        torch.randn(2, key_heads, length, width + 4, generator=generator),
    )


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("length", [1, 31, 65])
@pytest.mark.parametrize("kind", ["none", "bool", "float", "of heads"])
def test_one_query_attends_as_the_fused_kernel_does(heads: int, key_heads: int, length: int, kind: str) -> None:
    query, key, value = random_states(heads, key_heads, length)
    seen = torch.rand(2, heads if kind == "of heads" else 1, 1, length, generator=torch.Generator().manual_seed(0)) > 0.3
    seen[..., -1] = True  # a token sees itself
    masks = {"none": None, "bool": seen, "of heads": seen, "float": torch.zeros(seen.shape).masked_fill(~seen, -1e30)}
    module = Heads(heads // key_heads)
    for scaling in (None, 0.3):
        wanted, _ = sdpa_attention_forward(module, query, key, value, masks[kind], scaling=scaling)
        got, _ = attend(module, query, key, value, masks[kind], scaling=scaling)
        assert torch.allclose(got, wanted, atol=1e-5)
        assert not torch.allclose(1.01 * got, wanted, atol=1e-5)


def test_what_it_does_not_compute_is_left_to_the_fused_kernel() -> None:
    query, key, value = random_states(4, 4, 9)
    bias = torch.randn(1, 4, 1, 9, generator=torch.Generator().manual_seed(0))
    wanted, _ = sdpa_attention_forward(Heads(1), query, key, value, None, position_bias=bias)
    got, _ = attend(Heads(1), query, key, value, None, position_bias=bias)
    assert torch.equal(got, wanted)


def test_only_models_that_attend_through_sdpa_change() -> None:
    model, other = tiny_model("olmoe"), tiny_model("olmoe")
    other.set_attn_implementation("eager")
    Session(model), Session(other)
    assert (model.config._attn_implementation, other.config._attn_implementation) == (NAME, "eager")


# --- the cache ------------------------------------------------------------------------------------------------------------


def test_a_cropped_or_reordered_cache_grows_from_what_is_left() -> None:
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(2, 3, n, 8, generator=generator) for n in (5, 1, 1, 2)]
    plain, roomy = DynamicCache(), DynamicCache()
    for layers in (plain, roomy):
        layers.update(states[0], -states[0], 0)
    make_room(roomy)
    assert type(roomy.layers[0]) is RoomyLayer and type(plain.layers[0]) is DynamicLayer
    for step in (
        lambda c: c.update(states[1], -states[1], 0),
        lambda c: c.crop(-2),
        lambda c: c.update(states[2], -states[2], 0),
        lambda c: c.reorder_cache(torch.tensor([1, 1])),
        lambda c: c.update(states[3], -states[3], 0),
    ):
        step(plain), step(roomy)
        assert torch.equal(plain.layers[0].keys, roomy.layers[0].keys)
        assert torch.equal(plain.layers[0].values, roomy.layers[0].values)
        assert plain.get_seq_length() == roomy.get_seq_length()


def test_growing_in_place_copies_nothing() -> None:
    cache = DynamicCache()
    cache.update(torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8), 0)
    make_room(cache)
    places = {cache.update(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8), 0)[0].data_ptr() for _ in range(50)}
    assert len(places) == 1
