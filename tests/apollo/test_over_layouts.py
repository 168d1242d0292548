"""`Apollo` takes one process's steps under torch's wrappers, whose checkpoints go on; all in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from apollo_samples import KINDS, SIZES, STEPS, assert_near, options_of
from gloo import Case, run_cases
from torch import Tensor, nn
from torch.nn import functional as F

from longseq.apollo import Apollo, parameter_groups
from longseq.apollo.in_backward import step_in_backward

# Nine processes are started, in which DTensor meets every operation for the first time.
pytestmark = pytest.mark.slow

# -- a model, as torch's own wrappers have it ---------------------------------------------------------------


class Net(nn.Module):
    """Odd shapes; experts of which four ranks have not one each; sizes of 12 where FSDP2 must cut evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(19, 12)
        self.up, self.down = nn.Linear(12, 17), nn.Linear(17, 12, bias=False)
        self.square, self.norm = nn.Linear(12, 12, bias=False), nn.LayerNorm(12)
        self.experts = nn.Parameter(torch.randn(3, 12, 5) * 0.2)
        self.others = nn.Parameter(torch.randn(2, 12, 4) * 0.2)
        self.gain = nn.Parameter(torch.ones(1))
        self.lm_head = nn.Linear(12, 19, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.square(self.down(torch.tanh(self.up(x))))
        for experts in (self.experts, self.others):
            x = x + torch.einsum("bsd,ehd->bseh", x, experts.mT).tanh().sum(2) @ experts[0].T
        return self.lm_head(self.norm(x) * self.gain)


def make_net() -> Net:
    torch.manual_seed(5)
    return Net().double()


def groups_of(net: Net, embeddings: Any = "low_rank") -> list[dict[str, Any]]:
    return parameter_groups(net, embeddings=embeddings, weight_decay=0.1, overrides={"others": "adamw"})


def loss_of(net: Callable[[Tensor], Tensor], step: int, part: slice = slice(None)) -> Tensor:
    """Over twelve rows, or some of them."""
    ids = torch.randint(19, (12, 8), generator=torch.Generator().manual_seed(step))[part]
    logits = net(ids[:, :-1])
    return (1 + step % 3) * F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def net_steps(net: Any, optimizer: Any, steps: Iterable[int], part: slice = slice(None)) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(net, step, part).backward()
        optimizer.step()


def net_on_one(kind: str, steps: int = STEPS, embeddings: str = "low_rank") -> dict[str, Tensor]:
    net = make_net()
    net_steps(net, Apollo(groups_of(net, embeddings), **options_of(kind)), range(steps))
    return {name: param.detach() for name, param in net.named_parameters()}


def my_rows() -> slice:
    return slice(dist.get_rank(), None, dist.get_world_size())


def ddp_case(kind: str) -> dict[str, Tensor]:
    net = make_net()
    net_steps(
        nn.parallel.DistributedDataParallel(net),
        Apollo(groups_of(net), **options_of(kind)),
        range(STEPS),
        my_rows(),
    )
    return {name: param.detach() for name, param in net.named_parameters()}


def zero_redundancy_case(kind: str) -> dict[str, Tensor]:
    """Whole weights, each stepped by one rank; what makes the rank's optimizer gives it the names."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net = make_net()
    names = {param: name for name, param in net.named_parameters()}

    def apollo(groups: list[dict[str, Any]], **options: Any) -> Apollo:
        named = [{**group, "names": [names[one] for one in group["params"]]} for group in groups]
        return Apollo(named, **options)

    groups = [{key: value for key, value in group.items() if key != "names"} for group in groups_of(net)]
    optimizer = ZeroRedundancyOptimizer(groups, apollo, **options_of(kind))
    net_steps(nn.parallel.DistributedDataParallel(net), optimizer, range(STEPS), my_rows())
    return {name: param.detach() for name, param in net.named_parameters()}


def sharded_net(dim: int = 0, mesh_shape: tuple[int, ...] = ()) -> Net:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    mesh_shape = mesh_shape or (dist.get_world_size(),)
    mesh = dist.init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])

    def placement(param: nn.Parameter) -> Shard | None:
        even = param.dim() > 1 and param.shape[1] % mesh_shape[-1] == 0
        is_projected_batch = tuple(param.shape) == (3, 12, 5)
        return Shard(dim) if dim and even and not is_projected_batch else Shard(0)

    net = make_net()
    for layer in (net.up, net.down, net.square, net):
        fully_shard(layer, mesh=mesh, shard_placement_fn=placement)
    return net


def whole_weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().full_tensor() for name, param in net.named_parameters()}


def fsdp_case(
    kind: str, dim: int = 0, mesh_shape: tuple[int, ...] = (), in_backward: bool = False
) -> dict[str, Tensor]:
    net = sharded_net(dim, mesh_shape)
    optimizer = Apollo(groups_of(net), **options_of(kind))
    if in_backward:
        handle = step_in_backward(optimizer, net)
        for step in range(STEPS):
            loss_of(net, step, my_rows()).backward()
            handle.finish_step()
    else:
        net_steps(net, optimizer, range(STEPS), my_rows())
    return whole_weights(net)


WRAPPERS: dict[tuple[str, int], tuple[Callable[..., dict], dict[str, Any]]] = {
    ("DDP", 2): (ddp_case, {}),
    ("ZeroRedundancyOptimizer", 3): (zero_redundancy_case, {}),
    ("FSDP2", 2): (fsdp_case, {}),
    ("FSDP2", 3): (fsdp_case, {}),
    ("FSDP2 dim 1", 3): (fsdp_case, {"dim": 1}),
    ("FSDP2 in backward", 2): (fsdp_case, {"in_backward": True}),
    ("HSDP", 4): (fsdp_case, {"mesh_shape": (2, 2)}),
    ("HSDP of one shard", 2): (fsdp_case, {"mesh_shape": (2, 1)}),
}
"""And in how many processes."""


# -- torch's distributed checkpoints ------------------------------------------------------------------------


def checkpoint_case(
    kind: str, folder: str, first: int, last: int, embeddings: str = "low_rank"
) -> dict[str, Any]:
    """Steps from a checkpoint, if it is not the first, and a checkpoint after them."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    net = sharded_net()
    optimizer = Apollo(groups_of(net, embeddings), **options_of(kind))
    if first:
        with torch.no_grad():
            for param in net.parameters():
                param.zero_()
        saved = {"model": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, optimizer)}
        dcp.load(saved, checkpoint_id=f"{folder}/{first}")
        set_model_state_dict(net, saved["model"])
        set_optimizer_state_dict(net, optimizer, saved["optimizer"])
    net_steps(net, optimizer, range(first, last), my_rows())
    saved = {"model": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, optimizer)}
    dcp.save(saved, checkpoint_id=f"{folder}/{last}")
    return whole_weights(net)


