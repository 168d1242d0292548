"""`longseq doctor`: machines that lack something, each told by a line that says what to do."""

from __future__ import annotations

import io
import os
import socket
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from gloo import run_cases
from training_samples import packed_rows, tiny_llama

from longseq.distributed import ProcessGroups
from longseq.distributed.check import SequenceCheck, compare_with_one_rank
from longseq.distributed.exchange import Exchange
from longseq.launch.config import RunConfig
from longseq.launch.config_file import load_config, parse_config
from longseq.launch.doctor import command, gpu, hub, links, ping, sequence_parallel, versions
from longseq.launch.doctor.attention import Attention, Chosen, Problem, check_attention, read_attention
from longseq.launch.doctor.communication import check_ping
from longseq.launch.doctor.disk import Place, check_place, read_place
from longseq.launch.doctor.findings import Finding, show
from longseq.launch.doctor.gpu import Cuda, GpuFacts, check_cuda
from longseq.launch.doctor.hub import Repository, check_repository, read_repository
from longseq.launch.doctor.links import Links, check_links
from longseq.launch.doctor.ping import Ping, start_ping
from longseq.launch.doctor.sequence_parallel import Comparison, check_sequence_parallelism, report
from longseq.launch.doctor.system import System, check_system, read_system
from longseq.launch.doctor.versions import Versions, check_versions, read_versions
from longseq.launch.doctor.zero import DeepSpeed, check_deepspeed
from longseq.mst.families import FAMILIES

GIB = 2**30
H100 = GpuFacts("NVIDIA H100 80GB HBM3", (9, 0), 80 * GIB, 79 * GIB)
NODE = Cuda("580.65.06", "2.13.0+cu130", "13.0", architectures=("sm_80", "sm_90"), gpus=(H100, H100))
HOST = System(64 * GIB, 1000 * GIB, 900 * GIB, None, 96, 1 << 20, None, "", "/usr/bin/gcc", True, -5.0)


def verdicts(findings: list[Finding]) -> list[str]:
    """The verdict of each line, checked to be one line, with advice wherever it is not `ok`."""
    for finding in findings:
        assert "\n" not in finding.text
        assert finding.verdict == "ok" or finding.advice or "pip" in finding.what
    return [finding.verdict for finding in findings]


def only(findings: list[Finding], verdict: str) -> str:
    """The text of the only finding of a verdict."""
    [found] = [finding.text for finding in findings if finding.verdict == verdict]
    return found


# --- versions


def test_versions_come_from_the_packages_own_metadata() -> None:
    facts = read_versions()
    assert any(text.startswith("torch>=") for text in facts.requirements)
    assert verdicts(check_versions(facts)) == ["ok"]


@pytest.mark.parametrize(
    ("change", "verdict", "said"),
    [
        (
            {"installed": {"torch": "2.9.1"}},
            "error",
            "torch 2.9.1 is outside >=2.11. Run pip install 'torch>=2.11'",
        ),
        ({"installed": {"torch": None}}, "error", "torch is not installed"),
        ({"installed": {"torch": "2.12.0", "peft": "0.9"}}, "warning", "peft 0.9 is outside >=0.17"),
        ({"python": "3.9.2"}, "error", "Python 3.9.2 is outside >=3.10"),
        ({"requirements": None}, "warning", "longseq itself is not installed"),
    ],
)
def test_a_version_out_of_range_is_told(change: dict, verdict: str, said: str) -> None:
    good = Versions(
        "3.11.2",
        ">=3.10",
        ("torch>=2.11", "peft>=0.17; extra == 'peft'", "pytest>=99; extra == 'test'"),
        {"torch": "2.13.0+cu130", "pytest": "8"},
    )
    assert verdicts(check_versions(good)) == ["ok"]
    assert said in only(check_versions(replace(good, **change)), verdict)


def test_a_missing_longseq_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise versions.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(versions.metadata, "metadata", missing)
    assert read_versions().requirements is None


# --- driver, torch and GPUs


def test_a_good_node_has_a_line_for_the_driver_and_each_gpu() -> None:
    assert verdicts(check_cuda(NODE)) == ["ok", "ok", "ok"]


