"""One process of one setting of `plan.py`: the run's own set-up and steps, and what they take."""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import plan_settings
import psutil
import report
import torch
import torch.distributed as dist
from sequence_parallel_comm import Kernel, profiled, times

from longseq.distributed.groups import ProcessGroups
from longseq.distributed.loss import count_tokens, global_token_loss
from longseq.distributed.sequence import shard_batch
from longseq.launch.config import RunConfig
from longseq.launch.config_file import check_world, load_config
from longseq.launch.data.dataset import micro_batches
from longseq.launch.evaluation import summed_nll
from longseq.launch.processes import join, leave, set_up_logging
from longseq.launch.setup import RunParts, set_up
from longseq.mst import pinned_memory

PHASES = ("forward", "backward", "optimizer")


class Watch:
    """What happens at the ends of a step's phases."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.splits_peaks = False
        self.peaks: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._marks: list[tuple[str, Any]] = []

    def begin(self) -> None:
        """Of a step."""
        self._marks = []
        self.mark("")
        if self.splits_peaks:
            self.peaks = {}

    def mark(self, phase: str) -> None:
        """The end of a phase; a step that is timed gets no more than an event of it."""
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))
        if self.splits_peaks and self.on_gpu:
            self.peaks[phase] = max(self.peaks.get(phase, 0), torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()

    def end(self) -> None:
        """Of a step, when the GPU has done it."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        for (_, began), (phase, ended) in zip(self._marks, self._marks[1:], strict=False):
            self.seconds[phase] += began.elapsed_time(ended) / 1e3 if self.on_gpu else ended - began


