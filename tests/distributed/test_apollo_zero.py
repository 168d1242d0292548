"""`Apollo` under ZeRO 1 to 3 takes one process's steps, and its checkpoints go from any layout to any other.

The processes compute in float64 throughout, DeepSpeed too: to them float32 is float64 (below).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

if __name__.endswith("_in_gloo"):
    # In a process of its own, before it computes: DeepSpeed keeps masters in float32, which would hide what
    # this looks for.
    torch.float = torch.float32 = torch.float64
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)

import torch.distributed as dist
from gloo import Case, run_cases
from torch import Tensor, nn
from torch.nn import functional as F

from longseq.apollo import Apollo, parameter_groups
from longseq.distributed import ProcessGroups, state_files
from longseq.distributed.engine import Engine, LocalEngine

# Six processes are started, each of which makes many engines.
pytestmark = pytest.mark.slow

KINDS = ("channel", "tensor")
STAGES = (1, 2, 3)
SIZES = (2, 3)
STEPS, SAVED_AFTER = 6, 3
LR, TOLERANCE = 0.05, 1e-10


class Net(nn.Module):
    """Odd shapes; flat parts end in the middle of rows, of experts and of biases."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(19, 6)
        self.up, self.down = nn.Linear(6, 13), nn.Linear(13, 6, bias=False)
        self.square, self.norm = nn.Linear(6, 6, bias=False), nn.LayerNorm(6)
        self.experts = nn.Parameter(torch.randn(3, 6, 5) * 0.3)
        self.gain = nn.Parameter(torch.ones(1))
        self.lm_head = nn.Linear(6, 19)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.square(self.down(torch.tanh(self.up(x))))
        x = x + torch.einsum("bsd,edf,egf->bsg", x, self.experts, self.experts)
        return self.lm_head(self.norm(x) * self.gain)