@pytest.mark.parametrize(
    ("change", "verdict", "said"),
    [
        ({"driver": None, "built_for": None, "gpus": ()}, "warning", "no NVIDIA driver"),
        (
            {"built_for": None, "torch": "2.13.0+cpu", "gpus": ()},
            "error",
            "built without CUDA. Run pip install",
        ),
        ({"visible": "", "gpus": ()}, "warning", "hides every GPU"),
        ({"driver": "550.54", "failure": "too old", "gpus": ()}, "error", "driver 550.54 is too old"),
        ({"failure": "unknown error", "gpus": ()}, "error", "sees no GPU: unknown error"),
        ({"hip": "6.4"}, "warning", "AMD"),
    ],
)
def test_a_driver_and_a_torch_that_do_not_fit(change: dict, verdict: str, said: str) -> None:
    assert said in only(check_cuda(replace(NODE, **change)), verdict)


def test_pip_is_given_a_torch_that_the_driver_runs() -> None:
    for driver, index in (("580.1", "cu130"), ("535.104.05", "cu126")):
        [found] = check_cuda(Cuda(driver, "2.13.0+cpu", None))
        assert found.advice.endswith(f"--index-url https://download.pytorch.org/whl/{index}.")


@pytest.mark.parametrize(
    ("change", "verdict", "said"),
    [
        ({"capability": (7, 5)}, "warning", "no bf16. The attention kernels"),
        ({"capability": (12, 0)}, "error", "has no code for it (sm_80, sm_90)"),
        (
            {"free_bytes": 30 * GIB, "others": ("process 77 (python) 49.0 GiB",)},
            "warning",
            "50.0 GiB of 80.0 GiB are taken by others (process 77 (python) 49.0 GiB)",
        ),
        ({"free_bytes": 30 * GIB}, "warning", "another container, or a dead process"),
        ({"slowed": True}, "warning", "slowed down by heat"),
        ({"name": "NVIDIA H100 PCIe"}, "warning", "the GPUs are not alike"),
    ],
)
def test_a_gpu_that_has_something(change: dict, verdict: str, said: str) -> None:
    node = replace(NODE, gpus=(replace(H100, **change), H100), architectures=("sm_75", "sm_80", "sm_90"))
    if "capability" in change:
        node = replace(node, gpus=node.gpus[:1])
    if change.get("capability") == (12, 0):
        node = replace(node, architectures=("sm_80", "sm_90"))
    assert said in only(check_cuda(node), verdict)


def test_code_for_a_gpu_is_of_its_generation_or_translated() -> None:
    has = gpu._has_code_for
    assert has((8, 9), ("sm_80",))
    assert not has((8, 0), ("sm_86",))
    assert not has((10, 0), ("sm_90a",))
    assert has((10, 0), ("sm_90", "compute_90"))
    assert has((12, 0), ("sm_120",))


def test_what_slows_a_gpu_is_read_from_old_and_new_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "GPU-ab, Not Active, Active\nGPU-cd, Not Active, Not Active\n"
    for known in ("clocks_event_reasons", "clocks_throttle_reasons"):
        monkeypatch.setattr(
            gpu, "nvidia_smi", lambda asked, *_, known=known: said if known in asked else None
        )
        assert gpu._slowed() == {"ab"}
    monkeypatch.setattr(gpu, "nvidia_smi", lambda *_: None)
    assert gpu._slowed() == set()


def test_who_takes_a_gpu_is_read_from_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    said = f"GPU-ab, {os.getpid()}, python, 500\nGPU-ab, 77, /usr/bin/python3, 2048\nGPU-cd, 78, x, [N/A]\n"
    monkeypatch.setattr(gpu, "nvidia_smi", lambda *words: said)
    found = gpu._processes()
    assert found == {
        "ab": ["process 77 (python3) 2.0 GiB"],
        "cd": ["process 78 (x) unknown memory"],
    }


# --- links between GPUs


PAIRS = [(0, 1), (0, 2), (1, 2)]
LINKED = Links(dict.fromkeys(PAIRS, True), dict.fromkeys(PAIRS, 300.0), dict.fromkeys(PAIRS, "NV18"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"reach": {**LINKED.reach, (1, 2): False}}, "1 of 3 pairs of GPUs do not reach"),
        ({"gb_s": {**LINKED.gb_s, (0, 2): 12.0}}, "GPUs 0-2 exchange 12 GB/s, where others attain 300"),
        ({"gb_s": dict.fromkeys(PAIRS, 9.0)}, "have NVLink but exchange 9 GB/s"),
    ],
)
def test_a_slow_or_missing_link_is_told(change: dict, said: str) -> None:
    assert verdicts(check_links(LINKED)) == ["ok"]
    assert said in only(check_links(replace(LINKED, **change)), "warning")


