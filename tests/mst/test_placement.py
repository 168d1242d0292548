"""Where checkpoints wait: every layer has a place, what is chosen fits, and no smaller step would."""

from __future__ import annotations

from pathlib import Path

import pytest

from longseq.mst import placement
from longseq.mst.placement import (
    Placement,
    available_host_bytes,
    choose_placement,
    parse_placement,
    spread_inputs,
)

GIB = 2**30


@pytest.mark.parametrize("every", [1, 2, 3, 5])
@pytest.mark.parametrize("gpu_layers", [0, 1, 3, 99])
@pytest.mark.parametrize("num_layers", [1, 2, 7])
def test_every_layer_has_its_place(every: int, gpu_layers: int, num_layers: int) -> None:
    placed = Placement(gpu_layers, every)
    for index in range(num_layers):
        last = index >= num_layers - gpu_layers
        wanted = "rebuild" if index % every else "gpu" if last else "host"
        assert placed.where(index, num_layers) == wanted
        assert Placement(gpu_layers, every, host=False).where(index, num_layers) in ("gpu", "rebuild")
    assert placed.where(0, num_layers) != "rebuild"


@pytest.mark.parametrize("index", [-1, 4])
def test_a_layer_that_is_not_there(index: int) -> None:
    with pytest.raises(ValueError, match=f"layer_index={index} is none of 0 to 3"):
        Placement().where(index, 4)


@pytest.mark.parametrize("wrong", [{"gpu_layers": -1}, {"every": 0}, {"every": 2.0}, {"gpu_layers": True}])
def test_a_placement_that_cannot_be(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Placement(**wrong)
    with pytest.raises(ValueError, match="host=1"):
        Placement(host=1)


@pytest.mark.parametrize("kept", [(), (1, 2), (0, 2, 2), (0, 3, 1), [0, 2], (0, 1.0), (0, True), (-1, 0), 3])
def test_layers_that_cannot_be_kept(kept: object) -> None:
    with pytest.raises(ValueError, match=r"kept=.* must be a tuple of layers that rises from 0.*kept_layers"):
        Placement(kept=kept)
    with pytest.raises(ValueError, match="takes the place of every=2; leave that at 1"):
        Placement(every=2, kept=(0, 3))


def test_layers_that_a_model_does_not_have() -> None:
    placed = Placement(kept=(0, 4))
    with pytest.raises(ValueError, match=r"names layer 4, and the model has 4, from 0 to 3; kept_layers\(4"):
        placed.count("host", 4)
    assert placed.all_places(5) == ("host", "rebuild", "rebuild", "rebuild", "gpu")
    assert placed.rebuilds
    assert Placement(every=2).rebuilds
    assert not Placement().rebuilds


def test_where_rebuilt_inputs_wait() -> None:
    """Of layers 0 to 3 that of 1 has the room that 4 left; 2 finds none; 3 is used at once."""
    placed = Placement(1, every=4)
    assert placed.all_places(9) == ("host", *3 * ["rebuild"], "host", *3 * ["rebuild"], "gpu")
    assert placed.waits(9) == ("host", "host", "gpu", "gpu", "host", "gpu", "gpu", "gpu", "gpu")
    assert placed.rebuilt_beside(9) == (0, 0, 0, 1, 0, 0, 1, 2, 0)
    assert Placement(0, every=4, host=False).rebuilt_beside(9) == (0, 0, 1, 2, 0, 0, 1, 2, 0)


def test_inputs_that_are_gone_from_the_gpu() -> None:
    assert [Placement(2).freed_inputs(index, 4) for index in range(4)] == [2, 2, 1, 0]
    # What is rebuilt takes the room again: where segments rise, nearly all of it.
    even, rising = Placement(0, every=2, host=False), spread_inputs(10, 3, 0)
    assert [even.freed_inputs(index, 6) for index in range(6)] == [2, 2, 1, 1, 0, 0]
    assert [rising.freed_inputs(index, 10) for index in range(10)] == [3, 3, 2, 1, 2, 2, 1, 1, 1, 0]


@pytest.mark.parametrize("num_layers", [1, 2, 5, 32])
@pytest.mark.parametrize("gpu", [0, 1, 2, 3, 7, 31, 32])
@pytest.mark.parametrize("host", [0, 1, 4, 16, 40])
@pytest.mark.parametrize("attention", [0, 1])
def test_what_is_chosen_fits_and_rebuilds_least(num_layers: int, gpu: int, host: int, attention: int) -> None:
    layer = 10 + 11 * attention

    def fits(placed: Placement) -> bool:
        """On the GPU with the input of the layer at work, as it is kept there or has come there."""
        places, beside = placed.all_places(num_layers), placed.rebuilt_beside(num_layers)
        on_gpu = [
            places[: index + 1].count("gpu") + beside[index] + (places[index] != "gpu")
            for index in range(num_layers)
        ]
        return max(on_gpu) <= gpu and places.count("host") <= host

    possible = [Placement(n, every) for every in range(1, num_layers + 1) for n in range(num_layers + 1)]
    possible += [Placement(every=every, host=False) for every in range(1, num_layers + 1)]
    possible += [
        spread_inputs(num_layers, n, count - n)
        for count in range(num_layers)
        for n in range(count + 1)
        if count * (count + 3) // 2 >= num_layers - 1
    ]
    possible = [placed for placed in possible if fits(placed)]
    free = gpu * layer, host * layer
    if not possible:
        with pytest.raises(ValueError, match="fewer tokens a GPU"):
            choose_placement(num_layers, 10, *free, attention_bytes_per_layer=11 * attention)
        return
    ours = choose_placement(num_layers, 10, *free, attention_bytes_per_layer=11 * attention)
    assert fits(ours)
    rebuilt = [placed.count("rebuild", num_layers) for placed in possible]
    assert ours.count("rebuild", num_layers) == min(rebuilt)
    copied = [
        placed.count("host", num_layers)
        for placed, count in zip(possible, rebuilt, strict=True)
        if count == min(rebuilt)
    ]
    assert ours.count("host", num_layers) == min(copied)
    assert ours.where(num_layers - 1, num_layers) == "gpu"
    assert ours.host == (min(copied) > 0)


def test_an_error_names_every_number() -> None:
    with pytest.raises(
        ValueError, match=r"32 layers, 3\.00 GiB each .* 2\.00 GiB of GPU memory and 1\.00 GiB"
    ):
        choose_placement(32, 2 * GIB, 2 * GIB, GIB, attention_bytes_per_layer=GIB)


def test_layers_without_tokens_stay_where_they_are() -> None:
    assert choose_placement(4, 0, 0, 0).count("gpu", 4) == 4


@pytest.mark.parametrize("wrong", [(0, 1), (1, -1), (True, 1)])
def test_numbers_that_cannot_be(wrong: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"num_layers|bytes_per_layer"):
        choose_placement(*wrong, 10, 10)


def test_what_users_write() -> None:
    own = Placement(3, 2)
    assert parse_placement(own) is own
    assert parse_placement("auto") == "auto"
    assert parse_placement("none") is None
    assert parse_placement("gpu").count("gpu", 8) == 8
    assert [parse_placement("host").where(index, 3) for index in range(3)] == ["host", "host", "gpu"]


@pytest.mark.parametrize("wrong", ["", "cpu", "GPU", None, 3, False])
def test_what_users_may_not_write(wrong: object) -> None:
    with pytest.raises(ValueError, match=r'must be "auto", "none", "gpu", "host" or a Placement'):
        parse_placement(wrong)


class _Memory:
    available = 100 * GIB


def test_a_rank_has_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement.psutil, "virtual_memory", _Memory)
    monkeypatch.setattr(placement, "_cgroup_free", lambda *_: [])
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert available_host_bytes(0.5) == 50 * GIB
    monkeypatch.setenv("LOCAL_SIZE", "4")  # as DeepSpeed's launcher says it
    assert available_host_bytes(1.0) == 25 * GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert available_host_bytes(1.0) == 100 * GIB // 8
    monkeypatch.setattr(placement, "_cgroup_free", lambda *_: [8 * GIB, 16 * GIB])
    assert available_host_bytes(0.5) == GIB // 2
    monkeypatch.setattr(placement, "_cgroup_free", lambda *_: [-GIB])
    assert available_host_bytes() == 0
    for share in (0, 1.1, -1):
        with pytest.raises(ValueError, match="share"):
            available_host_bytes(share)


