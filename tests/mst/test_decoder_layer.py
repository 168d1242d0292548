"""The streamed decoder layer gives the numbers of plain PyTorch, whichever way it is run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import cycle, product
from typing import Any

import pytest
import torch
from layer_problems import (
    HIDDEN,
    Step,
    assert_same_step,
    cross_entropy,
    grads_of,
    make_batch,
    make_model,
    streamed_step,
    take_step,
    true_step,
    with_lora,
)
from numerics import relative_error
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from longseq.distributed.ulysses import UlyssesAttention
from longseq.launch.verify.truth import exact
from longseq.mst import apply_mini_sequence, layer_parts
from longseq.mst.apply import LOSSES
from longseq.mst.placement import Placement

PLACEMENTS = {
    "gpu": "gpu",
    "host": "host",
    "auto": "auto",
    "every 2": Placement(every=2, gpu_layers=0),
    "every 2, last on GPU": Placement(every=2, gpu_layers=1),
    "every 3": Placement(every=3, gpu_layers=2),
    "every 2 on GPU": Placement(every=2, host=False),
    "every 3 on GPU": Placement(every=3, host=False),
}
SAVES = [False, True, "gpu", "host", "all", 1]
GROUPS = [1, 2, 4, "auto"]
TILES = [7, 10, None, "auto", 1000]


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, dict[str, Tensor], Step]:
    """A model of four layers, a batch of a few tokens, and the truth."""
    torch.manual_seed(0)
    model, batch = make_model(num_hidden_layers=4), make_batch(length=13, masked=5)
    return model, batch, true_step(model, batch)


# -- knobs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save_attention", SAVES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_combination_of_knobs_keeps_the_numbers(small, placement: str, save_attention) -> None:
    model, batch, truth = small
    losses = cycle(LOSSES)
    for head_groups, tile_tokens in product(GROUPS, TILES):
        options = {
            "head_groups": head_groups,
            "tile_tokens": tile_tokens,
            "checkpoints": PLACEMENTS[placement],
            "save_attention": save_attention,
            "loss": next(losses),
        }
        assert_same_step(streamed_step(model, batch, **options), truth, what=options)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("head_groups", [1, 4])
def test_where_things_are_kept_changes_no_bit(head_groups: int, autocast: bool) -> None:
    model, batch = make_model(dtype=torch.float32, num_hidden_layers=4), make_batch()
    steps = []
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for placement, save_attention in product(PLACEMENTS.values(), (False, "gpu", "host", "all")):
            options = {"checkpoints": placement, "save_attention": save_attention}
            steps.append(streamed_step(model, batch, tile_tokens=10, head_groups=head_groups, **options))
    for step in steps[1:]:
        assert torch.equal(step.loss, steps[0].loss)
        assert all(torch.equal(step.grads[name], grad) for name, grad in steps[0].grads.items())


# -- shapes, labels, upstream gradients -----------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("length", [2, 5, 20, 37])
def test_lengths_and_batches(rows: int, length: int) -> None:
    model, batch = make_model(), make_batch(rows, length, masked=0)
    truth = true_step(model, batch)
    for tile_tokens in (1, 10, 20):
        step = streamed_step(model, batch, tile_tokens=tile_tokens, head_groups=4, checkpoints="host")
        assert_same_step(step, truth, what=tile_tokens)


def test_one_token() -> None:
    model = make_model()
    ids, true = torch.tensor([[5]]), exact(model)
    batch = {"input_ids": ids, "shift_labels": torch.tensor([[7]])}
    loss_of = lambda out: cross_entropy(out.logits, batch["shift_labels"], shift=False)  # noqa: E731
    truth = take_step(true, {"input_ids": ids}, loss_of=loss_of)
    assert_same_step(streamed_step(model, batch, tile_tokens=10), truth)


def test_no_token_gives_no_gradient() -> None:
    model = make_model()
    x = torch.zeros(2, 0, HIDDEN, dtype=torch.float64, requires_grad=True)
    apply_mini_sequence(model, tile_tokens=10)
    out = run_layer(model, 0, x, None)
    assert out.shape == x.shape
    out.backward(torch.zeros_like(out))
    assert all(not grad.any() for grad in grads_of(model).values())


@pytest.mark.parametrize("loss", ["cce", "mini_sequence"])
@pytest.mark.parametrize("masked", [slice(10, 20), slice(None)])
def test_labels_that_do_not_count(masked: slice, loss: str) -> None:
    """A tile of ten tokens without a label, and no label at all: a loss of 0, not 0 / 0."""
    model, batch = make_model(), make_batch()
    batch["labels"][:, masked] = -100
    truth = true_step(model, batch)
    step = streamed_step(model, batch, tile_tokens=10, loss=loss)
    assert torch.isfinite(step.loss)
    assert_same_step(step, truth)


def test_upstream_gradient() -> None:
    model, batch = make_model(), make_batch()
    truth = true_step(model, batch, upstream=0.125)
    assert_same_step(streamed_step(model, batch, tile_tokens=10, upstream=0.125), truth)


def test_gradients_add_up_over_accumulation() -> None:
    model, batch = make_model(), make_batch(rows=4)
    truth = true_step(model, batch)
    num_items = int((batch["labels"][:, 1:] != -100).sum())
    apply_mini_sequence(model, tile_tokens=10, checkpoints="host", head_groups=2)
    losses = []
    for row in range(4):
        part = {name: value[row : row + 1] for name, value in batch.items()}
        losses.append(model(**part, num_items_in_batch=num_items).loss)
        losses[-1].backward()
    assert_same_step(Step(torch.stack(losses).sum().detach(), grads_of(model)), truth)


# -- graphs ---------------------------------------------------------------------------------------------

GRAPHS = [
    {"checkpoints": "gpu", "save_attention": "gpu"},
    {"checkpoints": "gpu", "head_groups": 4},
    {"checkpoints": "host", "save_attention": "all", "head_groups": 2},
    {"checkpoints": "host"},
    {"checkpoints": "host", "save_attention": "host", "head_groups": 4},
    {"checkpoints": Placement(every=3, gpu_layers=0), "save_attention": "host"},
    {"checkpoints": Placement(every=2, host=False)},
]


@pytest.mark.parametrize("options", GRAPHS, ids=str)
def test_a_second_backward_through_a_kept_graph(options: dict) -> None:
    model, batch = make_model(), make_batch()
    truth = true_step(model, batch, upstream=3.0)
    apply_mini_sequence(model, tile_tokens=10, **options)
    loss = model(**batch).loss
    loss.backward(retain_graph=True)
    (2.0 * loss).backward()
    assert_same_step(Step(loss.detach(), grads_of(model)), truth)


@pytest.mark.parametrize("options", GRAPHS, ids=str)
def test_a_graph_is_gone_after_its_backward(options: dict) -> None:
    model, batch = make_model(), make_batch()
    apply_mini_sequence(model, tile_tokens=10, **options)
    loss = model(**batch).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("order", ["one backward", "first first", "last first", "between"])
@pytest.mark.parametrize("options", GRAPHS, ids=str)
def test_two_forwards_before_a_backward(options: dict, order: str) -> None:
    """As preference training has them: two passes of different lengths, whose backwards come in any order."""
    model, first, second = make_model(), make_batch(length=23), make_batch(1, 16)
    truths = true_step(model, first), true_step(model, second)
    total = {name: truths[0].grads[name] + truths[1].grads[name] for name in truths[0].grads}
    apply_mini_sequence(model, tile_tokens=10, **options)
    losses = [model(**first).loss, model(**second).loss]
    if order == "one backward":
        sum(losses).backward()
    elif order == "between":
        losses[1].backward()
        with torch.no_grad():
            model(**second)
        model(**second)  # its graph is thrown away
        losses[0].backward()
    else:
        for loss in losses if order == "first first" else reversed(losses):
            loss.backward()
    assert_same_step(
        Step((losses[0] + losses[1]).detach(), grads_of(model)), Step(sum(t.loss for t in truths), total)
    )


@pytest.mark.parametrize("checkpoints", ["gpu", "host", Placement(every=2)], ids=repr)
def test_a_loss_on_a_hidden_state_between_layers(checkpoints) -> None:
    model, batch = make_model(), make_batch()

    def loss_of(out) -> Tensor:
        # A middle state's gradient comes from two sides, and the last one's is of stride 0.
        return out.hidden_states[1].square().mean() + 3.0 * out.hidden_states[2][:, 5].sum()

    batch["output_hidden_states"] = True
    truth = take_step(exact(model), without_labels(batch), loss_of=loss_of)
    apply_mini_sequence(model, tile_tokens=10, checkpoints=checkpoints)
    assert_same_step(take_step(model, without_labels(batch), loss_of=loss_of), truth)
    out = model(**batch)
    assert out.logits is None
    assert len(out.hidden_states) == 4


# -- who holds a gradient -------------------------------------------------------------------------------


def keep_gradients(model: nn.Module, keep) -> tuple[list[Tensor], list[Tensor]]:
    """What `keep` makes of each layer's output's gradient, and copies of it, as a backward goes by."""
    kept, copies = [], []

    def on_gradient(grad: Tensor) -> None:
        kept.append(keep(grad))
        copies.append(kept[-1].clone())

    def on_output(module: nn.Module, args: Any, out: Tensor) -> None:
        out.register_hook(on_gradient)

    for layer in model.model.layers:
        layer.register_forward_hook(on_output)
    return kept, copies


@pytest.mark.parametrize(
    "keep",
    [
        pytest.param(lambda grad: grad, id="itself"),
        pytest.param(lambda grad: grad.detach(), id="detached"),
        pytest.param(lambda grad: grad[0], id="a row"),
        pytest.param(lambda grad: grad.view(-1), id="flat"),
    ],
)
def test_a_gradient_that_a_hook_keeps_is_not_written_over(keep) -> None:
    model, batch = make_model(), make_batch()
    truth = true_step(model, batch)
    kept, copies = keep_gradients(model, keep)
    assert_same_step(streamed_step(model, batch, tile_tokens=10), truth)
    assert len(kept) == 3
    assert all(torch.equal(one, copied) for one, copied in zip(kept, copies, strict=True))


def test_a_gradient_that_nobody_keeps_is_written_over() -> None:
    model, batch = make_model(), make_batch()
    places = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda module, args, out: out.register_hook(lambda grad: places.append(grad.data_ptr())) and None
        )
    streamed_step(model, batch, tile_tokens=10)
    assert len(places) == 3
    assert len(set(places)) == 1


def test_retained_gradients_of_hidden_states() -> None:
    model, batch = make_model(), make_batch()

    def gradients(of: nn.Module) -> list[Tensor]:
        out = of(**without_labels(batch), output_hidden_states=True)
        for hidden in out.hidden_states:
            hidden.retain_grad()
        cross_entropy(out.logits, batch["labels"]).backward()
        return [hidden.grad for hidden in out.hidden_states]

    truth = gradients(exact(model))
    apply_mini_sequence(model, tile_tokens=10)
    for found, wanted in zip(gradients(model), truth, strict=True):
        assert relative_error(found, wanted) < 1e-10


@pytest.mark.parametrize("change", [lambda grad: 0.5 * grad, lambda grad: grad.mul_(0.5)])
def test_a_hook_that_changes_a_gradient_is_honoured(change) -> None:
    model, batch = make_model(), make_batch()

    def on_output(module: nn.Module, args: Any, out: Tensor) -> None:
        out.register_hook(change)

    model.model.layers[1].register_forward_hook(on_output)
    # The copy has the hook too.
    assert_same_step(streamed_step(model, batch, tile_tokens=10), true_step(model, batch))


@pytest.mark.parametrize("checkpoints", ["gpu", Placement(every=2)], ids=repr)
def test_a_hidden_state_that_goes_around_a_layer(checkpoints) -> None:
    """The gradient of a sum reaches both sides as one tensor, and the one around is read later."""
    model, batch = make_model(num_hidden_layers=4), make_batch()

    class Around:
        def __init__(self) -> None:
            self.early = None

        def keep(self, module: nn.Module, args: Any, out: Tensor) -> None:
            if out.requires_grad:  # not while an input is rebuilt
                self.early = out

        def add(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
            return out + self.early.to(out.dtype)

    def connected(of: nn.Module) -> nn.Module:
        around = Around()
        of.model.layers[0].register_forward_hook(around.keep)
        of.model.layers[2].register_forward_hook(around.add)
        return of

    truth = take_step(connected(exact(model)), without_labels(batch), loss_of=of_labels(batch))
    assert_same_step(streamed_step(connected(model), batch, tile_tokens=10, checkpoints=checkpoints), truth)


# -- what is trained ------------------------------------------------------------------------------------


def freeze_but(model: nn.Module, *parts: str) -> None:
    for name, param in model.named_parameters():
        param.requires_grad_(any(part in name for part in parts))


@pytest.mark.parametrize(
    "trained",
    [
        ("layers", "norm", "lm_head"),  # frozen embedding
        ("norm",),
        ("layers.1.mlp.up_proj",),
        ("layers.2",),
        ("layers.0.self_attn.k_proj", "layers.2.self_attn.o_proj"),
        ("embed_tokens",),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [GRAPHS[1], GRAPHS[4]], ids=str)
def test_frozen_weights(trained: tuple[str, ...], options: dict) -> None:
    model, batch = make_model(), make_batch()
    freeze_but(model, *trained)
    truth = true_step(model, batch)
    assert_same_step(streamed_step(model, batch, tile_tokens=10, **options), truth)


@pytest.mark.parametrize("frozen", [False, True])
def test_inputs_that_are_embeddings(frozen: bool) -> None:
    model, batch = make_model(), make_batch()
    model.requires_grad_(not frozen)
    embeds = torch.randn(2, 37, HIDDEN, dtype=torch.float64).requires_grad_()
    batch = {"inputs_embeds": embeds, "labels": batch["labels"]}
    truth = true_step(model, batch)
    assert "inputs_embeds" in truth.grads
    assert_same_step(streamed_step(model, batch, tile_tokens=10), truth)


def test_tied_embeddings() -> None:
    model, batch = make_model(tie_word_embeddings=True), make_batch()
    truth = true_step(model, batch)
    assert "lm_head.weight" not in truth.grads
    assert_same_step(streamed_step(model, batch, tile_tokens=10), truth)


def test_biases_everywhere() -> None:
    model, batch = make_model(attention_bias=True, mlp_bias=True), make_batch()
    truth = true_step(model, batch)
    for head_groups in (1, 4):
        assert_same_step(streamed_step(model, batch, tile_tokens=10, head_groups=head_groups), truth)


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "gelu", "relu"])
def test_activations(activation: str) -> None:
    """The last one is none that has a kernel: autograd does that MLP."""
    model, batch = make_model(hidden_act=activation), make_batch()
    assert_same_step(streamed_step(model, batch, tile_tokens=10), true_step(model, batch))


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2", "gemma3_text", "olmo2"])
@pytest.mark.parametrize("head_groups", [1, 4])
def test_adapters_on_every_linear_layer(family: str, head_groups: int) -> None:
    pytest.importorskip("peft")
    model, batch = with_lora(make_model(family)), make_batch()
    truth = true_step(model, batch)
    assert all("lora_" in name for name in truth.grads)
    options = {"tile_tokens": 10, "head_groups": head_groups, "checkpoints": "host"}
    assert_same_step(streamed_step(model, batch, **options), truth)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"target_modules": ["k_proj", "down_proj"]},
        {"target_modules": ["q_proj", "up_proj", "lm_head"]},
        {"bias": "all"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    ],
    ids=str,
)
def test_adapters_of_many_kinds(options: dict) -> None:
    pytest.importorskip("peft")
    model, batch = with_lora(make_model("qwen2"), **options), make_batch()
    truth = true_step(model, batch)
    for head_groups in (1, 4):
        step = streamed_step(model, batch, tile_tokens=10, head_groups=head_groups)
        assert_same_step(step, truth, what=head_groups)


def test_adapter_dropout_is_refused_in_training_alone() -> None:
    pytest.importorskip("peft")
    model, batch = with_lora(make_model(), lora_dropout=0.25), make_batch()
    truth = true_step(model.eval(), batch)
    assert_same_step(streamed_step(model, batch, tile_tokens=10), truth)
    apply_mini_sequence(model.train(), tile_tokens=10)
    with pytest.raises(ValueError, match=r"lora_dropout.*p=0\.25.*lora_dropout=0.*checkpoints='none'"):
        model(**batch)


@pytest.mark.parametrize(
    ("family", "field"),
    [("llama", "attention_dropout"), ("gemma2", "attention_dropout"), ("phi3", "resid_pdrop")],
)
def test_dropout_is_refused_in_training_alone(family: str, field: str) -> None:
    model, batch = make_model(family, **{field: 0.1}), make_batch()
    truth = true_step(model.eval(), batch)
    assert_same_step(streamed_step(model, batch, tile_tokens=10), truth)
    apply_mini_sequence(model.train(), tile_tokens=10)
    said = "attention_dropout=0.1" if field == "attention_dropout" else r"resid_attn_dropout \(p=0.1\)"
    with pytest.raises(ValueError, match=rf"drops out in training.*{said}.*checkpoints='none'"):
        model(**batch)


# -- other ways to call ---------------------------------------------------------------------------------


def without_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def of_labels(batch: dict[str, Tensor]):
    return lambda out: cross_entropy(out.logits, batch["labels"])


def test_logits_in_training_have_gradients() -> None:
    model, batch = make_model(), make_batch()
    truth = true_step(model, batch)
    apply_mini_sequence(model, tile_tokens=10)
    assert_same_step(take_step(model, without_labels(batch), loss_of=of_labels(batch)), truth)


@pytest.mark.parametrize("grad", [False, True])
def test_loss_in_evaluation(grad: bool) -> None:
    model, batch = make_model().eval(), make_batch()
    truth = true_step(model, batch)
    apply_mini_sequence(model, tile_tokens=10, checkpoints="host")
    with torch.set_grad_enabled(grad):
        loss = model(**batch).loss
    assert loss.requires_grad == grad
    assert relative_error(loss, truth.loss) < 1e-10


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_decoder_alone(attention: str) -> None:
    model, batch = make_model(attention=attention), without_labels(make_batch())
    factor = torch.randn(2, 37, HIDDEN, dtype=torch.float64)

    def loss_of(out) -> Tensor:
        return (out.last_hidden_state * factor).sum()

    truth = take_step(exact(model).model, batch, loss_of=loss_of)
    apply_mini_sequence(model, tile_tokens=10)
    # With a cache or a mask (which transformers' eager attention always has) layers run as they were.
    assert_same_step(take_step(model.model, batch, loss_of=loss_of), truth, tolerance=1e-5)
    batch["use_cache"] = False
    tolerance = 1e-10 if attention == "sdpa" else 1e-5
    assert_same_step(take_step(model.model, batch, loss_of=loss_of), truth, tolerance=tolerance)


def run_layer(model: nn.Module, index: int, x: Tensor, mask: Tensor | None) -> Tensor:
    angles = model.model.rotary_emb(x, torch.arange(x.shape[1]).unsqueeze(0))
    return model.model.layers[index](x, attention_mask=mask, position_embeddings=angles)


def causal_mask(length: int) -> Tensor:
    return torch.full((length, length), -1e30, dtype=torch.float64).triu(1)[None, None]


@pytest.mark.parametrize("options", GRAPHS, ids=str)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_layer_alone(index: int, options: dict) -> None:
    model = make_model()
    x = torch.randn(2, 13, HIDDEN, dtype=torch.float64).requires_grad_()
    factor = torch.randn(x.shape, dtype=torch.float64)
    (run_layer(exact(model), index, x, causal_mask(13)) * factor).sum().backward()
    wanted, x.grad = x.grad, None
    apply_mini_sequence(model, tile_tokens=10, **options)
    (run_layer(model, index, x, None) * factor).sum().backward()
    assert relative_error(x.grad, wanted) < 1e-10


@pytest.mark.parametrize("what", ["layer", "final norm"])
def test_a_gradient_that_is_expanded(what: str) -> None:
    """A sum's gradient has stride 0 in every dimension."""
    model = make_model()
    x = torch.randn(2, 13, HIDDEN, dtype=torch.float64).requires_grad_()

    def gradient(of: nn.Module, mask: Tensor | None) -> Tensor:
        out = run_layer(of, 0, x, mask) if what == "layer" else of.model.norm(x)
        return torch.autograd.grad(out.sum(), x)[0]

    wanted = gradient(exact(model), causal_mask(13))
    apply_mini_sequence(model, tile_tokens=10)
    assert relative_error(gradient(model, None), wanted) < 1e-10