def make_net() -> Net:
    """The same in float64 and where float32 is it."""
    net, draw = Net().double(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, param in net.named_parameters():
            noise = torch.randn(param.shape, generator=draw, dtype=torch.float64)
            param.copy_(0.4 * noise + (1.0 if name in ("norm.weight", "gain") else 0.0))
    return net


def make_apollo(net: nn.Module, kind: str, embeddings: Any = "low_rank", rank: int | None = None) -> Apollo:
    groups = parameter_groups(net, embeddings=embeddings, weight_decay=0.1)
    rank = rank or (2 if kind == "channel" else 1)
    return Apollo(groups, lr=LR, rank=rank, scale_type=kind, update_gap=2)  # type: ignore[arg-type]


def make_engine(net: nn.Module, optimizer: torch.optim.Optimizer, stage: int) -> Engine:
    if stage == 0:
        return LocalEngine(net, optimizer, ProcessGroups())
    from longseq.distributed.zero import DeepSpeedEngine, init_deepspeed_communication
    from longseq.distributed.zero_config import ZeroOptions

    init_deepspeed_communication()
    return DeepSpeedEngine(net, optimizer, ProcessGroups.create(1), ZeroOptions(stage))


def loss_of(net: Callable[..., Tensor], step: int) -> Tensor:
    """Over twelve rows, each rank its own: the mean of theirs is the mean of all."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    ids = torch.randint(19, (12, 7), generator=torch.Generator().manual_seed(step))[rank::size]
    # Of sizes that make the limit of growth act, after the first steps.
    return (0.01, 0.01, 0.01, 3.0, 1.0, 2.0)[step] * F.cross_entropy(
        net(ids=ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()
    )


def take_steps(engine: Engine, steps: Iterable[int]) -> None:
    size = dist.get_world_size() if dist.is_initialized() else 1
    for step in steps:
        loss = loss_of(engine, step)
        engine.backward(loss * (engine.reducer_divisor / size))
        engine.step(LR)


def whole_weights(net: nn.Module) -> dict[str, Tensor]:
    params = [param for param in net.parameters() if hasattr(param, "ds_id")]
    if not params:
        return {name: param.detach().clone() for name, param in net.named_parameters()}
    import deepspeed

    with deepspeed.zero.GatheredParameters(params):
        return {name: param.detach().clone() for name, param in net.named_parameters()}


def count_collectives(calls: list[str]) -> Callable[[], None]:
    """Has each collective of Apollo's own write its name down, until what is returned is called."""
    from longseq.apollo import sharded

    class Counting:
        def __getattr__(self, name: str) -> Any:
            function = getattr(dist, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                calls.append(name)
                return function(*args, **kwargs)

            return call if name.startswith("all_") else function

    sharded.dist = Counting()  # type: ignore[assignment]
    return lambda: setattr(sharded, "dist", dist)


def listed(weights: dict[str, Tensor]) -> dict[str, list]:
    """For what a process returns: `torch.save` takes one float for the other here."""
    assert {weight.dtype for weight in weights.values()} == {torch.float64}
    return {name: weight.tolist() for name, weight in weights.items()}


# -- in the processes ---------------------------------------------------------------------------------------


def walk_case(
    stage: int,
    kind: str,
    embeddings: str = "low_rank",
    load: str | None = None,
    save: str | None = None,
) -> dict[str, Any]:
    """All steps, or those after a checkpoint; the checkpoint that they leave in the middle of them."""
    net = make_net()
    optimizer = make_apollo(net, kind, embeddings)
    engine = make_engine(net, optimizer, stage)
    if load is not None:
        with torch.no_grad():
            for param in engine.module.parameters():
                param.zero_()
        engine.load(Path(load))
    calls: list[str] = []
    end = count_collectives(calls)
    first = 0 if load is None else SAVED_AFTER
    take_steps(engine, range(first, SAVED_AFTER))
    if save is not None:
        engine.save(Path(save))
    take_steps(engine, range(SAVED_AFTER, STEPS))
    end()
    report = {one.rule: one.state_elements for one in optimizer.memory_report().rules}
    return {"weights": listed(whole_weights(engine.module)), "calls": calls, "report": report}


def again_case(stage: int, kind: str, embeddings: str, folder: str) -> dict[str, float]:
    """A checkpoint loaded and saved again: states are the same, bit for bit."""
    found = []
    net = make_net()
    engine = make_engine(net, make_apollo(net, kind, embeddings), stage)
    take_steps(engine, range(SAVED_AFTER))
    engine.save(Path(folder) / "first")
    dist.barrier()
    other = make_net()
    second = make_engine(other, make_apollo(other, kind, embeddings), stage)
    second.load(Path(folder) / "first")
    second.save(Path(folder) / "second")
    dist.barrier()
    one, two = (state_files.SavedState(Path(folder) / name) for name in ("first", "second"))
    for name in one.shapes:
        assert set(one.states(name)) == set(two.states(name))
        for key in one.states(name):
            found.append(float((one.whole(name, key) - two.whole(name, key)).abs().max()))
    take_steps(engine, [SAVED_AFTER])
    take_steps(second, [SAVED_AFTER])
    mine, others = whole_weights(engine.module), whole_weights(second.module)
    return {
        "states": max(found),
        "num_states": len(found),
        "weights": max(float((mine[name] - others[name]).abs().max()) for name in mine),
    }


def refused_case(stage: int, folder: str) -> dict[str, str]:
    """Why checkpoints of other optimizers are not taken."""
    reasons = {}
    for name in ("AdamW", "rank 3"):
        net = make_net()
        engine = make_engine(net, make_apollo(net, "channel"), stage)
        try:
            engine.load(Path(folder) / name)
        except ValueError as error:
            reasons[name] = str(error)
    return reasons


def own_engine_case(stage: int, kind: str, wrapped: bool) -> dict[str, list]:
    """DeepSpeed's engine in a person's own loop, which has to say once how the parameters lie."""
    import deepspeed

    from longseq.distributed.apollo_state import lay_out_apollo
    from longseq.distributed.zero import init_deepspeed_communication

    init_deepspeed_communication()
    net = make_net()
    optimizer = make_apollo(net, kind)
    config = {
        "train_batch_size": 12,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
    if wrapped:  # as accelerate has it

        class Wrapper:
            optimizer = engine.optimizer

        lay_out_apollo(Wrapper(), engine.module)
    else:
        lay_out_apollo(engine.optimizer, engine.module)
    for step in range(STEPS):
        engine.backward(loss_of(engine, step))
        engine.step()
    return listed(whole_weights(engine.module))


def not_laid_out_case(stage: int) -> str:
    import deepspeed

    net = make_net()
    config = {
        "train_batch_size": 12,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=net, optimizer=make_apollo(net, "channel"), config=config)
    engine.backward(loss_of(engine, 0))
    try:
        engine.step()
    except RuntimeError as error:
        return str(error)
    return ""


# -- one process, and the start of all ----------------------------------------------------------------------


def alone(
    kind: str, embeddings: str, *, load: Path | None = None, save: Path | None = None
) -> dict[str, Tensor]:
    net = make_net()
    engine = make_engine(net, make_apollo(net, kind, embeddings), 0)
    if load is not None:
        engine.load(load)
    take_steps(engine, range(0 if load is None else SAVED_AFTER, SAVED_AFTER))
    if save is not None:
        engine.save(save)
    take_steps(engine, range(SAVED_AFTER, STEPS))
    return whole_weights(net)


def embeddings_of(size: int, stage: int, kind: str) -> str:
    """Every stage, size and kind with one or the other."""
    return ("low_rank", "adamw")[(size + stage + KINDS.index(kind)) % 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[tuple[str, str], dict[str, Tensor]]:
    references = {
        (kind, rule): alone(kind, rule, save=folder / f"0-{kind}-{rule}")
        for kind in KINDS
        for rule in ("low_rank", "adamw")
    }
    for name in ("AdamW", "rank 3"):
        net = make_net()
        adamw = torch.optim.AdamW(net.parameters())
        engine = make_engine(net, adamw if name == "AdamW" else make_apollo(net, "channel", rank=3), 0)
        take_steps(engine, [0])
        engine.save(folder / name)
    return references


@pytest.fixture(scope="module")
def found(folder: Path, references: dict) -> dict[str, list[Any]]:
    alone: dict[str, Case] = {
        f"1 {stage}": (walk_case, {"stage": stage, "kind": KINDS[stage % 2]}) for stage in STAGES
    }
    results = run_cases(1, alone)
    for size in SIZES:
        cases: dict[str, Case] = {}
        for kind in KINDS:
            for stage in STAGES:
                rule = embeddings_of(size, stage, kind)
                options = {"stage": stage, "kind": kind, "embeddings": rule}
                path = str(folder / f"{size}-{stage}-{kind}")
                cases[f"{size} {stage} {kind}"] = walk_case, {**options, "save": path}
                # From one process, or from two and another stage.
                options["embeddings"] = embeddings_of(2, stage % 3 + 1, kind)
                load = folder / (
                    f"0-{kind}-{options['embeddings']}" if size == 2 else f"2-{stage % 3 + 1}-{kind}"
                )
                cases[f"{size} {stage} {kind} resumed"] = walk_case, {**options, "load": str(load)}
        for stage in STAGES if size == 2 else ():
            eight = {"stage": stage, "kind": "channel", "embeddings": "adamw_8bit"}
            cases[f"8-bit {stage}"] = again_case, {**eight, "folder": str(folder / f"8-bit {stage}")}
            cases[f"own {stage}"] = (
                own_engine_case,
                {"stage": stage, "kind": KINDS[stage % 2], "wrapped": stage == 2},
            )
        if size == 2:
            cases |= {
                f"refused {stage}": (refused_case, {"stage": stage, "folder": str(folder)})
                for stage in (1, 3)
            }
            cases["not laid out"] = not_laid_out_case, {"stage": 2}
        results |= run_cases(size, cases)
    return results


def assert_near(found: dict[str, Any], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (torch.as_tensor(found[name], dtype=torch.float64) - value).abs().max() < TOLERANCE, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", SIZES)
def test_every_stage_takes_the_steps_of_one_process(
    found: dict, references: dict, size: int, stage: int, kind: str
) -> None:
    rule = embeddings_of(size, stage, kind)
    wanted = references[kind, rule]
    start = dict(make_net().named_parameters())
    assert all((wanted[name] - start[name]).abs().max() > 1e-3 for name in wanted), "every weight moves"
    ranks = found[f"{size} {stage} {kind}"]
    for rank in ranks:
        assert_near(rank["weights"], wanted)
        calls = rank["calls"]
        # Stages 1 and 2 step each group of weights by itself; of ours, one has all that is projected.
        assert calls == ["all_to_all_single", "all_reduce"] * STEPS
    rank = 2 if kind == "channel" else 1
    channels = 13 + 13 + 6 + 3 * 6 + (2 * 19 if rule == "low_rank" else 0)
    own = sum(one["report"]["low_rank"] for one in ranks)
    norms_and_steps = 2 * 3 + (3 + 1) + (2 * 2 if rule == "low_rank" else 0)
    assert own == 2 * channels * rank + size * norms_and_steps, "no moment twice"


@pytest.mark.parametrize("stage", STAGES)
def test_one_process_has_nobody_to_ask(found: dict, references: dict, stage: int) -> None:
    [rank] = found[f"1 {stage}"]
    assert_near(rank["weights"], references[KINDS[stage % 2], "low_rank"])
    assert rank["calls"] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", SIZES)
def test_a_checkpoint_goes_on_under_another_layout(
    found: dict, references: dict, size: int, stage: int, kind: str
) -> None:
    wanted = references[kind, embeddings_of(2, stage % 3 + 1, kind)]
    for rank in found[f"{size} {stage} {kind} resumed"]:
        assert_near(rank["weights"], wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", SIZES)
def test_a_checkpoint_goes_on_on_one_process(
    found: dict, references: dict, folder: Path, size: int, stage: int, kind: str
) -> None:
    rule = embeddings_of(size, stage, kind)
    assert_near(alone(kind, rule, load=folder / f"{size}-{stage}-{kind}"), references[kind, rule])


@pytest.mark.parametrize("stage", STAGES)
def test_8_bit_states_survive(found: dict, stage: int) -> None:
    for rank in found[f"8-bit {stage}"]:
        assert rank["num_states"] > 20
        assert rank["states"] == 0
        assert rank["weights"] == 0


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_states_of_another_optimizer_are_refused(
    found: dict, references: dict, folder: Path, stage: int
) -> None:
    every = [refused_case(0, str(folder))] if stage == 0 else found[f"refused {stage}"]
    for reasons in every:
        for name in ("AdamW", "rank 3"):
            assert "the saved states of" in reasons[name]
            assert "they are of another optimizer or of another rank. Set it as it was" in reasons[name]


@pytest.mark.parametrize("stage", STAGES)
def test_deepspeeds_own_engine(found: dict, references: dict, stage: int) -> None:
    for rank in found[f"own {stage}"]:
        assert_near(rank, references[KINDS[stage % 2], "low_rank"])


def test_deepspeed_without_a_layout_is_told_what_to_call(found: dict) -> None:
    for message in found["not laid out"]:
        assert "call longseq.distributed.lay_out_apollo(engine.optimizer, engine.module)" in message