def full_state_case(kind: str) -> dict[str, Any]:
    """States gathered whole on one process, and cut again."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    net = sharded_net()
    optimizer = Apollo(groups_of(net), **options_of(kind))
    net_steps(net, optimizer, range(3), my_rows())
    options = StateDictOptions(full_state_dict=True)
    saved = get_optimizer_state_dict(net, optimizer, options=options)
    moments = {name: state["exp_avg"] for name, state in saved["state"].items()}
    optimizer.zero_grad()  # torch makes states for what is loaded only where there is no gradient
    optimizer = Apollo(groups_of(net), **options_of(kind))
    set_optimizer_state_dict(net, optimizer, saved, options=options)
    net_steps(net, optimizer, range(3, STEPS), my_rows())
    return {"weights": whole_weights(net), "moments": moments}


def rules_case() -> dict[str, Any]:
    """The rules of embeddings, on shards."""
    found: dict[str, Any] = {}
    for rule in ("adamw", "adamw_8bit", "factored"):
        net = sharded_net()
        groups = parameter_groups(net, embeddings=rule)
        optimizer = Apollo(groups, lr=0.01, rank=3)
        try:
            net_steps(net, optimizer, range(4), my_rows())
        except ValueError as error:
            found[rule] = str(error)
            continue
        local = net.table.weight.to_local()
        found[f"{rule} state"] = sum(
            value.nbytes for key, value in local_state(optimizer, net.table.weight).items() if key != "step"
        )
        found[f"{rule} elements"] = local.numel()
        found[rule] = whole_weights(net)["table.weight"]
    return found


def local_state(optimizer: Apollo, param: Tensor) -> dict[str, Tensor]:
    return {
        key: value.to_local() if hasattr(value, "to_local") else value
        for key, value in optimizer.state.get(param, {}).items()
    }


def refused_case() -> list[str]:
    """Why some placements are not taken."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    line = dist.init_device_mesh("cpu", (2,))
    grid = dist.init_device_mesh("cpu", (2, 1))
    weight = torch.randn(6, 8, dtype=torch.float64)
    batch = torch.randn(2, 6, 8, dtype=torch.float64)
    partial_sum = DTensor.from_local(weight, line, [Partial()])
    cases: dict[str, tuple[Tensor, Tensor]] = {
        "two dimensions": (distribute_tensor(weight, grid, [Shard(0), Shard(1)]),) * 2,
        "not reduced": (distribute_tensor(weight, line, [Replicate()]), partial_sum),
        "not a DTensor": (distribute_tensor(weight, line, [Shard(0)]), weight[:3]),
        "within matrices": (distribute_tensor(batch, line, [Shard(1)]),) * 2,
    }
    reasons = []
    for value, grad in cases.values():
        param = nn.Parameter(value.detach().clone())
        optimizer = Apollo([("w", param)], rank=2)
        try:
            if isinstance(grad, DTensor):
                param.grad = grad
                optimizer.step()
            else:
                reasons.append("is not sharded as the weight is")  # torch itself takes no such gradient
        except ValueError as error:
            reasons.append(str(error))
    return reasons