def test_the_matrix_of_nvidia_smi_is_read() -> None:
    text = (
        "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\x1b[0m\n"
        "GPU0\t X \tNV18\tSYS\tPIX\t0-47\n"
        "GPU1\tNV18\t X \tNV18\tSYS\t0-47\n"
        "GPU2\tSYS\tNV18\t X \tSYS\t48-95\n"
    )
    assert links._topology(text) == {(0, 1): "NV18", (0, 2): "SYS", (1, 2): "NV18"}
    assert links._topology(None) == {}


# --- the machine around them


def test_a_good_host() -> None:
    assert set(verdicts(check_system(HOST))) == {"ok"}
    assert read_system(False).pinning is None


@pytest.mark.parametrize(
    ("change", "verdict", "said"),
    [
        ({"shm_bytes": 64 << 20}, "warning", "/dev/shm has 64 MiB free"),
        ({"shm_bytes": None}, "warning", "no /dev/shm"),
        (
            {"limit_bytes": 64 * GIB, "free_host_bytes": 8 * GIB},
            "warning",
            "the container's limit is 64.0 GiB",
        ),
        ({"pinning": "CUDA error: out of memory", "locked_bytes": 8 << 20}, "error", "ulimit -l is 8 MiB"),
        ({"compiler": None}, "error", "no C compiler"),
        ({"compiler": None, "pinning": None}, "warning", "no C compiler"),
        ({"has_python_header": False}, "error", "Python.h is missing"),
        ({"open_files": 1024}, "warning", "1,024 files open"),
        ({"clock_behind_s": 30 * 86400.0}, "warning", "30 days behind"),
    ],
)
def test_a_host_that_lacks_something(change: dict, verdict: str, said: str) -> None:
    assert said in only(check_system(replace(HOST, **change)), verdict)


def test_places_to_write(tmp_path: Path) -> None:
    good = Place("log.run_dir", tmp_path, 500 * GIB, needed_bytes=90 * GIB, needed_for="3 checkpoints")
    assert "3 checkpoints take 90.0 GiB" in only(check_place(good), "ok")
    assert "take 90.0 GiB" in only(check_place(replace(good, free_bytes=50 * GIB)), "error")
    assert "only 5.0 GiB" in only(check_place(replace(good, free_bytes=5 * GIB, needed_bytes=0)), "warning")
    made_later = read_place("log.run_dir", tmp_path / "a" / "b")
    assert made_later.free_bytes > 0
    assert not made_later.failure
    assert not (tmp_path / "a").exists()
    nowhere = read_place("log.run_dir", Path("/proc/longseq"))
    assert "cannot be written" in only(check_place(nowhere), "error")


# --- attention


def test_the_kernel_is_the_one_that_the_library_chooses() -> None:
    capped = Problem(heads=2, kv_heads=1, width=16, length=64, windows=(None, 8), softcap=30.0)
    found = read_attention(capped, has_gpu=False)
    assert {one.kernel for one in found.chosen} == {"blockwise"}
    assert len(found.chosen) == 4
    plain = read_attention(replace(capped, windows=(None,), softcap=None), has_gpu=False)
    assert only(check_attention(plain), "ok").startswith(
        "attention of a single document and packed documents: cpu"
    )


def test_heads_that_ranks_do_not_share_evenly_are_no_hindrance() -> None:
    architecture = SimpleNamespace(num_attention_heads=40, num_key_value_heads=8, hidden_size=2560)
    config = load_config("tiny-cpu").model_copy(deep=True)
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"ulysses_degree": 3})})
    problem = Problem.of(config, architecture)
    assert (problem.heads, problem.kv_heads, problem.width) == (10, 2, 64)
    assert read_attention(problem, has_gpu=False).chosen


