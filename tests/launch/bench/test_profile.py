"""A step's profile, on made-up kernels whose times are counted tick by tick."""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from longseq.launch.bench.gaps import END, START, Event
from longseq.launch.bench.kernel_kinds import ATTENTION, BESIDE, PRODUCTS, kind_of, order, short_name
from longseq.launch.bench.profile import SMALLEST_GAP, StepProfile, profile_step, taken_apart
from longseq.launch.bench.recording import Recording, between_marks, record

NAMES = (
    "nvjet_sm90_tst_192x192_64x4_1x2_h_bz_coopB_TNN",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_kernel0_0",
    "_rms_norm_kernel",
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*> >",
    "something_of_another_library",
    "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
    "Memcpy HtoD (Pinned -> Device)",
    "Memcpy DtoH (Device -> Pinned)",
)
CALLS = ("cudaMalloc", "cudaStreamSynchronize")
TICKS = 240


def made_up(seed: int) -> Recording:
    """Three streams, each in order, with equal times, nested spans, empty ones and some past the ends."""
    draw = random.Random(seed)
    events = []
    for _ in range(3):
        now = draw.randint(-5, 30)
        for _ in range(draw.choice((0, 3, 14))):
            end = now + draw.choice((0, 1, 3, 8, 30))
            events.append(Event(now, end, draw.choice(NAMES)))
            now = end + draw.choice((0, 0, 1, 5, 20))
    draw.shuffle(events)
    calls = [Event(start, start + draw.randint(0, 12), draw.choice(CALLS)) for start in range(0, TICKS, 9)]
    return Recording(events, calls, 0, TICKS)


def running(events: list[Event], tick: int) -> list[Event]:
    return [event for event in events if event.start <= tick < event.end]


class Counted(NamedTuple):
    """What a profile should say, in ticks."""

    busy: int
    took: Counter[str]
    exposed: Counter[str]
    gaps: dict[tuple[str, str], list[int]]  # the ticks of each


def counted(recording: Recording) -> Counted:
    busy, took, exposed = 0, Counter(), Counter()
    gaps: dict[tuple[str, str], list[int]] = {}
    computing = sorted(
        Event(max(event.start, 0), min(event.end, TICKS), short_name(event.name))
        for event in recording.on_gpu
        if kind_of(event.name) not in BESIDE and max(event.start, 0) < min(event.end, TICKS)
    )
    for tick in range(TICKS):
        kinds = {kind_of(event.name) for event in running(recording.on_gpu, tick)}
        busy += bool(kinds)
        took.update(kinds)
        if kinds:
            exposed[min(kinds, key=order)] += 1
        if not running(computing, tick):
            ended = [event for event in computing if event.end <= tick]
            last = max((event.end for event in ended), default=0)
            before = next((event.name for event in ended if event.end == last), START)
            after = next((event.name for event in computing if event.start > tick), END)
            gaps.setdefault((before, after), []).append(tick)
    return Counted(busy, took, exposed, gaps)


@pytest.mark.parametrize("seed", range(60))
def test_every_tick_is_counted_once(seed: int) -> None:
    recording = made_up(seed)
    profile, expected = taken_apart(recording), counted(recording)
    tick = 1e-9
    assert profile.wall_s == pytest.approx(TICKS * tick)
    assert profile.busy_s == pytest.approx(expected.busy * tick)
    assert profile.idle_s == pytest.approx((TICKS - expected.busy) * tick, abs=1e-15)
    for kind, found in profile.kinds.items():
        assert found.seconds == pytest.approx(expected.took[kind] * tick), kind
        assert found.exposed_s == pytest.approx(expected.exposed[kind] * tick), kind
    everything = sum(found.exposed_s for found in profile.kinds.values()) + profile.idle_s
    assert everything == pytest.approx(profile.wall_s)
    inside = sum(expected.exposed[kind] for kind in (*PRODUCTS, *ATTENTION))
    assert profile.beside_products_and_attention == pytest.approx(1 - inside / TICKS)


@pytest.mark.parametrize("seed", range(60))
def test_kernels_beside_the_work_are_counted_while_it_rests(seed: int) -> None:
    recording = made_up(seed)
    work = (*PRODUCTS, *ATTENTION)
    expected: Counter[str] = Counter()
    for tick in range(TICKS):
        found = running(recording.on_gpu, tick)
        if not any(kind_of(event.name) in work for event in found):
            expected.update({event.name for event in found})
    profile = taken_apart(recording)
    found = {kernel.name: round(kernel.seconds * 1e9) for kernel in profile.top_beside}
    assert {name: ticks for name, ticks in found.items() if ticks} == expected


