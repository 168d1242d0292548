"""Streamed layers under ZeRO 1 to 3: the steps of one process, weights gathered once a layer and pass."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from gloo import run_cases
from numerics import assert_as_accurate_as
from safetensors.torch import save_file
from torch import Tensor, nn
from training_samples import MICRO_BATCHES, VOCAB, engine_training, plain_training, tiny_llama, weights_of

from longseq.distributed import ProcessGroups
from longseq.mst import apply_mini_sequence
from longseq.mst.gradient_owner import GradientOwner
from longseq.mst.placement import Placement

# Processes are started that make an engine of DeepSpeed for every case.
pytestmark = pytest.mark.slow

LAYERS = 4
STEPS = 2
NO_RESERVES = {
    # DeepSpeed's defaults would keep all weights of a model this small gathered from the first step on.
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
RUNS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "as many tiles as one": {"tile_tokens": None},
    "attention by groups": {"head_groups": 2},
    "attention saved": {"save_attention": True, "head_groups": 2},
    "attention of the last saved": {"save_attention": 1},
    "layers rebuilt": {"checkpoints": Placement(every=2, host=False)},
    "many layers rebuilt": {"checkpoints": Placement(every=3, host=False), "save_attention": True},
    "applied to an engine": {"late": True},
    "the head by mini-sequences": {"loss": "mini_sequence", "loss_memory_mib": 1},
    "born sharded": {"born": True},
}
ZERO_1_AND_2 = ("as it is", "layers rebuilt")
BY_TRAINER: dict[str, dict[str, Any]] = {
    "2": {"stage": 2},
    "3": {"stage": 3},
    "3, loaded in parts": {"stage": 3, "load": True},
}
TRAINER_STEPS = 3
ADAPTED = [(2, "all", False), (3, "all", False), (3, "above", False), (3, "all", True)]


def make_model(dtype: torch.dtype = torch.float32, adapters: str | None = None) -> nn.Module:
    """`adapters` are of "all" layers, or of those "above" the first two."""
    return with_adapters(tiny_llama(dtype, num_hidden_layers=LAYERS), adapters)


def with_adapters(model: nn.Module, adapters: str | None) -> nn.Module:
    if adapters is None:
        return model
    import peft

    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "o_proj", "up_proj"],
        layers_to_transform=None if adapters == "all" else [2, 3],
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(3)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False).to(model.dtype)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=9.0)


def init_communication() -> None:
    from longseq.distributed.zero import init_deepspeed_communication

    init_deepspeed_communication()


def make_engine(model: nn.Module, groups: ProcessGroups, stage: int):
    from longseq.distributed.zero import DeepSpeedEngine
    from longseq.distributed.zero_config import ZeroOptions

    class WithoutReserves(ZeroOptions):
        def deepspeed_config(self, world_size: int, module: nn.Module | None = None) -> dict[str, Any]:
            config = super().deepspeed_config(world_size, module)
            if self.stage == 3:
                config["zero_optimization"] |= NO_RESERVES
            return config

    init_communication()
    options = WithoutReserves(stage, MICRO_BATCHES // groups.dp_size)
    return DeepSpeedEngine(model, make_optimizer(model), groups, options)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    import deepspeed

    params = [param for param in model.parameters() if hasattr(param, "ds_id")]
    with deepspeed.zero.GatheredParameters(params, enabled=bool(params)):
        return weights_of(model)


@contextmanager
def counted_gathers() -> Iterator[Counter]:
    """All-gathers of weights, and their elements."""
    from deepspeed.runtime.zero import partition_parameters

    counts, original = Counter(), partition_parameters._dist_allgather_fn

    def counting(part: Tensor, whole: Tensor, group: Any = None):
        counts.update(gathers=1, elements=whole.numel())
        return original(part, whole, group)

    partition_parameters._dist_allgather_fn = counting
    try:
        yield counts
    finally:
        partition_parameters._dist_allgather_fn = original


@contextmanager
def watched_gradients() -> Iterator[list[bool]]:
    """Of each layer's backward, whether it may write over its output's gradient."""
    found, original = [], GradientOwner.owns

    def watching(self: GradientOwner, grad: Tensor, references: tuple[int, int]) -> bool:
        found.append(original(self, grad, references))
        return found[-1]

    with patch.object(GradientOwner, "owns", watching):
        yield found


def watch_gathered(engine: Any, layers: nn.ModuleList) -> list[list[int]]:
    """The layers that are gathered when one is gathered for its backward, that one being the first named."""
    found: list[list[int]] = []
    coordinator = engine._engine.optimizer.parameter_offload.get_param_coordinator()
    original, indices = coordinator.fetch_sub_module, {layer: index for index, layer in enumerate(layers)}

    def watching(module: nn.Module, forward: bool) -> None:
        original(module, forward=forward)
        if module in indices and not forward:
            gathered = [
                index
                for layer, index in indices.items()
                if any(param.ds_status.name == "AVAILABLE" for param in layer.parameters())
            ]
            found.append([indices[module], *gathered])

    coordinator.fetch_sub_module = watching
    return found


def watch_entered(engine: Any, layers: nn.ModuleList) -> list[dict[str, Any]]:
    """Each layer that is entered, the others that are sent for (-1: in parts), and those that are whole."""
    found: list[dict[str, Any]] = []
    coordinator = engine._engine.optimizer.parameter_offload.get_param_coordinator()
    original, indices = coordinator.fetch_sub_module, {layer: index for index, layer in enumerate(layers)}

    def watching(module: nn.Module, forward: bool) -> None:
        original(module, forward=forward)
        if module in indices:
            sent, whole = [], []
            for layer, index in indices.items():
                states = {param.ds_status.name for param in layer.parameters() if not param.ds_persist}
                if layer is module or states <= {"NOT_AVAILABLE"}:
                    continue
                sent.append(-1 if "NOT_AVAILABLE" in states else index)
                whole += [index] if "AVAILABLE" in states else []
            found.append({"layer": indices[module], "forward": forward, "sent": sent, "whole": whole})

    coordinator.fetch_sub_module = watching
    return found


def born_model(adapters: str | None) -> nn.Module:
    """The same numbers, in a model whose weights have never been whole."""
    from longseq.distributed.zero_config import ZeroOptions
    from longseq.distributed.zero_init import born_sharded, load_sharded

    init_communication()
    with tempfile.TemporaryDirectory() as folder:
        save_file(make_model().state_dict(), f"{folder}/model.safetensors", {"format": "pt"})
        with born_sharded(ZeroOptions(3).deepspeed_config(2)):
            model = tiny_llama(num_hidden_layers=LAYERS)
        load_sharded(model, [Path(folder, "model.safetensors")], source="what was saved")
    return with_adapters(model, adapters)


def zero_case(
    stage: int, adapters: str | None = None, late: bool = False, born: bool = False, **options: Any
) -> dict:
    """Losses and weights of a rank, and what ZeRO-3 gathered: rows are of other lengths on the other rank."""
    groups, options = ProcessGroups.create(), {"tile_tokens": 10, **options}
    model = born_model(adapters) if born else make_model(adapters=adapters)
    if late:
        engine = make_engine(model, groups, stage)
        handle = apply_mini_sequence(model, **options)
    else:
        handle = apply_mini_sequence(model, **options)
        engine = make_engine(model, groups, stage)
    layers = (model.get_base_model() if adapters else model).model.layers
    gathered = watch_gathered(engine, layers) if stage == 3 else []
    with counted_gathers() as counts, watched_gradients() as owned:
        result = engine_training(engine, groups)
    with torch.no_grad():
        logits = [engine(input_ids=torch.arange(1, 38)[None]).logits]
        handle.undo()
        logits.append(engine(input_ids=torch.arange(1, 38)[None]).logits)
    seen = {"counts": dict(counts), "gathered": list(gathered), "logits": logits, "owned": owned}
    return {**result, "weights": whole_weights(model), **seen}


def prefetch_case() -> list[dict[str, Any]]:
    """Each layer that is entered in a later step, and what there is of the others.

    What the options ask for is asked for, as if weights were too large to stay and, as in real models, the
    embedding larger than two layers.
    """
    from longseq.distributed import zero_config
    from longseq.distributed.zero import DeepSpeedEngine

    init_communication()
    zero_config.PERSISTENT_NUMEL, earlier = 16, zero_config.PERSISTENT_NUMEL
    groups = ProcessGroups.create()
    model = tiny_llama(num_hidden_layers=LAYERS, hidden_size=16, intermediate_size=4)
    apply_mini_sequence(model, tile_tokens=10)
    options = zero_config.ZeroOptions(3, MICRO_BATCHES // groups.dp_size)
    engine = DeepSpeedEngine(model, make_optimizer(model), groups, options)
    zero_config.PERSISTENT_NUMEL = earlier
    engine_training(engine, groups)
    entered = watch_entered(engine, model.model.layers)
    engine_training(engine, groups)
    return entered


def deepspeed_config(stage: int) -> dict[str, Any]:
    """As a user of the Trainer writes it."""
    sizes = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
    return {
        **dict.fromkeys(sizes, "auto"),
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **(NO_RESERVES if stage == 3 else {})},
    }


def prepare_for_trainer() -> None:
    from accelerate.state import AcceleratorState

    init_communication()
    AcceleratorState._reset_state(reset_partial_state=True)
    # Looked for even where the group is there; without the last, processes take each other's cores.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", OMP_NUM_THREADS="1")


def loaded(model: nn.Module, folder: str) -> nn.Module:
    """The same as transformers loads it: where ZeRO-3 is asked for, in parts, before a Trainer is made."""
    model.config.save_pretrained(folder)
    save_file(model.state_dict(), f"{folder}/model.safetensors", {"format": "pt"})  # on every rank
    return type(model).from_pretrained(folder).train()


def trainer_case(stage: int | None, load: bool = False) -> dict:
    """Three steps of two rows each by the Trainer's own DeepSpeed; plain, on one process, without a stage."""
    from transformers import Trainer, TrainingArguments

    if stage is not None:
        prepare_for_trainer()
    draw = torch.Generator().manual_seed(1)
    texts = [torch.randint(1, VOCAB, (length,), generator=draw) for length in (37, 50, 9, 26, 44, 12)]
    rows = [{"input_ids": text, "labels": text} for text in texts]
    with tempfile.TemporaryDirectory() as folder, counted_gathers() as counts:
        arguments = TrainingArguments(
            folder,
            max_steps=TRAINER_STEPS,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2 if stage is None else 1,
            optim="sgd",
            learning_rate=3.0,
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            deepspeed=None if stage is None else deepspeed_config(stage),
        )
        model = loaded(make_model(), folder) if load else make_model()
        assert load == any(hasattr(param, "ds_id") for param in model.parameters())
        if stage is not None:
            apply_mini_sequence(model, tile_tokens=10)
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "weights": whole_weights(model), "counts": dict(counts)}