@pytest.mark.parametrize(
    ("kernel", "why", "verdict", "said"),
    [
        ("fa4", "the fastest of all", "ok", "fa4 4.0"),
        ("cudnn", "not fa4: it is not installed (pip ...)", "ok", "7 % faster"),
        ("flash", "not fa4: it is not installed (pip ...)", "warning", "pip install 'longseq[fa4]'"),
        ("flash", "not fa4: heads; not fa3: it is not installed (pip ...)", "warning", "flash-attn-3"),
        ("flash", "not fa4: no; not fa3: no", "ok", "flash"),
        ("blockwise", "not fa4: it takes bfloat16", "warning", "many times slower"),
    ],
)
def test_what_other_kernels_would_bring(kernel: str, why: str, verdict: str, said: str) -> None:
    facts = Attention(9, (Chosen("packed documents", kernel, why),), {"flash-attn-4": "4.0"}, {})
    assert said in only(check_attention(facts), verdict)


def test_a_kernel_that_cannot_be_imported_is_an_error() -> None:
    facts = Attention(
        9, (), {}, {"flash-attn-4": "flash-attn-4 is installed but cannot be imported; pip ..."}
    )
    assert "cannot be imported" in only(check_attention(facts), "error")


# --- hub


@pytest.mark.parametrize(
    ("change", "verdict", "said"),
    [
        ({}, "ok", "the hub has it; not cached here"),
        ({"folder": True}, "ok", "a folder of this machine"),
        ({"folder": True, "missing": ("config.json",)}, "error", "the folder has no config.json"),
        ({"answer": "offline", "cached_at": "/x"}, "ok", "cached (HF_HUB_OFFLINE is set)"),
        ({"answer": "offline"}, "error", "HF_HUB_OFFLINE forbids"),
        ({"answer": "unreachable"}, "error", "out of reach"),
        ({"answer": "gated"}, "error", "no token is there. Accept its licence"),
        ({"answer": "gated", "has_token": True}, "error", "may not read it"),
        ({"answer": "unknown"}, "error", "knows no such repository"),
    ],
)
def test_models_that_can_be_had_and_not(change: dict, verdict: str, said: str) -> None:
    assert said in only(check_repository(replace(Repository("model.name", "meta/llama"), **change)), verdict)


def test_a_token_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    monkeypatch.setattr(hub, "_ask", lambda name: "gated")
    found = read_repository("model.name", "meta-llama/none-such", wants_weights=True)
    assert found.has_token
    assert "secret" not in repr(found) + "".join(map(repr, check_repository(found)))


def test_a_folder_is_looked_into(tmp_path: Path) -> None:
    assert read_repository("model.name", str(tmp_path), wants_weights=True).missing == (
        "config.json",
        "*.safetensors",
    )
    assert read_repository("data.tokenizer", str(tmp_path), wants_weights=False).missing


# --- DeepSpeed


def test_deepspeed_that_does_not_work() -> None:
    assert verdicts(check_deepspeed(DeepSpeed("", False, False))) == ["ok"]
    assert verdicts(check_deepspeed(DeepSpeed("", True, True))) == ["ok"]
    assert "No module named 'x'" in only(
        check_deepspeed(DeepSpeed("No module named 'x'", False, True)), "error"
    )
    assert "no C++ compiler" in only(check_deepspeed(DeepSpeed("", True, False)), "error")


# --- a ping


def stopped_at(stage: str, then: str):
    """The words of a process that comes as far as a stage."""
    stages = ["started", "joined", "all-reduce", "all-to-all"]
    reached = "\\n".join(stages[: stages.index(stage) + 1])
    code = f"print('{reached}', flush=True); import time; {then}"
    return lambda store, rank, world, backend: [sys.executable, "-S", "-c", code]


def test_processes_that_hang_or_die_are_told_and_ended() -> None:
    hanging = start_ping("nccl", 2, 0.3, stopped_at("joined", "time.sleep(99)"))
    found = only(check_ping(hanging.result()), "error")
    assert found.startswith("NCCL between 2 GPUs hangs: all-reduce was not over after 0 s")
    assert all(name in found for name in ("NCCL_P2P_DISABLE", "NCCL_DEBUG=INFO", "NCCL_SOCKET_IFNAME"))
    assert all(process.poll() is not None for process in hanging.processes)
    assert not Path(hanging.folder.name).exists()
    dying = start_ping("gloo", 2, 9.0, stopped_at("started", "raise SystemExit('no route to host')"))
    assert "fails in joining: no route to host" in only(check_ping(dying.result()), "error")