class Measurement:
    """A setting on this rank."""

    def __init__(
        self, setting: plan_settings.Setting, config: RunConfig, groups: ProcessGroups, device: torch.device
    ) -> None:
        self.config, self.groups, self.device = config, groups, device
        self.document_tokens = setting.document_tokens or config.sequence.length
        self.watch = Watch(device)
        self.row: dict[str, Any] = {}
        self.parts: RunParts | None = None
        self._step_number = 0

    def set_up(self) -> None:
        """The run's own."""
        started = time.perf_counter()
        plan = check_world(self.config, self.groups.world_size)
        self.parts = set_up(self.config, plan, self.groups, self.device)
        said = self.parts.plan
        if said is not None:
            self.row["said"] = {
                "knobs": asdict(said.knobs),
                "seconds": said.seconds.seconds,
                "peak_bytes": said.memory.peak_bytes,
                "fits": said.fits,
            }
        gc.collect()
        if self.watch.on_gpu:
            torch.cuda.synchronize()
            self.row["set_up_peak_bytes"] = self._most(torch.cuda.max_memory_allocated())
            self.row["after_set_up_bytes"] = self._most(torch.cuda.memory_allocated())
            torch.cuda.empty_cache()
        self.row["set_up_s"] = time.perf_counter() - started

    def step(self) -> float:
        """One optimizer step as training does it; seconds until the GPU is done."""
        parts, groups, watch = self.parts, self.groups, self.watch
        assert parts is not None
        engine, train = parts.engine, self.config.train
        wholes = list(
            micro_batches(
                parts.train_set,
                seed=train.seed,
                first_sequence=self._step_number * train.global_batch_sequences,
                global_batch=train.global_batch_sequences,
                micro_batch=train.micro_batch_sequences,
                dp_rank=groups.dp_rank,
                dp_size=groups.dp_size,
            )
        )
        for whole in wholes:
            lengths = whole["document_offsets"].diff().tolist()
            assert set(lengths) == {self.document_tokens}, f"documents of {lengths} tokens"
        self._step_number += 1
        if watch.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self._wait()
        started = time.perf_counter()
        watch.begin()
        batches = [shard_batch(whole, groups) for whole in wholes]
        num_tokens = count_tokens((batch["shift_labels"] for batch in batches), groups, self.device)
        lr = self.config.optimizer.lr
        engine.begin_step(lr)
        for batch in batches:
            nll = summed_nll(engine, batch, self.device)
            loss = global_token_loss(nll, num_tokens, reducer_divisor=engine.reducer_divisor)
            watch.mark("forward")
            engine.backward(loss)
            watch.mark("backward")
            total = float(groups.all_sum(nll.detach().double()) / num_tokens)  # the loop's wait for the loss
            norm = engine.step(lr)
            watch.mark("optimizer")
        self._wait()
        seconds = time.perf_counter() - started
        watch.end()
        self.row |= {"loss": total, "norm": norm}
        return self._slowest(seconds)

    def measure(self, steps: int, keep: Callable[[dict[str, Any]], None], profile: bool) -> None:
        """Warm up, time `steps`, and take one more apart; a single one has none after it.

        Args:
            steps: That are timed.
            keep: Is handed the row whenever it has something new.
            profile: The last step is profiled, too.
        """
        row = self.row
        self.watch.splits_peaks = steps == 1
        row["first_step_s"] = self.step()
        if steps == 1:
            self.keep_phase_peaks()
        if self.watch.on_gpu:
            peaks = (torch.cuda.max_memory_allocated(), *self.watch.peaks.values())
            row["first_step_peak_bytes"] = self._most(max(peaks))
        self.watch.splits_peaks = False
        keep(row)
        row["steps_s"], phases, peaks = [], [], [0]
        for _ in range(steps):
            row["steps_s"].append(self.step())
            phases.append(self.watch.seconds)
            row["seconds"] = statistics.median(row["steps_s"])
            row["tokens_per_second"] = self._tokens() / row["seconds"]
            row["phase_s"] = {name: statistics.median(one[name] for one in phases) for name in PHASES}
            if self.watch.on_gpu:
                peaks.append(torch.cuda.max_memory_allocated())
                row |= {"peak_bytes": self._most(max(peaks)), **self._held()}
            keep(row)
        if steps == 1:
            return
        self.watch.splits_peaks = True
        if profile and self.watch.on_gpu:
            if self.groups.is_main:
                kernels = profiled(self.step)
                row["profile"] = times(kernels) | {"kinds": by_kind(kernels)}
            else:
                self.step()
        else:
            self.step()
        self.keep_phase_peaks()
        keep(row)

    def keep_phase_peaks(self) -> None:
        """Of the step before."""
        found = {name: self._most(size) for name, size in self.watch.peaks.items() if name}
        self.row["phase_peak_bytes"] = found

    def _tokens(self) -> int:
        return self.config.sequence.length * self.config.train.global_batch_sequences

    def _held(self) -> dict[str, int]:
        """What the allocator and the device hold after a step, of the rank that holds most."""
        free, total = torch.cuda.mem_get_info()
        reserved = torch.cuda.memory_reserved()
        ours = sum(len(memory.blocks) * memory.block_bytes for memory in list(pinned_memory._memories))
        others = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
        return {
            "reserved_bytes": self._most(torch.cuda.max_memory_reserved()),
            "device_used_bytes": self._most(total - free),
            "outside_allocator_bytes": self._most(total - free - reserved),
            "host_pinned_bytes": self._most(ours + others),
            "host_resident_bytes": self._most(psutil.Process().memory_info().rss),
        }

    def _most(self, value: int) -> int:
        return round(self._over_ranks(float(value)))

    def _slowest(self, seconds: float) -> float:
        return self._over_ranks(seconds)

    def _over_ranks(self, value: float) -> float:
        if self.groups.world_size == 1:
            return value
        most = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return float(most)

    def _wait(self) -> None:
        if self.watch.on_gpu:
            torch.cuda.synchronize()
        self.groups.barrier()
        if self.watch.on_gpu:
            torch.cuda.synchronize()


KINDS = (
    ("attention forward", r"fprop|flash_fwd|flash::.*fwd|fmha.*fwd"),
    ("attention backward", r"bprop|flash_bwd|flash::.*bwd|fmha.*bwd"),
    ("products", r"nvjet|gemm|cutlass|splitK|cublas"),
    ("loss", r"_logits_kernel|_columns_product|_rows_product|softmax_gradient|_row_"),
    ("norm", r"norm"),
    ("rope", r"rotat|rope"),
    ("optimizer", r"adam|apollo|multi_tensor"),
    ("NCCL", r"^nccl"),
    ("to host", r"Memcpy DtoH"),
    ("from host", r"Memcpy HtoD"),
    ("copy", r"Memcpy|Memset|copy|CatArray"),
)