def probe_case() -> list[str]:
    """What is said to sharded models of no known family: one is a Llama, the other's layers are not."""
    said = []
    for factor in (1.0, 0.5):
        model = born_model(None)
        model.config.model_type = "unknown"
        for layer in model.model.layers:
            # Both halves of a layer add what an MLP or attention gave, which then is not what the names say.
            layer.mlp.register_forward_hook(lambda module, args, output, factor=factor: output * factor)
        try:
            apply_mini_sequence(model, tile_tokens=10, layers="model.layers").undo()
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
        said += [name for name, param in model.named_parameters() if param.numel()]
    return said


def adapted_name(stage: int, adapters: str, born: bool) -> str:
    return f"{stage}{', born sharded' if born else ''}, adapters of {adapters}"


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list]:
    cases: dict[str, Any] = {f"3, {name}": (zero_case, {"stage": 3, **run}) for name, run in RUNS.items()}
    for stage in (1, 2):
        cases |= {f"{stage}, {name}": (zero_case, {"stage": stage, **RUNS[name]}) for name in ZERO_1_AND_2}
    for stage, adapters, born in ADAPTED:
        case = {"stage": stage, "adapters": adapters, "head_groups": 2, "born": born}
        cases[adapted_name(stage, adapters, born)] = (zero_case, case)
    cases |= {"Probe": (probe_case, {}), "Prefetch": (prefetch_case, {})}
    cases |= {f"Trainer, {name}": (trainer_case, run) for name, run in BY_TRAINER.items()}
    return run_cases(2, cases)