@pytest.mark.parametrize("seed", range(60))
def test_gaps_are_the_ticks_without_computing(seed: int) -> None:
    recording = made_up(seed)
    expected = counted(recording).gaps
    found = {(gap.before, gap.after): gap for gap in taken_apart(recording).gaps}
    assert {key: gap.length for key, gap in found.items()} == {
        key: len(ticks) for key, ticks in expected.items()
    }
    for key, gap in found.items():
        ticks = expected[key]
        starts = [tick for tick in ticks if tick - 1 not in ticks]
        assert [start for start, _ in gap.spans] == starts
        assert gap.idle == sum(not running(recording.on_gpu, tick) for tick in ticks)
        for kind in BESIDE:
            ours = [event for event in recording.on_gpu if kind_of(event.name) == kind]
            assert gap.beside.get(kind, 0) == sum(bool(running(ours, tick)) for tick in ticks)
        for call in CALLS:
            ours = [event for event in recording.host_calls if event.name == call]
            assert gap.host.get(call, 0) == sum(bool(running(ours, tick)) for tick in ticks)


def layers(num_layers: int) -> Recording:
    """The same three kernels a layer, with a gap of 4 after the second and one of 1 after the third."""
    events = []
    for start in range(1000, 1000 + 100 * num_layers, 100):
        events += [
            Event(start, start + 50, NAMES[0]),
            Event(start + 50, start + 80, NAMES[1]),
            Event(start + 84, start + 99, NAMES[2]),
            Event(start + 81, start + 83, NAMES[5]),
        ]
    return Recording(events, [], 990, 1000 + 100 * num_layers + 5)


def test_the_same_gap_of_all_layers_is_one_row() -> None:
    profile = taken_apart(layers(32))
    worst, *others = profile.as_json()["gaps"]
    assert (worst["before"], worst["after"], worst["count"]) == (short_name(NAMES[1]), NAMES[2], 32)
    assert worst["s"] == pytest.approx(32 * 4e-9)
    assert worst["idle_s"] == pytest.approx(32 * 2e-9)
    assert worst["beside"] == {"NCCL": pytest.approx(32 * 2e-9)}
    assert worst["longest_s"] == pytest.approx(4e-9)
    assert [(gap["before"], gap["count"]) for gap in others] == [(NAMES[2], 31), (START, 1)]
    assert profile.before_first_s == pytest.approx(10e-9)
    assert profile.after_last_s == pytest.approx(6e-9)
    assert (profile.small_gaps, profile.small_gaps_s) == (1, pytest.approx(6e-9))  # 6 of 3215 at the end
    assert profile.small_gaps_s < SMALLEST_GAP * profile.wall_s


def test_a_profile_is_json_and_lines() -> None:
    profile = taken_apart(layers(4))
    values = json.loads(json.dumps(profile.as_json()))
    assert list(values["kinds"]) == ["products", "attention forward", "norm", "NCCL"]
    assert values["kinds"]["products"]["calls"] == 4
    shares = [kind["share"] for kind in values["kinds"].values()]
    assert sum(shares) + values["idle_s"] / values["wall_s"] == pytest.approx(1)
    assert values["top"][0] == {"kernel": NAMES[0], "s": pytest.approx(200e-9), "calls": 4}
    assert values["top_beside"][0] == {"kernel": NAMES[2], "s": pytest.approx(60e-9), "calls": 4}
    text = "\n".join(profile.table())
    assert re.search(r"while neither products .*\n.*\n_rms_norm_kernel +0\.0000 +14\.46% +4", text)
    beside = 1 - 4 * 80 / 415
    assert f"beside products and attention: {beside:.1%} of the step" in text
    assert re.search(r"attention forward +0\.0000 +0\.0000 +28\.92% +4", text)
    assert "idle 50%, NCCL 50%" in text


def test_a_step_without_kernels_is_one_gap() -> None:
    profile = taken_apart(Recording([], [Event(10, 40, "cudaMalloc")], 0, 100))
    (gap,) = profile.gaps
    assert (gap.before, gap.after, gap.length, gap.host) == (START, END, 100, {"cudaMalloc": 30})
    assert (profile.busy_s, profile.idle_s, profile.beside_products_and_attention) == (0, 100e-9, 1)
    assert profile.table()