def test_layers_alone_one_after_another_are_no_pass() -> None:
    """Layer 1 is given something else than what layer 0 gave: it cannot be rebuilt from layer 0's input."""
    model = make_model()
    x, y = (torch.randn(1, 13, HIDDEN, dtype=torch.float64).requires_grad_() for _ in range(2))

    def gradients(of: nn.Module, mask: Tensor | None) -> tuple[Tensor, ...]:
        total = run_layer(of, 0, x, mask).square().sum() + run_layer(of, 1, y, mask).square().sum()
        return torch.autograd.grad(total, (x, y))

    wanted = gradients(exact(model), causal_mask(13))
    apply_mini_sequence(model, tile_tokens=10, checkpoints=Placement(every=2))
    for found, true in zip(gradients(model, None), wanted, strict=True):
        assert relative_error(found, true) < 1e-10


def test_generation_is_the_models_own() -> None:
    model, prompt = make_model().eval(), make_batch()["input_ids"][:, :9]
    wanted = model.generate(prompt, max_new_tokens=6, do_sample=False)
    apply_mini_sequence(model, tile_tokens=4)
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), wanted)


# -- how often ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({"checkpoints": "gpu"}, [2, 2, 2, 2, 1, 1]),  # backward begins above, where inputs still wait
        ({"checkpoints": "host"}, [2] * 6),
        ({"checkpoints": "gpu", "head_groups": 2}, [2] * 6),
        ({"checkpoints": "gpu", "save_attention": "all"}, [2, 2, 2, 2, 1, 1]),
    ],
    ids=str,
)
def test_groups_of_heads_where_memory_is_short(
    options: dict, groups: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_parts, "GROUP_ROWS", 1)
    heads: list[int] = []
    backward = UlyssesAttention.backward_groups

    def counted(self, groups: Iterable[tuple[Tensor, ...]], *args, **kwargs):
        def noted(group: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            heads.append(group[0].shape[1])
            return group

        return backward(self, map(noted, groups), *args, **kwargs)

    monkeypatch.setattr(UlyssesAttention, "backward_groups", counted)
    model, batch = make_model(num_hidden_layers=6), make_batch()
    assert_same_step(streamed_step(model, batch, tile_tokens=10, **options), true_step(model, batch))
    assert heads == [8 // count for count in groups for _ in range(count)]


class ForwardProducts(TorchDispatchMode):
    """Counts products `x @ W.T` by the weight's name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        named = model.named_parameters()
        self.names = {param.data_ptr(): name for name, param in named if param.dim() == 2}
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            right = args[-1]
            name = self.names.get(right.data_ptr())
            if name is not None and right.t().is_contiguous():
                self.calls[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", ["off", "on before", "on after"])
@pytest.mark.parametrize("head_groups", [1, 4])
def test_a_step_runs_two_forwards_of_the_mlp(checkpointing: str, head_groups: int) -> None:
    """Also where transformers' own layer checkpoints are asked for, inside which there would be three."""
    model, batch = make_model(), make_batch()
    if checkpointing == "on before":
        model.gradient_checkpointing_enable()
    truth = true_step(model, batch)
    handle = apply_mini_sequence(model, tile_tokens=10, head_groups=head_groups)
    if checkpointing == "on after":
        model.gradient_checkpointing_enable()
    with ForwardProducts(model) as products:
        step = take_step(model, batch)
    assert_same_step(step, truth)
    num_tiles = 8  # of 74 tokens
    for layer in range(3):
        mlp = f"model.layers.{layer}.mlp"
        found = [products.calls[f"{mlp}.{name}.weight"] for name in ("gate_proj", "up_proj", "down_proj")]
        assert found == [2 * num_tiles, 2 * num_tiles, num_tiles], layer
    handle.undo()
    assert model.is_gradient_checkpointing == (checkpointing != "off")


def test_the_counter_counts_plain_layers() -> None:
    model, batch = make_model(), make_batch()
    with ForwardProducts(model) as products:
        take_step(model, batch)
    assert products.calls["model.layers.0.mlp.gate_proj.weight"] == 1


@pytest.mark.parametrize("options", GRAPHS, ids=str)
def test_each_weight_gets_one_gradient_a_backward(options: dict) -> None:
    model, batch = make_model(), make_batch()
    counts: Counter[str] = Counter()
    for name, param in model.named_parameters():
        param.register_post_accumulate_grad_hook(lambda param, name=name: counts.update([name]))
    apply_mini_sequence(model, tile_tokens=3, **options)
    for _ in range(2):
        model(**batch).loss.backward()
    assert counts == dict.fromkeys(dict(model.named_parameters()), 2)


# -- precision ------------------------------------------------------------------------------------------


def assert_as_accurate_as_plain(
    model: nn.Module, batch: dict[str, Tensor], autocast: torch.dtype | None = None, **options: Any
) -> None:
    """The loss, and the gradients of each kind of weight, against the float64 truth of the same weights."""
    device = next(model.parameters()).device.type
    truth = true_step(model, batch)
    with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
        plain = take_step(model, batch)
        found = streamed_step(model, batch, **options)
    dtypes = [{name: grad.dtype for name, grad in step.grads.items()} for step in (found, plain)]
    assert dtypes[0] == dtypes[1]
    # One number, whose errors cancel by luck.
    assert relative_error(found.loss, truth.loss) <= 1.5 * relative_error(plain.loss, truth.loss) + 2**-9
    ours, theirs = errors_by_kind(found, truth), errors_by_kind(plain, truth)
    wrong = {kind: (ours[kind], theirs[kind]) for kind in ours if not ours[kind] <= 1.5 * theirs[kind]}
    assert not wrong, f"error, and plain PyTorch's: {wrong}"


def errors_by_kind(step: Step, truth: Step) -> dict[str, float]:
    """Of each weight over all layers, in quadrature: a gradient of a few elements errs by luck alone."""
    squares: dict[str, list[float]] = {}
    for name, grad in step.grads.items():
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        squares.setdefault(kind, []).append(relative_error(grad, truth.grads[name]) ** 2)
    return {kind: (sum(found) / len(found)) ** 0.5 for kind, found in squares.items()}


HEADS = {"head_dim": 32}
"""Wider than in other tests: a head's norm of 8 weights errs by luck."""

LOW = [
    {"tile_tokens": 10},
    {"tile_tokens": 10, "head_groups": 4, "checkpoints": "host"},
    {"tile_tokens": 7, "head_groups": 2, "save_attention": "host", "loss": "mini_sequence"},
]


@pytest.mark.parametrize("options", LOW, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma2", "gemma3_text", "olmo2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_low_precision(family: str, dtype: torch.dtype, options: dict) -> None:
    assert_as_accurate_as_plain(make_model(family, dtype=dtype, **HEADS), make_batch(), **options)


@pytest.mark.parametrize("options", LOW, ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_autocast_with_float32_weights(family: str, options: dict) -> None:
    model = make_model(family, dtype=torch.float32, **HEADS)
    assert_as_accurate_as_plain(model, make_batch(), autocast=torch.bfloat16, **options)


def test_adapters_in_float32_on_weights_in_bfloat16() -> None:
    """As peft makes them, its `autocast_adapter_dtype` being on."""
    pytest.importorskip("peft")
    model = with_lora(make_model(dtype=torch.bfloat16))
    for name, param in model.named_parameters():
        if "lora_" in name:
            param.data = param.data.float()
    assert_as_accurate_as_plain(model, make_batch(), tile_tokens=10, head_groups=4)


# -- on a GPU -------------------------------------------------------------------------------------------

WIDE = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "num_hidden_layers": 3,
}
"""Heads of the width that kernels are made for."""


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{}, {"head_groups": 2, "checkpoints": "host", "save_attention": "host"}], ids=str
)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2"])
def test_bfloat16_at_real_widths(family: str, options: dict) -> None:
    window = {"sliding_window": 200} if family in ("mistral", "gemma2") else {}
    # transformers' SDPA has no softcap.
    attention = "eager" if family == "gemma2" else "sdpa"
    model = make_model(family, dtype=torch.bfloat16, attention=attention, **WIDE, **window).to("cuda")
    batch = {name: value.to("cuda") for name, value in make_batch(2, 1003).items()}
    assert_as_accurate_as_plain(model, batch, tile_tokens=512, **options)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {"checkpoints": "gpu"},
        {"checkpoints": "host"},
        {"checkpoints": "host", "save_attention": "host", "head_groups": 2},
        {"checkpoints": Placement(every=2)},
    ],
    ids=str,
)
def test_a_step_never_waits_for_the_gpu(options: dict) -> None:
    model = make_model(dtype=torch.bfloat16, attention="sdpa", **WIDE).to("cuda")
    batch = {name: value.to("cuda") for name, value in make_batch(2, 1003).items()}
    apply_mini_sequence(model, tile_tokens=512, **options)
    for _ in range(2):  # kernels are compiled, host memory is pinned
        model(**batch).loss.backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**batch).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_packed_documents_at_real_widths() -> None:
    model = make_model(dtype=torch.bfloat16, attention="sdpa", **WIDE).to("cuda")
    batch = {name: value.to("cuda") for name, value in make_batch(1, 1003, masked=0).items()}
    lengths = (300, 1, 450, 252)
    batch["position_ids"] = torch.cat([torch.arange(n, device="cuda") for n in lengths]).unsqueeze(0)
    batch["use_cache"] = False  # with a cache, the plain model lets documents see each other
    assert_as_accurate_as_plain(model, batch, tile_tokens=512, head_groups=2)
