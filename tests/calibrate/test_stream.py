"""The statistics of the streamed passes are those of a plain forward and backward of the whole model, token by token."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import ARCHITECTURES, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from moebius.calibrate.observe import observed_forward
from moebius.calibrate.stream import stream_statistics
from moebius.errors import CalibrationError
from moebius.models.load import describe
from moebius.types import PROJECTIONS, CalibrationNeeds, ExpertWeights, LayerStats, MoeLayer

FULL = CalibrationNeeds(glas_groups=1, router_moment=True, output_fisher=True)
Rows = list[tuple[int, Tensor, Tensor]]  # expert, x, y with its gradient
Routing = dict[str, list[float]]  # by layer, the routing weight of each row


def token_windows(count: int = 3, length: int = 12) -> Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(7))


def collect(model: PreTrainedModel, needs: CalibrationNeeds = FULL, **options: Any) -> dict[str, LayerStats]:
    windows = options.pop("windows", token_windows())
    return {stats.name: stats for stats in stream_statistics(describe(model), windows, needs, **options)}


def by_hand(
    model: PreTrainedModel, windows: Tensor, routing: Routing | None = None
) -> tuple[dict[str, dict[str, Rows]], dict[str, Tensor]]:
    """Every token through every chosen expert on its own, in one graph from the embedding to the mean loss of all windows."""
    moe = describe(model)
    seen: dict[str, dict[str, Rows]] = {layer.name: {"gate_up": [], "down": []} for layer in moe.moe_layers}
    met_router: dict[str, Tensor] = {}

    def naive(layer: MoeLayer) -> Any:
        module: Any = layer.experts

        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            weights = layer.layout.weights(layer.name, module)
            totals = []
            for t in range(len(hidden_states)):
                total = torch.zeros(layer.layout.hidden)
                for k, e in enumerate(top_k_index[t].tolist()):
                    y = weights.gate_up[e] @ hidden_states[t]
                    if layer.layout.has_bias:
                        y = y + module.gate_up_proj_bias[e]
                    y.requires_grad_().retain_grad()
                    seen[layer.name]["gate_up"].append((e, hidden_states[t].detach(), y))
                    inner = (module._apply_gate if layer.layout.has_gate else module.act_fn)(y.unsqueeze(0))[0]
                    z = weights.down[e] @ inner
                    if layer.layout.has_bias:
                        z = z + module.down_proj_bias[e]
                    z.retain_grad()
                    seen[layer.name]["down"].append((e, inner.detach(), z))
                    total = total + z * top_k_weights[t, k]
                    if routing is not None:
                        routing.setdefault(layer.name, []).append(top_k_weights[t, k].item())
                totals.append(total)
            return torch.stack(totals)

        return forward

    hooks = []
    for layer in moe.moe_layers:
        assert layer.router is not None
        layer.experts.forward = naive(layer)

        def keep(module: nn.Module, args: tuple[Tensor, ...], name: str = layer.name) -> None:
            met_router[name] = args[0].detach().reshape(-1, args[0].shape[-1])

        hooks.append(layer.router.register_forward_pre_hook(keep))
    logits = model(input_ids=windows, use_cache=False).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()).backward()
    for layer in moe.moe_layers:
        del layer.experts.forward
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        torch.testing.assert_close(logits, model(input_ids=windows, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    return seen, met_router


def gradient(y: Tensor) -> Tensor:
    assert y.grad is not None
    return y.grad


def assert_same(got: Tensor | None, wanted: Tensor) -> None:
    """Relative to the largest entry: gradients of a mean loss are far below any absolute tolerance."""
    assert got is not None
    assert got.shape == wanted.shape
    assert wanted.abs().max() > 0
    torch.testing.assert_close(got / wanted.abs().max(), wanted / wanted.abs().max(), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "qwen2_moe", "nemotron_h"])
def test_statistics_equal_brute_force(name: str) -> None:
    model = tiny_model(name)
    windows = token_windows()
    seen, met_router = by_hand(model, windows)
    for layer_name, stats in collect(model, batch_size=2).items():
        x_router = met_router[layer_name]
        assert_same(stats.router_moment, x_router.T @ x_router)
        for projection in PROJECTIONS:
            rows, got = seen[layer_name][projection], stats.projection(projection)
            of_expert = [[(x, gradient(y)) for expert, x, y in rows if expert == e] for e in range(8)]
            assert got.tokens.tolist() == [len(own) for own in of_expert]
            inputs, outputs = rows[0][1].shape[0], rows[0][2].shape[0]
            nothing = torch.zeros(inputs, inputs)
            assert_same(got.second_moment, torch.stack([sum((x.outer(x) for x, _ in own), nothing) for own in of_expert]))
            mean = [sum((x for x, _ in own), torch.zeros(inputs)) / max(1, len(own)) for own in of_expert]
            assert_same(got.mean, torch.stack(mean))
            weighted = [sum((d.square().mean() * x.outer(x) for x, d in own), nothing) for own in of_expert]
            assert_same(got.weighted_moment, torch.stack(weighted).unsqueeze(1))
            fisher = [sum((d.square() for _, d in own), torch.zeros(outputs)) for own in of_expert]
            assert_same(got.fisher_diagonal, torch.stack(fisher))
            deltas = torch.stack([gradient(y) for _, _, y in rows])
            if projection == "down":
                assert_same(got.output_fisher, deltas.T @ deltas)
            else:
                assert got.output_fisher is None


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss"])
def test_tokens_weigh_by_how_the_loss_depends_on_them_and_what_their_routing_lets_expect(name: str) -> None:
    model, windows, routing = tiny_model(name), token_windows(), {}
    seen, _ = by_hand(model, windows, routing)
    needs = CalibrationNeeds(loss_weighted=True)
    for layer_name, stats in collect(model, needs, batch_size=2).items():
        squares = torch.tensor(routing[layer_name]).square()
        for projection in PROJECTIONS:
            rows, got = seen[layer_name][projection], stats.projection(projection)
            felt = torch.stack([gradient(y).square().mean() for _, _, y in rows])
            weights = (felt + squares * felt.sum() / squares.sum()) / 2
            wanted = torch.zeros_like(got.second_moment)
            for (expert, x, _), weight in zip(rows, weights, strict=True):
                wanted[expert] += weight * x.outer(x)
            assert_same(got.second_moment, wanted)
            assert got.weighted_moment is None


def test_one_group_per_channel_is_equation_10() -> None:
    """MoBiE Eq. 10: ``H_j = Σ_t (∂loss/∂y_tj)² x_t x_tᵀ`` for every output channel ``j``; and groups average it."""
    model = tiny_model("olmoe")
    seen, _ = by_hand(model, token_windows())
    printed = collect(model, CalibrationNeeds(glas_groups=80))
    thirds = collect(model, CalibrationNeeds(glas_groups=3))
    for layer_name, projections in seen.items():
        rows = projections["gate_up"]
        wanted = torch.zeros(8, 80, 48, 48)
        for expert, x, y in rows:
            wanted[expert] += gradient(y).square()[:, None, None] * x.outer(x)
        assert_same(printed[layer_name].gate_up.weighted_moment, wanted)
        group = torch.arange(80) * 3 // 80
        averaged = torch.stack([wanted[:, group == g].mean(1) for g in range(3)], dim=1)
        assert_same(thirds[layer_name].gate_up.weighted_moment, averaged)
        # `down` has 48 channels, fewer than groups were asked for.
        assert printed[layer_name].down.weighted_moment.shape == (8, 48, 40, 40)  # type: ignore[union-attr]


def test_left_factor_turns_the_gradient() -> None:
    model = tiny_model("olmoe")
    seen, _ = by_hand(model, token_windows())
    given: dict[str, ExpertWeights] = {}

    def left_factors(weights: ExpertWeights) -> dict[str, Tensor]:
        given[weights.name] = weights
        return {"down": weights.down.mean(0)[:, :10]}

    plain = collect(model)
    turned = collect(model, CalibrationNeeds(glas_groups=1, output_fisher=True), left_factors=left_factors)
    for layer_name, stats in turned.items():
        a = given[layer_name].down.mean(0)[:, :10]
        weighted, fisher = torch.zeros(8, 1, 40, 40), torch.zeros(8, 10)
        for expert, x, z in seen[layer_name]["down"]:
            turned_gradient = a.T @ gradient(z)
            weighted[expert, 0] += turned_gradient.square().mean() * x.outer(x)
            fisher[expert] += turned_gradient.square()
        assert_same(stats.down.weighted_moment, weighted)
        assert_same(stats.down.fisher_diagonal, fisher)
        assert torch.equal(stats.down.output_fisher, plain[layer_name].down.output_fisher)  # type: ignore[arg-type]
        assert torch.equal(stats.gate_up.weighted_moment, plain[layer_name].gate_up.weighted_moment)  # type: ignore[arg-type]


def assert_equal_statistics(got: dict[str, LayerStats], wanted: dict[str, LayerStats]) -> None:
    assert got.keys() == wanted.keys()
    for name in wanted:
        for projection in PROJECTIONS:
            ours, theirs = got[name].projection(projection), wanted[name].projection(projection)
            assert torch.equal(ours.tokens, theirs.tokens)
            for field in ("mean", "second_moment", "weighted_moment", "fisher_diagonal"):
                assert_same(getattr(ours, field), getattr(theirs, field))


def test_order_and_batches_of_windows_do_not_matter() -> None:
    model, windows = tiny_model("qwen2_moe"), token_windows(count=5)
    wanted = collect(model, windows=windows, batch_size=5)
    assert_equal_statistics(collect(model, windows=windows[[3, 0, 4, 1, 2]], batch_size=2), wanted)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_runs_and_is_left_as_it_was(name: str) -> None:
    model = tiny_model(name).train()
    ids = token_windows()
    modes = [module.training for module in model.modules()]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    weights = {n: p.clone() for n, p in model.named_parameters()}
    names = [layer.name for layer in describe(model).moe_layers]
    stats = collect(model)
    assert list(stats) == names[::-1]
    for layer in stats.values():
        assert int(layer.gate_up.tokens.sum()) == 2 * ids.numel()
        for projection in PROJECTIONS:
            own = layer.projection(projection)
            assert own.weighted_moment is not None
            for moment in (own.second_moment, own.weighted_moment.squeeze(1)):
                assert torch.isfinite(moment).all()
                assert_same(moment, moment.mT)
            assert own.fisher_diagonal is not None and own.fisher_diagonal.sum() > 0
    assert [module.training for module in model.modules()] == modes
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert not [n for n, module in model.named_modules() if "forward" in vars(module) or module._forward_pre_hooks]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_observed_forward_is_the_modules_own(name: str) -> None:
    layer = describe(tiny_model(name)).moe_layers[0]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, layer.layout.hidden, generator=generator)
    weights, index = torch.randn(40, 8, generator=generator).softmax(-1).topk(3)
    with torch.no_grad():
        got, observation = observed_forward(layer.experts, layer.layout, hidden, index, weights)
        torch.testing.assert_close(got, layer.experts(hidden, index, weights), rtol=1e-4, atol=1e-5)
    assert observation.inputs["gate_up"].shape == (120, layer.layout.hidden)
    assert observation.inputs["down"].shape == (120, 40)


def test_an_index_past_the_experts_is_left_out() -> None:
    model = tiny_model("olmoe")
    model.set_experts_implementation("eager")
    layer = describe(model).moe_layers[0]
    hidden = torch.randn(6, 48, generator=torch.Generator().manual_seed(0))
    index, weights = torch.tensor([[0, 8], [8, 3], [8, 8], [1, 2], [3, 0], [7, 8]]), torch.rand(6, 2)
    with torch.no_grad():
        got, observation = observed_forward(layer.experts, layer.layout, hidden, index, weights)
        torch.testing.assert_close(got, layer.experts(hidden, index, weights))
    assert observation.assignment.counts.tolist() == [2, 1, 1, 2, 0, 0, 0, 1]
    assert got[2].abs().max() == 0


def test_experts_without_tokens_have_zeros() -> None:
    model = tiny_model("gpt_oss")
    with torch.no_grad():
        for layer in describe(model).moe_layers:
            assert layer.router is not None
            layer.router.get_parameter("bias")[[2, 5]] = -1e6
    for stats in collect(model).values():
        assert stats.gate_up.tokens[[2, 5]].tolist() == [0, 0]
        for projection in PROJECTIONS:
            own = stats.projection(projection)
            for field in (own.mean, own.second_moment, own.weighted_moment, own.fisher_diagonal):
                assert field is not None
                assert field[[2, 5]].abs().max() == 0
                assert field[[0, 1]].abs().max() > 0


def test_inputs_alone_need_no_backward_pass() -> None:
    model = tiny_model("deepseek_v2")
    wanted = collect(model)
    got = collect(model, CalibrationNeeds(inputs=True))
    assert list(got) == list(wanted)[::-1]
    for name, stats in got.items():
        for projection in PROJECTIONS:
            own = stats.projection(projection)
            assert own.weighted_moment is own.fisher_diagonal is None
            assert torch.equal(own.tokens, wanted[name].projection(projection).tokens)
            assert_same(own.second_moment, wanted[name].projection(projection).second_moment)


def test_hidden_states_on_disk(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    in_memory = collect(model)
    stream = stream_statistics(describe(model), token_windows(), FULL, work=tmp_path / "work")
    first = next(stream)
    assert list((tmp_path / "work").rglob("*.npy"))
    on_disk = {stats.name: stats for stats in [first, *stream]}
    assert not list((tmp_path / "work").iterdir())
    for name, stats in in_memory.items():
        assert torch.equal(stats.down.weighted_moment, on_disk[name].down.weighted_moment)  # type: ignore[arg-type]


def test_same_input_same_bytes() -> None:
    first, second = collect(tiny_model("qwen3_moe")), collect(tiny_model("qwen3_moe"))
    for name in first:
        for projection in PROJECTIONS:
            ours, theirs = first[name].projection(projection), second[name].projection(projection)
            for field in ("mean", "second_moment", "weighted_moment", "fisher_diagonal"):
                assert torch.equal(getattr(ours, field), getattr(theirs, field))


def test_skipped_layers_are_passed_through() -> None:
    model = tiny_model("olmoe")
    wanted = collect(model)
    last = "model.layers.1.mlp.experts"
    got = collect(model, skip=[last])
    assert_equal_statistics(got, {name: stats for name, stats in wanted.items() if name != last})
    assert collect(model, skip=list(wanted)) == {}


def test_half_precision_weights_are_computed_in_float32() -> None:
    model = tiny_model("olmoe").to(torch.bfloat16)
    rounded = tiny_model("olmoe").to(torch.bfloat16).to(torch.float32)
    wanted, stats = collect(rounded), {}
    pointers = {n: p.data_ptr() for n, p in model.named_parameters()}
    for layer in stream_statistics(describe(model), token_windows(), FULL):
        stats[layer.name] = layer
        # Between two layers the decoder is in its own dtype, so that its weights can be quantized.
        assert {p.dtype for n, p in model.named_parameters() if n.startswith("model.layers")} == {torch.bfloat16}
    assert_equal_statistics(stats, wanted)
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == pointers
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_only_one_layer_of_statistics_is_alive() -> None:
    alive: list[weakref.ref[Tensor]] = []
    stream = stream_statistics(describe(tiny_model("olmoe", num_hidden_layers=4)), token_windows(), FULL)
    for stats in stream:
        alive += [weakref.ref(stats.down.second_moment), weakref.ref(stats.gate_up.weighted_moment)]  # type: ignore[arg-type]
        del stats
        gc.collect()
        assert [reference() for reference in alive] == [None] * len(alive)
    assert len(alive) == 8


def test_weights_may_come_from_elsewhere() -> None:
    """Outside the hook the decoder has no weights at all."""
    model = tiny_model("olmoe")
    wanted = collect(model)
    moe = describe(model)
    shards = [{n: p.data for n, p in layer.named_parameters()} for layer in moe.decoder]
    for layer in moe.decoder:
        for parameter in layer.parameters():
            parameter.data = torch.full_like(parameter, torch.nan)
    entered = []

    @contextmanager
    def resident(index: int) -> Iterator[None]:
        entered.append(index)
        parameters = dict(moe.decoder[index].named_parameters())
        empty = {n: p.data for n, p in parameters.items()}
        for n, parameter in parameters.items():
            parameter.data = shards[index][n]
        yield
        for n, parameter in parameters.items():
            parameter.data = empty[n]

    got = {s.name: s for s in stream_statistics(moe, token_windows(), FULL, resident=resident)}
    assert_equal_statistics(got, wanted)
    assert entered == [0, 1, 1, 0]


def test_recorded_outputs_do_not_matter() -> None:
    """Checkpoints that ask for router logits by default add an auxiliary loss and hooks; neither may be felt."""
    wanted = collect(tiny_model("olmoe"))
    model = tiny_model("olmoe", output_router_logits=True)
    assert_equal_statistics(collect(model), wanted)
    assert model.config.output_router_logits is True


def test_stopping_early_leaves_the_model_as_it_was() -> None:
    model = tiny_model("olmoe").train().to(torch.bfloat16)
    stream = stream_statistics(describe(model), token_windows(), FULL)
    next(stream)
    assert not model.training
    stream.close()  # type: ignore[attr-defined]
    assert all(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in model.parameters())


def test_a_loss_that_is_not_finite() -> None:
    model = tiny_model("olmoe")
    with torch.no_grad():
        model.get_submodule("lm_head").get_parameter("weight")[3, 3] = torch.nan
    with pytest.raises(CalibrationError, match="the loss of a window is nan, wanted a finite number"):
        collect(model)


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss"])
def test_tokens_weigh_by_their_affinity_to_the_expert(name: str) -> None:
    """MoEQuant Eq. 18: ``Σ c x xᵀ`` with the routing weight ``c``; the mean and the count stay those of the tokens."""
    model, windows, routing = tiny_model(name), token_windows(), {}
    seen, _ = by_hand(model, windows, routing)
    plain = collect(model, CalibrationNeeds(inputs=True), batch_size=2)
    for layer_name, stats in collect(model, CalibrationNeeds(inputs=True, affinity=True), batch_size=2).items():
        for projection in PROJECTIONS:
            got, other = stats.projection(projection), plain[layer_name].projection(projection)
            wanted = torch.zeros_like(got.second_moment)
            for (expert, x, _), weight in zip(seen[layer_name][projection], routing[layer_name], strict=True):
                wanted[expert] += weight * x.outer(x)
            assert_same(got.second_moment, wanted)
            assert torch.equal(got.tokens, other.tokens) and torch.equal(got.mean, other.mean)