def test_on_a_cpu_there_are_seconds_alone() -> None:
    calls = []
    profile = profile_step(lambda: calls.append(1), torch.device("cpu"))
    assert calls == [1]
    assert (profile.on_gpu, profile.kinds, profile.gaps, profile.idle_s) == (False, {}, (), 0.0)
    assert profile.as_json() == {"on_gpu": False, "wall_s": profile.wall_s}
    assert "no GPU" in profile.table()[0]
    assert StepProfile(on_gpu=True, wall_s=0.0).beside_products_and_attention == 0.0


class Seen:
    """An event as the profiler hands it out."""

    def __init__(
        self, start: int, end: int, name: str, *, gpu: int | None = 0, annotation: bool = False
    ) -> None:
        self.values = (start, end - start, name, gpu, annotation)

    def start_ns(self) -> int:
        return self.values[0]

    def duration_ns(self) -> int:
        return self.values[1]

    def name(self) -> str:
        return self.values[2]

    def device_index(self) -> int:
        return self.values[3] or 0

    def device_type(self) -> Any:
        types = torch.autograd.DeviceType
        return types.CPU if self.values[3] is None else types.CUDA

    def is_user_annotation(self) -> bool:
        return self.values[4]


def test_the_step_is_what_is_between_the_marks() -> None:
    seen = [
        Seen(900, 910, "mark"),
        Seen(200, 300, "copy", gpu=1),
        Seen(400, 950, "a label", annotation=True),
        Seen(400, 700, "nccl:all_gather"),
        Seen(450, 600, "gemm"),
        Seen(430, 440, "_rotate_kernel"),
        Seen(100, 110, "mark"),
        Seen(20, 60, "cudaLaunchKernel", gpu=None),
        Seen(120, 160, "cudaMalloc", gpu=None),
    ]
    recording = between_marks(seen, 0)
    assert recording.on_gpu == [Event(430, 440, "_rotate_kernel"), Event(450, 600, "gemm")]
    assert recording.host_calls == [Event(120, 160, "cudaMalloc")]
    assert (recording.start, recording.end) == (110, 900)
    with pytest.raises(RuntimeError, match="run without the profile"):
        between_marks(seen[1:4], 0)


def test_the_installed_profilers_events_can_be_read() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.ones(3).add_(1)
    events = profiler.profiler.kineto_results.events()
    assert events
    for event in events:
        assert isinstance(event.is_user_annotation(), bool)
        assert isinstance(event.device_index(), int)
        assert event.start_ns() > 0
        assert event.duration_ns() >= 0
    with pytest.raises(RuntimeError, match="saw no kernels"):
        between_marks(events, 0)


def test_a_moment_belongs_to_products_then_attention_then_computing_then_communication() -> None:
    names = (NAMES[0], NAMES[1], NAMES[2], NAMES[4], NAMES[5], NAMES[6])
    # Each runs a tick longer than the one before it, whose it all is but for that tick.
    events = [Event(0, 10 + place, name) for place, name in enumerate(names)]
    found = taken_apart(Recording(events, [], 0, 15)).kinds
    ticks = {kind: round(took.exposed_s * 1e9) for kind, took in found.items()}
    kinds = [kind_of(name) for name in names]
    assert ticks == dict(zip(kinds, (10, 1, 1, 1, 1, 1), strict=True))


def test_a_profiler_that_sees_nothing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    of_cpu = SimpleNamespace(CUDA=torch.profiler.ProfilerActivity.CPU)
    monkeypatch.setattr(torch.profiler, "ProfilerActivity", of_cpu)
    calls = []
    with pytest.raises(RuntimeError, match="saw no kernels"):
        record(lambda: calls.append(1), torch.device("cpu"))
    assert calls == [1]


@pytest.mark.gpu
def test_a_step_on_a_gpu_is_taken_apart() -> None:
    left = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    pinned = torch.empty(left.shape, dtype=left.dtype, pin_memory=True)

    def step() -> None:
        torch.mm(left, left)
        pinned.copy_(left, non_blocking=True)
        torch.cuda.synchronize()
        time.sleep(0.05)
        torch.mm(left, left)

    step()
    profile = profile_step(step, torch.device("cuda"))
    assert profile.kinds["products"].calls >= 2
    assert profile.kinds["to host"].calls == 1
    everything = sum(took.exposed_s for took in profile.kinds.values()) + profile.idle_s
    assert everything == pytest.approx(profile.wall_s)
    assert profile.gaps[0].longest >= 0.05e9
    assert 0.05 < profile.idle_s < profile.wall_s < 1.0
    assert profile.gaps[0].idle <= profile.idle_s * 1e9 + 1
    assert any("Synchronize" in call for call in profile.gaps[0].host)
