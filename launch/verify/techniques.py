"""Each technique alone, on one process, in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

from ...distributed.apply_ulysses import apply_ulysses
from ...distributed.engine import LocalEngine
from ...distributed.groups import ProcessGroups
from ...mst.apply import apply_mini_sequence
from ...mst.layer_memory import SavedAttention
from ...mst.placement import Placement, spread_inputs
from ...mst.segments import fewest_waiting
from .batches import TILE, Sample, num_labels
from .bench import DEEP_LAYERS, Bench
from .compare import EXACT, NEAR, Row, compare, tried
from .steps import engine_step, logits_step, loss_step, packed_step
from .truth import plain_step

ONE = ProcessGroups()
TILES = "mini-sequence MLPs"
STREAMED = "streamed layers"
PACKED = "packed documents"
ACCUMULATED = "gradient accumulation"


def head_name(loss: str) -> str:
    """Of the LM head's technique."""
    return {"cce": "LM head (cut cross-entropy)", "mini_sequence": "LM head (mini-sequences)"}.get(
        loss, "LM head (logits)"
    )


def techniques(bench: Bench) -> Iterator[Row]:
    """Rows of all that the config uses on one process, one technique at a time."""
    sequence = bench.config.sequence
    yield _truth_is_the_model(bench)
    if sequence.mini_sequence:
        yield from tiled_mlps(bench)
    if bench.may_stream:
        yield from streamed_layers(bench)
        yield from rebuilt_layers(bench)
    if sequence.loss != "logits":
        yield from lm_head(bench)
    yield from packed_documents(bench)
    yield from accumulation(bench)


def _truth_is_the_model(bench: Bench) -> Row:
    """What is called the truth is transformers' model, which rounds norms and softmax to float32."""
    samples = [bench.samples[0]]

    def run() -> Row:
        step = plain_step(bench.base, bench.batches(samples))
        return compare("float64 truth", samples[0].name, step, bench.truth(samples), tolerance=NEAR)

    return tried("float64 truth", samples[0].name, run)


def _single_documents(bench: Bench) -> list[Sample]:
    return [*(sample for sample in bench.samples if not sample.is_packed), bench.rows]


def tiled_mlps(bench: Bench) -> Iterator[Row]:
    """MLPs by tiles, everything else as transformers has it."""
    for sample in _single_documents(bench):

        def run(sample: Sample = sample) -> Row:
            model = bench.fresh()
            apply_mini_sequence(model, tile_tokens=TILE, checkpoints="none", loss="logits")
            return compare(TILES, sample.name, logits_step(model, sample.batch), bench.truth([sample]))

        yield tried(TILES, sample.name, run)


def streamed_layers(bench: Bench) -> Iterator[Row]:
    """Layers that keep their input alone, in every way that the config may come to run them in."""
    for said, options in stream_variants(bench):
        for sample in _single_documents(bench):
            case = f"{sample.name}; {said}"

            def run(sample: Sample = sample, options: dict[str, Any] = options, case: str = case) -> Row:
                model = bench.fresh()
                apply_mini_sequence(model, loss="logits", **options)
                return compare(STREAMED, case, logits_step(model, sample.batch), bench.truth([sample]))

            yield tried(STREAMED, case, run)


def rebuilt_layers(bench: Bench) -> Iterator[Row]:
    """As few inputs kept as `auto` may take: the others are rebuilt in segments of rising length."""
    if bench.config.sequence.checkpoints != "auto":
        return
    room, sample = fewest_waiting(DEEP_LAYERS), _single_documents(bench)[0]
    _, options = stream_variants(bench)[0]
    for where, placement in (
        ("on the GPU", spread_inputs(DEEP_LAYERS, room, 0)),
        ("in host memory", spread_inputs(DEEP_LAYERS, 0, room)),
    ):
        rebuilt = placement.count("rebuild", DEEP_LAYERS)
        case = f"{sample.name}; of {DEEP_LAYERS} layers {rebuilt} rebuilt, inputs {where}"

        def run(placement: Placement = placement, case: str = case) -> Row:
            truth, model = plain_step(bench.deep, [sample.batch]), copy.deepcopy(bench.deep)
            apply_mini_sequence(model, loss="logits", **options | {"checkpoints": placement})
            return compare(STREAMED, case, logits_step(model, sample.batch), truth)

        yield tried(STREAMED, case, run)