def test_who_died_is_told_of_and_not_who_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ping, "GRACE_S", 0.1)
    waiting = stopped_at("joined", "time.sleep(99)")
    dying = stopped_at("joined", "raise SystemExit('Bus error')")
    run = start_ping("nccl", 2, 9.0, lambda *words: (dying if words[1] else waiting)(*words))
    assert "fails in all-reduce: Bus error" in only(check_ping(run.result()), "error")
    assert all(process.poll() is not None for process in run.processes)


@pytest.mark.slow  # processes are started
def test_processes_of_this_machine_greet_each_other() -> None:
    found = check_ping(start_ping("gloo", 2).result())
    assert only(found, "ok") == "gloo between 2 processes of the CPU: all-reduce and all-to-all are right"


def test_numbers_that_arrive_wrong_are_told() -> None:
    facts = Ping("nccl", 8, "joined", False, 30.0, "WRONG NUMBERS: what arrived of an all-reduce is not what")
    assert "do not train on it" in only(check_ping(facts), "error")


# --- several processes against one


def right_case() -> list:
    model = tiny_llama(torch.float64)
    implementation = model.config._attn_implementation
    found = compare_with_one_rank(model, ProcessGroups.create(2), packed_rows(0)[0])
    left_as_it_was = model.config._attn_implementation == implementation
    clean = all(param.grad is None for param in model.parameters())
    return [found.is_right, found.worst[1], len(found.gradients), left_as_it_was and clean]


def wrong_case(where: str) -> list:
    """An exchange that loses something on one rank alone."""
    groups = ProcessGroups.create(2)
    original = getattr(Exchange, where)

    def broken(self: Exchange, kinds: str, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = original(self, kinds, *tensors)
        return tuple(tensor * (1 - 1e-5 * groups.rank) for tensor in found)

    setattr(Exchange, where, broken)
    try:
        found = compare_with_one_rank(tiny_llama(torch.float64), groups, packed_rows(0)[0])
    finally:
        setattr(Exchange, where, original)
    return [found.is_right, found.worst[1]]


def examined_case() -> list:
    """As the command compares, but for how its processes are started; the status and what is said."""
    config = load_config("tiny-cpu", ["parallel.ulysses_degree=2"])
    joined = config, ProcessGroups.create(2), torch.device("cpu")
    stand_ins = {"join": lambda *_, **__: joined, "leave": lambda: None, "set_up_logging": lambda **_: None}
    said = io.StringIO()
    with patch.multiple(sequence_parallel, **stand_ins), redirect_stdout(said):
        status = sequence_parallel.examine_together(config)
    return [status, said.getvalue()]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list]:
    cases = {where: (wrong_case, {"where": where}) for where in ("to_heads", "to_tokens")}
    return run_cases(2, {"right": (right_case, {}), "examined": (examined_case, {}), **cases})


@pytest.mark.slow  # processes are started
def test_ranks_that_agree_with_one_are_found_right(outcomes: dict[str, list]) -> None:
    for is_right, difference, num_weights, left_as_it_was in outcomes["right"]:
        assert is_right
        assert difference < 1e-12
        assert num_weights == len(list(tiny_llama().parameters()))
        assert left_as_it_was


@pytest.mark.slow  # processes are started
@pytest.mark.parametrize("where", ["to_heads", "to_tokens"])
def test_an_exchange_that_loses_something_is_found(outcomes: dict[str, list], where: str) -> None:
    for is_right, difference in outcomes[where]:
        assert not is_right
        assert difference > 1e-7


@pytest.mark.slow  # processes are started
def test_processes_that_were_started_compare_and_one_of_them_says_it(outcomes: dict[str, list]) -> None:
    (status, said), (other_status, other_said) = outcomes["examined"]
    assert (status, other_status, other_said) == (0, 0, "")
    assert [line.partition("): loss ")[0] for line in said.splitlines()] == [
        "ok: 2 of 2 processes on one sequence (float64",
        "ok: 2 of 2 processes on one sequence (float64, streamed layers",
    ]