def by_kind(kernels: list[Kernel]) -> dict[str, Any]:
    """Seconds and calls by what kernels do, as far as their names say it; the rest by name."""
    found: dict[str, dict[str, Any]] = {}
    for kernel in kernels:
        kind = next((kind for kind, sign in KINDS if re.search(sign, kernel.name, re.I)), None)
        entry = found.setdefault(kind or f"other: {kernel.name[:150]}", {"s": 0.0, "calls": 0})
        entry["s"] += (kernel.end - kernel.start) / 1e6
        entry["calls"] += 1
    return dict(sorted(found.items(), key=lambda item: -item[1]["s"])[:40])


def documents(setting: plan_settings.Setting, config: RunConfig, path: Path) -> None:
    """A file of documents that fill whole sequences; one long one is cut into them."""
    if path.exists():
        return
    num_tokens = 8 * config.train.global_batch_sequences * config.sequence.length
    phrase = "the quick brown fox jumps over a lazy dog "
    each = setting.document_tokens or num_tokens
    # bos and eos are tokens of the document, too.
    text = json.dumps({"text": (phrase * (1 + each // len(phrase)))[: each - 2]})
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text((text + "\n") * (num_tokens // each))
    draft.replace(path)


def save_random(config: RunConfig, folder: Path, device: torch.device) -> None:
    """A checkpoint of random weights."""
    if (folder / "config.json").exists():
        return
    from longseq.launch.model import build_base_model

    of_nothing = config.model.model_copy(update={"name": None, "lora": None})
    model = build_base_model(of_nothing, device, torch.bfloat16)
    model.save_pretrained(folder)
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def configured(setting: plan_settings.Setting, work: Path) -> RunConfig:
    """The setting's config, and the file that it reads."""
    work.mkdir(parents=True, exist_ok=True)
    empty = work / "empty.yaml"
    if not empty.exists():
        empty.write_text("")
    data = work / f"{setting.name}.jsonl"
    config = load_config(str(empty), setting.keys(str(data), str(work)))
    documents(setting, config, data)
    return config


def write(path: Path, row: dict[str, Any]) -> None:
    """Whole or not at all."""
    draft = path.with_name(f".{path.name}.partial")
    draft.write_text(json.dumps(row, indent=1))
    os.replace(draft, path)


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("setting")
    options.add_argument("--out", type=Path, required=True, help="folder for SETTING.json")
    options.add_argument("--work", type=Path, required=True, help="folder for data and scratch")
    options.add_argument("--steps", type=int, default=2)
    options.add_argument("--profile", action="store_true")
    args = options.parse_args(arguments)
    (setting,) = plan_settings.named([args.setting])
    config = configured(setting, args.work)
    config, groups, device = join(config)
    set_up_logging(groups.is_main)
    facts = {
        "name": setting.name,
        "shape": setting.shape,
        "gpus": setting.gpus,
        "keys": list(setting.overrides),
        "tokens": config.sequence.length,
        "document_tokens": setting.document_tokens,
        "environment": report.environment(),
        "began": time.strftime("%Y-%m-%d %H:%M"),
    }
    if device.type == "cuda":
        facts["gpu_bytes"] = torch.cuda.mem_get_info()[1]
    path = args.out / f"{setting.name}.json"

    def keep(row: dict[str, Any]) -> None:
        if groups.is_main:
            write(path, facts | row)

    keep({"note": "did not finish"})
    measurement = Measurement(setting, config, groups, device)
    measurement.row["note"] = "did not finish"
    try:
        if setting.saved:
            groups.main_first(lambda: save_random(config, Path(config.model.name), device), "weights")
        measurement.set_up()
        keep(measurement.row)
        measurement.measure(setting.steps or args.steps, keep, args.profile)
    except torch.OutOfMemoryError as error:
        note = f"out of memory: {str(error).splitlines()[0]}"[:300]
        write(path, facts | measurement.row | {"note": note})
        print(f"rank {groups.rank}: {setting.name}: {note}", flush=True)
        os._exit(3)  # the others wait in a collective for this rank
    del measurement.row["note"]
    keep(measurement.row)
    leave()


if __name__ == "__main__":
    main()