def _group(folder: Path, files: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")


def test_limits_of_nested_groups_version_2(tmp_path: Path) -> None:
    membership, mount = tmp_path / "cgroup", tmp_path / "fs"
    membership.write_text("0::/jobs/one\n")
    _group(mount / "jobs/one", {"memory.max": "max", "memory.current": 5})
    stat = "anon 1\ninactive_file 10\nactive_file 7"
    _group(mount / "jobs", {"memory.max": 1000, "memory.current": 400, "memory.stat": stat})
    assert placement._cgroup_free(membership, mount) == [610]
    # In a container, whose path is the host's, the mount itself is the group.
    membership.write_text("0::/not/here\n")
    _group(mount, {"memory.max": 70, "memory.current": 30})
    assert placement._cgroup_free(membership, mount) == [40]


def test_limits_of_groups_version_1(tmp_path: Path) -> None:
    membership, mount = tmp_path / "cgroup", tmp_path / "fs"
    membership.write_text("9:name=systemd:/\n5:cpu,memory:/job\n1:cpuset:/\n0::/\n")
    files = {"memory.limit_in_bytes": 900, "memory.usage_in_bytes": 300}
    _group(mount / "memory/job", {**files, "memory.stat": "inactive_file 1\ntotal_inactive_file 100"})
    _group(mount / "memory", {**files, "memory.limit_in_bytes": 2**63 - 4096})
    assert placement._cgroup_free(membership, mount) == [700, 2**63 - 4096 - 300]


def test_no_groups_at_all(tmp_path: Path) -> None:
    assert placement._cgroup_free(tmp_path / "none", tmp_path) == []
    assert placement.free_host_bytes() > 0