def test_nan_is_not_right() -> None:
    right, wrong = (
        SequenceCheck(1.0, 1.0, {"first": 0.0, "other": error}, 1e-4) for error in (1e-9, float("nan"))
    )
    assert right.is_right
    assert not wrong.is_right
    comparisons = [
        Comparison("float64", 0, right),
        Comparison("bfloat16", 0, right),
        Comparison("float64", 1, wrong),
    ]
    first, second = report(comparisons, ProcessGroups(0, 4, 2))
    assert first.verdict == "error"
    assert first.what.startswith("2 of 4 processes on one sequence (float64, sequence 1 of 2)")
    assert "not a number" in first.advice
    assert second.verdict == "ok"


@pytest.mark.slow  # every family's model is made and trained a step
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_small_one(family: str) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    config = parse_config(
        {
            "model": {"config": {"model_type": family, **heads}},
            "data": {"tokenizer": "bytes"},
            "sequence": {"length": 128},
        }
    )
    comparisons = check_sequence_parallelism(config, ProcessGroups(), torch.device("cpu"))
    assert [comparison.title for comparison in comparisons] == ["float64", "float64, streamed layers"]
    for comparison in comparisons:
        assert comparison.found.is_right, comparison


# --- the command


@pytest.fixture
def tiny(tmp_path: Path) -> RunConfig:
    return load_config("tiny-cpu", [f"log.run_dir={tmp_path}", f"data.cache_dir={tmp_path}"])


def test_a_config_is_asked_for_what_it_needs(
    tiny: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "read_cuda", lambda: Cuda(None, "2.13.0+cpu", None))
    assert command.doctor(tiny, ping=False, where="node3") == 0
    printed = capsys.readouterr().out
    assert all(": node3: " in line for line in printed.splitlines())
    assert f"log.run_dir ({tmp_path})" in printed
    assert "3 checkpoints (checkpoint.keep=2 and a new one) take" in printed
    # A run that goes on has had its room already: it must not be refused for it.
    there = tmp_path / "checkpoints" / "step-5" / "model.safetensors"
    there.parent.mkdir(parents=True)
    there.touch()
    os.truncate(there, 1 << 30)
    command.doctor(tiny, ping=False)
    assert "and a new one), less what is there of them, take" not in (printed := capsys.readouterr().out)
    assert f"log.run_dir ({tmp_path}): " in printed
    os.truncate(there, 1 << 20)
    command.doctor(tiny, ping=False)
    assert "less what is there of them, take" in capsys.readouterr().out
    wrong = tiny.model_copy(
        update={"model": tiny.model.model_copy(update={"config": {"model_type": "bert"}})}
    )
    assert command.doctor(wrong, ping=False) == 1
    assert "error: model_type='bert' is no family" in capsys.readouterr().out


def test_an_unreachable_model_is_told_once(
    tiny: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "read_cuda", lambda: Cuda(None, "2.13.0+cpu", None))
    monkeypatch.setattr(hub, "_ask", lambda name: "unreachable")
    named = tiny.model.model_copy(update={"name": "nobody/none-such", "config": {}})
    assert command.doctor(tiny.model_copy(update={"model": named}), ping=False) == 1
    errors = [line for line in capsys.readouterr().out.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert "out of reach" in errors[0]


def test_a_finding_is_one_plain_line_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    show([Finding("error", "a " * 100, "[bold]do[/bold] this")])
    assert capsys.readouterr().out == f"error: {'a ' * 100}. [bold]do[/bold] this\n"


@pytest.mark.parametrize(
    ("environment", "looked_at"),
    [({"LOCAL_RANK": "0"}, 1), ({"LOCAL_RANK": "1"}, 0), ({"LOCAL_RANK": "0", command.EXAMINED: "1"}, 0)],
)
def test_one_process_of_each_machine_looks_at_it_unless_that_was_done(
    tiny: RunConfig, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], looked_at: int
) -> None:
    monkeypatch.delenv(command.EXAMINED, raising=False)
    for name, value in {"RANK": "4", **environment}.items():
        monkeypatch.setenv(name, value)
    seen: list[dict] = []
    monkeypatch.setattr(command, "doctor", lambda config, **how: seen.append(how) or 1)
    monkeypatch.setattr(sequence_parallel, "examine_together", lambda config: 0)
    assert command.examine(tiny) == looked_at
    assert seen == [{"ping": False, "where": socket.gethostname()}] * looked_at