# -- all of it ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, list[Any]]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    results = {}
    for size in SIZES:
        cases: dict[str, Case] = {}
        for kind in KINDS:
            for (name, there), (case, kwargs) in WRAPPERS.items():
                if there == size:
                    cases[f"{name} {kind}"] = case, {"kind": kind, **kwargs}
            steps = {"first": 2 * SIZES.index(size), "last": 2 * SIZES.index(size) + 2}
            for rule in ("low_rank", "adamw_8bit"):
                cases[f"checkpoint {rule} {kind}"] = (
                    checkpoint_case,
                    {"kind": kind, "folder": str(folder / rule / kind), "embeddings": rule, **steps},
                )
            if size == 3:
                cases[f"full state {kind}"] = full_state_case, {"kind": kind}
        if size == 2:
            cases |= {"rules": (rules_case, {}), "refused": (refused_case, {})}
        results[size] = run_cases(size, cases)
    return results


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "size"), WRAPPERS)
def test_wrapped_models(found: dict, size: int, name: str, kind: str) -> None:
    wanted, start = net_on_one(kind), dict(make_net().named_parameters())
    assert all((wanted[name] - start[name]).abs().max() > 1e-3 for name in wanted), "every weight moves"
    for rank in found[size][f"{name} {kind}"]:
        assert_near(rank, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_in_backward_on_one_process(kind: str) -> None:
    net = make_net()
    handle = step_in_backward(Apollo(groups_of(net), **options_of(kind)), net)
    for step in range(STEPS):
        loss_of(net, step).backward()
        handle.finish_step()
    assert_near({name: param.detach() for name, param in net.named_parameters()}, net_on_one(kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_torchs_checkpoints_go_on_with_other_numbers_of_ranks(found: dict, size: int, kind: str) -> None:
    """Two steps on two ranks, two on three, two on four; the projection changes after each second."""
    wanted = net_on_one(kind, 2 * SIZES.index(size) + 2)
    for rank in found[size][f"checkpoint low_rank {kind}"]:
        assert_near(rank, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_moments_of_8_bits_go_on_too(found: dict, size: int, kind: str) -> None:
    """Up to their rounding, which is by blocks of each shard."""
    start = make_net().table.weight.detach()
    wanted = net_on_one(kind, 2 * SIZES.index(size) + 2, "adamw")["table.weight"]
    for rank in found[size][f"checkpoint adamw_8bit {kind}"]:
        assert (rank["table.weight"] - wanted).norm() < 0.1 * (wanted - start).norm()


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_gathered_whole_and_cut_again(found: dict, kind: str) -> None:
    net = make_net()
    optimizer = Apollo(groups_of(net), **options_of(kind))
    net_steps(net, optimizer, range(3))
    moments = {name: optimizer.state[param]["exp_avg"] for name, param in net.named_parameters()}
    for rank in found[3][f"full state {kind}"]:
        assert_near(rank["weights"], net_on_one(kind))
        assert_near(rank["moments"], moments)


def test_rules_of_embeddings_on_shards(found: dict) -> None:
    for rank in found[2]["rules"]:
        assert "rule 'factored' of table.weight" in rank["factored"]
        assert "use 'adamw_8bit' or 'low_rank'" in rank["factored"]
        start = make_net().table.weight.detach()
        moved = (rank["adamw"] - start).norm()
        assert (rank["adamw_8bit"] - rank["adamw"]).norm() < 0.1 * moved
        elements = rank["adamw_8bit elements"]
        assert rank["adamw state"] == 2 * 8 * elements
        assert rank["adamw_8bit state"] == 2 * elements + 2 * 4 * -(-elements // 256)


def test_placements_that_are_refused(found: dict) -> None:
    for reasons in found[2]["refused"]:
        assert [
            word in reason
            for word, reason in zip(
                (
                    "Shard it over one dimension of the mesh",
                    "is not sharded as the weight is",
                    "is not sharded as the weight is",
                    "Apollo takes batches of matrices sharded along dimension 0 alone",
                ),
                reasons,
                strict=True,
            )
        ] == [True] * 4