def stream_variants(bench: Bench) -> list[tuple[str, dict[str, Any]]]:
    """What is said of a way to stream, and its options: the config's own, and what `auto` may choose."""
    sequence = bench.config.sequence
    keys = bench.architecture.num_key_value_heads
    placements: dict[str, Any] = {
        "inputs on the GPU": "gpu",
        "inputs in host memory": "host",
        "every other layer rebuilt": Placement(gpu_layers=0, every=2, host=False),
    }
    if sequence.checkpoints != "auto":
        every, host = sequence.checkpoint_every, sequence.checkpoints == "host"
        own = sequence.checkpoints if every == 1 else Placement(gpu_layers=int(host), every=every, host=host)
        placements = {f"checkpoints={sequence.checkpoints}, every={every}": own}
    groups = [bench.head_groups]
    if sequence.head_groups == "auto":
        groups = sorted({1, 2 if keys % 2 == 0 else 1, keys})
    saved: list[Any] = [sequence.save_attention]
    if sequence.save_attention == "none":
        saved = [False]
    elif sequence.save_attention == "auto":
        # The last is of one layer on the GPU and of the others in host memory.
        saved = ["gpu", "host", "all", SavedAttention(1, host=True, everything=True)]
    tile = TILE if sequence.mini_sequence else None
    first = {"tile_tokens": tile, "checkpoints": next(iter(placements.values()))}
    variants = [
        (said, {**first, "checkpoints": placement, "head_groups": groups[-1], "save_attention": saved[0]})
        for said, placement in placements.items()
    ]
    variants += [
        (f"head_groups={count}", {**first, "head_groups": count, "save_attention": saved[0]})
        for count in groups[:-1]
    ]
    variants += [
        (f"save_attention={_said(where)}", {**first, "head_groups": groups[0], "save_attention": where})
        for where in saved[1:]
    ]
    return variants


def _said(saved: Any) -> str:
    return "all, then host" if isinstance(saved, SavedAttention) else str(saved)


def lm_head(bench: Bench) -> Iterator[Row]:
    """The loss without the logits: with the config's memory and with so little that it takes chunks."""
    loss, own = bench.config.sequence.loss, bench.config.sequence.loss_memory_mib
    name = head_name(loss)
    for sample in (*_single_documents(bench), bench.long):
        for memory_mib in sorted({own or 0, 1} if sample is bench.long else {own or 0}):
            for num_items in (None, 1000):
                case = f"{sample.name}; loss_memory_mib={memory_mib or None}"
                case += "" if num_items is None else f", sum over {num_items}"

                def run(
                    sample: Sample = sample,
                    memory_mib: int = memory_mib,
                    num_items: int | None = num_items,
                    case: str = case,
                ) -> Row:
                    model = bench.fresh()
                    apply_mini_sequence(
                        model,
                        tile_tokens=None,
                        checkpoints="none",
                        loss=loss,
                        loss_memory_mib=memory_mib or None,
                    )
                    step = loss_step(model, sample.batch, num_items=num_items)
                    truth = bench.truth([sample])
                    if num_items is not None:
                        truth = truth.scaled(max(1, num_labels([sample.batch])) / num_items)
                    return compare(name, case, step, truth)

                yield tried(name, case, run)


def packed_documents(bench: Bench) -> Iterator[Row]:
    """Several documents in one row, against each of them alone."""
    for sample in bench.samples:

        def run(sample: Sample = sample) -> Row:
            model = bench.fresh()
            apply_ulysses(model, ONE)
            return compare(PACKED, sample.name, packed_step(model, sample.batch, ONE), bench.truth([sample]))

        yield tried(PACKED, sample.name, run)


def accumulation(bench: Bench) -> Iterator[Row]:
    """Micro-batches of unequal token counts, one of them without any, as one step."""
    loss = bench.config.sequence.loss
    tolerance = NEAR if loss == "logits" else EXACT
    for samples in (bench.samples[:1], bench.samples):
        case = (
            f"{len(samples)} micro-batches of unequal token counts" if len(samples) > 1 else "1 micro-batch"
        )

        def run(samples: list[Sample] = samples, case: str = case) -> Row:
            model = bench.fresh()
            apply_ulysses(model, ONE)
            apply_mini_sequence(model, tile_tokens=None, checkpoints="none", loss=loss)
            engine = LocalEngine(
                model, torch.optim.SGD(model.parameters(), lr=1.0), ONE, accumulation_steps=len(samples)
            )
            step, _ = engine_step(engine, ONE, bench.batches(samples), lr=1.0)
            return compare(ACCUMULATED, case, step, bench.truth(samples), tolerance=tolerance)

        yield tried(ACCUMULATED, case, run)