NAMES = [
    *(f"3, {name}" for name in RUNS),
    *(f"{stage}, {name}" for stage in (1, 2) for name in ZERO_1_AND_2),
    *(adapted_name(*adapted) for adapted in ADAPTED),
]


@cache
def plain(dtype: torch.dtype, adapters: str | None) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and changes of the weights."""
    model = make_model(adapters=adapters).to(dtype)
    start = weights_of(model)
    losses = plain_training(model, make_optimizer(model))
    return losses, {name: weight - start[name] for name, weight in weights_of(model).items()}


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_takes_the_steps_of_plain_pytorch(outcomes: dict[str, list], name: str) -> None:
    adapters = name.rpartition(" ")[2] if "adapters" in name else None
    (truth_losses, truth), (_, in_float32) = plain(torch.float64, adapters), plain(torch.float32, adapters)
    start = weights_of(make_model(adapters=adapters))
    for rank in outcomes[name]:
        assert rank["losses"] == pytest.approx(truth_losses, rel=2e-6)
        assert rank["weights"].keys() == truth.keys()
        for key, weight in rank["weights"].items():
            moved = weight - start[key]
            assert_as_accurate_as(moved, in_float32[key], truth[key], slack=2, name=key)


@pytest.mark.parametrize(
    "name", ["as it is", "attention by groups", "attention saved", "applied to an engine"]
)
def test_weights_are_gathered_once_a_layer_and_pass(outcomes: dict[str, list], name: str) -> None:
    elements = sum(param.numel() for param in make_model().parameters())
    passes = STEPS * (MICRO_BATCHES // 2) * 2  # forward and backward
    for rank in outcomes[f"3, {name}"]:
        assert rank["counts"] == outcomes["3, as many tiles as one"][0]["counts"]
        assert rank["counts"]["elements"] <= elements * passes * 1.01  # padded to the ranks


@pytest.mark.parametrize("name", RUNS)
def test_no_layer_stays_gathered_after_its_backward(outcomes: dict[str, list], name: str) -> None:
    for rank in outcomes[f"3, {name}"]:
        backwards = STEPS * MICRO_BATCHES // 2
        assert [layer for layer, *_ in rank["gathered"]] == [*reversed(range(LAYERS))] * backwards
        assert all(gathered == [layer] for layer, *gathered in rank["gathered"]), rank["gathered"][:LAYERS]


@pytest.mark.parametrize(
    "name", ["as it is", "attention by groups", "layers rebuilt", "applied to an engine", "born sharded"]
)
def test_a_layers_gradient_takes_the_place_of_the_one_before(outcomes: dict[str, list], name: str) -> None:
    for rank in outcomes[f"3, {name}"]:
        assert len(rank["owned"]) == STEPS * MICRO_BATCHES // 2 * LAYERS
        assert all(rank["owned"])


@pytest.mark.parametrize("name", NAMES)
def test_undo_leaves_an_engine_that_runs(outcomes: dict[str, list], name: str) -> None:
    for rank in outcomes[name]:
        by_mini_sequences, plain = rank["logits"]
        torch.testing.assert_close(by_mini_sequences, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BY_TRAINER)
def test_the_trainers_own_deepspeed_takes_the_same_steps(outcomes: dict[str, list], name: str) -> None:
    wanted = trainer_case(None)
    start = weights_of(make_model())
    for rank in outcomes[f"Trainer, {name}"]:
        assert rank["losses"] == pytest.approx(wanted["losses"], rel=2e-6)
        for key, weight in rank["weights"].items():
            moved = wanted["weights"][key] - start[key]
            scale = float(moved.abs().max())
            torch.testing.assert_close(weight - start[key], moved, rtol=0, atol=1e-4 * scale, msg=key)


@pytest.mark.parametrize("name", ["3", "3, loaded in parts"])
def test_the_trainers_own_deepspeed_gathers_once_a_layer_and_pass(
    outcomes: dict[str, list], name: str
) -> None:
    elements = sum(param.numel() for param in make_model().parameters())
    for rank in outcomes[f"Trainer, {name}"]:
        assert 0 < rank["counts"]["elements"] <= elements * TRAINER_STEPS * 2 * 1.01


def test_layers_of_no_known_family_are_probed_where_they_are_sharded(outcomes: dict[str, list]) -> None:
    for right, wrong in outcomes["Probe"]:
        assert right == "nothing"
        assert "what layer 0 adds would differ by" in wrong


def test_the_next_layer_is_sent_for_whole_and_none_beyond(outcomes: dict[str, list]) -> None:
    forward = [(index, [index + 1]) for index in range(LAYERS - 1)] + [(LAYERS - 1, [])]
    backward = [(index, [index - 1]) for index in reversed(range(1, LAYERS))] + [(0, [])]
    for entered in outcomes["Prefetch"]:
        sent = [(entry["layer"], entry["sent"]) for entry in entered]
        assert sent == [*forward, *backward] * (STEPS * MICRO_BATCHES // 2)


def test_no_other_layer_is_whole_beside_a_layers_backward(outcomes: dict[str, list]) -> None:
    """What is on its way has one place; what has come with others is copied out of it, and takes two."""
    for entered in outcomes["Prefetch"]:
        assert not [entry for entry in entered if entry["whole"] and not entry["forward"]]
