"""The benchmarks: their data, their truth, and their tables, at sizes that a CPU has time for."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from benchmark_modules import imported
from torch.nn import functional as F

NAMES = (
    "report",
    "lm_head_data",
    "lm_head_truth",
    "lm_head_timing",
    "lm_head_methods",
    "lm_head_plot",
    "lm_head",
)
DECODER_NAMES = (
    "report",
    "decoder_model",
    "decoder_anchors",
    "decoder_variants",
    "decoder_plot",
    "decoder",
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The modules of the folder, imported as `python benchmarks/lm_head.py` does, and gone afterwards."""
    yield from imported(monkeypatch, NAMES)


def problem_of(bench: dict[str, ModuleType], kind: str, num_tokens: int, vocab_size: int = 5003):
    data = bench["lm_head_data"]
    shape = data.Shape("test", vocab_size, 64)
    weight = data.draw_weight(shape, kind, "cpu")
    return data.draw_problem(shape, kind, weight, num_tokens)


@pytest.mark.parametrize("kind", ["flat", "zipf", "zipf-sharp"])
def test_first_tokens_of_a_long_problem_are_a_short_problem(bench, kind: str) -> None:
    short, long = problem_of(bench, kind, 600), problem_of(bench, kind, 1100)
    assert torch.equal(short.weight, long.weight)
    assert torch.equal(short.hidden, long.hidden[:600])
    assert torch.equal(short.labels, long.labels[:600])


def test_labels_are_drawn_from_the_softmax_they_are_scored_by(bench) -> None:
    """The mean NLL of labels that are is the softmax's mean entropy, up to the luck of the draw."""
    for kind in ("zipf", "zipf-sharp"):
        problem = problem_of(bench, kind, 4096, 1003)
        log_chances = (problem.hidden.float() @ problem.weight.float().T).log_softmax(1).detach()
        entropies = -(log_chances.exp() * log_chances).sum(1)
        spread = (log_chances.exp() * log_chances**2).sum(1) - entropies**2
        luck = math.sqrt(float(spread.mean()) / 4096)
        assert problem.mean_nll == pytest.approx(float(entropies.mean()), abs=4 * luck)


def test_truth_is_autograd_in_float64(bench) -> None:
    truth = bench["lm_head_truth"]
    problem = problem_of(bench, "zipf", 700)
    hidden, weight = (t.detach().double().requires_grad_() for t in (problem.hidden, problem.weight))
    loss = F.cross_entropy(hidden @ weight.T, problem.labels)
    loss.backward()
    loss = loss.detach()
    found = truth.gradients(problem)
    torch.testing.assert_close(found.loss, loss)
    torch.testing.assert_close(found.hidden, hidden.grad)
    torch.testing.assert_close(found.weight, weight.grad)
    assert problem.mean_nll == pytest.approx(float(loss), rel=1e-5)
    errors = truth.SpotCheck(problem).errors(loss, hidden.grad, weight.grad)
    assert max(errors) < 1e-5
    weight.grad[problem.labels[-1]] *= 1.5
    assert truth.SpotCheck(problem).errors(loss, hidden.grad, weight.grad)[1] > 1e-2
    assert math.isnan(truth.worst(0.1, math.nan, 0.2))


def test_apples_rule_leaves_out_the_tiles_that_a_loop_finds_dead(bench, monkeypatch) -> None:
    """Against a loop over tiles, with sizes that no tile divides and an eps that kills some of them."""
    truth = bench["lm_head_truth"]
    monkeypatch.setattr(truth, "EPS", 0.01)
    problem = problem_of(bench, "zipf", 700)
    hidden, weight = problem.hidden.detach().double(), problem.weight.detach().double()
    chances = (hidden @ weight.T).softmax(1)
    pull = chances - F.one_hot(problem.labels, len(weight)).double()
    order = (hidden @ weight.T).mean(0).argsort()
    dropped, living, num_tiles = 0.0, 0, 0
    # A document is 512 tokens, and tiles of tokens start anew in each: 512 is a multiple of 128.
    for top in range(0, 700, 128):
        for words in order.split(128):
            rows = torch.arange(top, min(top + 128, 700))[:, None]
            num_tiles += 1
            if pull[rows, words].abs().max() >= 0.01:
                living += 1
            else:
                dropped += float(chances[rows, words].sum())
                pull[rows, words] = 0
    assert 0 < living < num_tiles
    found = truth.gradients(problem, filtered=True)
    torch.testing.assert_close(found.hidden, pull @ weight / 700, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.weight, pull.T @ hidden / 700, rtol=1e-5, atol=1e-7)
    about = truth.facts(problem)
    assert about["f, sorted"] == pytest.approx(living / num_tiles)
    assert about["dropped, sorted"] == pytest.approx(dropped / 700, rel=1e-3)


def test_tables_have_a_row_for_what_ran_and_for_what_did_not(bench, tmp_path: Path, monkeypatch) -> None:
    methods = bench["lm_head_methods"]

    def no_memory() -> None:
        raise torch.OutOfMemoryError

    broken = (
        methods.Method("big", "too big", no_memory),
        methods.Method("absent", "not here", lambda: methods._need("no_such_module", "no-such-package")),
    )
    known = tuple(method for method in methods.METHODS if method.key in ("exact", "eager"))
    monkeypatch.setattr(bench["lm_head"], "METHODS", known + broken)
    bench["lm_head"].main(["--shapes", "tiny", "--data", "zipf", "flat", "--out", str(tmp_path)])
    kept = json.loads((tmp_path / "lm_head.json").read_text())
    notes = {row["method"]: row.get("note") for row in kept["rows"]}
    assert notes["too big"] == "out of memory"
    assert notes["not here"] == "no-such-package is not installed"
    timed = [row for row in kept["rows"] if row.get("key") in ("exact", "eager")]
    assert len(timed) == 4
    assert all(row["fwd+bwd G"] > 0 and row["note"] is None for row in timed)
    assert {row["data"] for row in kept["data"]} == {"zipf", "flat"}
    text = (tmp_path / "lm_head.md").read_text()
    assert "## tiny, 300 tokens, flat" in text
    assert "| too big | - |" in text


def test_nothing_is_reported_of_a_wrong_result_of_ours(bench, tmp_path: Path, monkeypatch) -> None:
    methods = bench["lm_head_methods"]
    wrong = methods.Method(
        "exact", "longseq exact", lambda: lambda h, w, y: 1.1 * methods.eager(h, w, y), ours=True
    )
    monkeypatch.setattr(bench["lm_head"], "METHODS", (wrong,))
    with pytest.raises(SystemExit, match="longseq exact disagrees with float64 on tiny, 300 tokens, zipf"):
        bench["lm_head"].main(["--shapes", "tiny", "--data", "zipf", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_picture_has_the_case_nearest_to_8192_tokens(bench, tmp_path: Path) -> None:
    plot = bench["lm_head_plot"]
    rows = [
        {
            "shape": shape,
            "data": data,
            "tokens": tokens,
            "method": "longseq exact",
            "key": "exact",
            "ours": True,
            "fwd+bwd G": 3.2,
            "beside dE, dW MiB": 0.0,
        }
        for shape in ("a", "b")
        for data in ("flat", "zipf")
        for tokens in (65536, 8192)
    ]
    assert set(plot._panels(rows)) == {"a, 8,192 tokens, zipf", "b, 8,192 tokens, zipf"}
    plot.draw(rows, tmp_path / "lm_head.png")
    assert [path.name for path in tmp_path.iterdir()] == ["lm_head.png"]


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The modules of decoder.py, on the CPU wherever this runs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield from imported(monkeypatch, DECODER_NAMES)


def run_decoder(decoder: dict[str, ModuleType], *options: str, out: Path | None = None) -> None:
    where = [] if out is None else ["--out", str(out)]
    decoder["decoder"].main(["--shape", "tiny", *options, *where])


def variant_of(decoder: dict[str, ModuleType], key: str, loss: Callable[[Any], Callable]) -> Any:
    """A variant whose loss of ids is what `loss` makes of the model's own."""
    model, anchors = decoder["decoder_model"], decoder["decoder_anchors"]
    return decoder["decoder_variants"].Variant(
        key, f"label of {key}", lambda llama: model.Prepared(loss(anchors.own_loss(llama)))
    )


@pytest.mark.slow  # every layer and head that is compared, and some of them compile
def test_every_decoder_variant_that_a_cpu_has_gives_the_first_ones_numbers(decoder, tmp_path: Path) -> None:
    run_decoder(decoder, "--lengths", "128", "61", out=tmp_path)
    kept = json.loads((tmp_path / "decoder.json").read_text())
    assert not [row["note"] for row in kept["rows"] if "note" in row]
    by_key: dict[str, list[int]] = {}
    for row in kept["rows"]:
        assert row["s"] > 0
        assert row["tokens/s"] == pytest.approx(row["tokens"] / row["s"])
        by_key.setdefault(row["key"], []).append(row["tokens"])
    assert all(lengths == [61, 128] for lengths in by_key.values())
    keys = {variant.key for variant in decoder["decoder_variants"].VARIANTS}
    # What copies to the host, Liger and flash-attn-4 need a GPU; two layers are not four or five.
    needs_gpu = {key for key in keys if "fa4" in key} | {"transformers-host", "alst-host", "liger"}
    assert (
        set(kept["left_out"])
        == keys - set(by_key)
        == needs_gpu
        | {
            "longseq-gpu-auto-save-4",
            "longseq-host-auto-save-5",
        }
    )
    assert all(row["host GiB"] > 0 for row in kept["rows"] if row["key"].startswith("longseq-host"))
    text = (tmp_path / "decoder.md").read_text()
    assert text.index("## 61 tokens") < text.index("## 128 tokens")
    assert (tmp_path / "decoder.png").exists()


@pytest.mark.parametrize("anchor", ["alst", "mini_s", "transformers_checkpoints"])
def test_anchors_have_the_gradients_of_the_plain_model(decoder, anchor: str, monkeypatch) -> None:
    """At a length that neither tiles nor chunks divide, and on top of gradients that are there."""
    if anchor == "alst":
        monkeypatch.setattr(decoder["decoder_anchors"], "ALST_LOGITS_BYTES", 2**17)
    monkeypatch.setattr(decoder["decoder_anchors"], "MINI_S_MLP_TOKENS", 60)
    plain = decoder["decoder_model"].build("tiny", 2, "cpu").float()
    model = decoder["decoder_model"].build("tiny", 2, "cpu").float()
    prepared = getattr(decoder["decoder_anchors"], anchor)(model)
    ids = decoder["decoder_model"].draw_tokens(model, 203)
    for _ in range(2):
        wanted = plain(input_ids=ids, labels=ids).loss
        wanted.backward()
        found = prepared.loss(ids)
        found.backward()
    torch.testing.assert_close(found.detach(), wanted.detach())
    for (name, param), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, param.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_liger_leaves_transformers_as_it_was(decoder, monkeypatch) -> None:
    """What it replaces for good, also where it fails half way."""
    from transformers.models.llama import modeling_llama

    anchors = decoder["decoder_anchors"]
    before = modeling_llama.LlamaRMSNorm
    fake = ModuleType("liger_kernel.transformers")

    def apply(model: Any) -> None:
        modeling_llama.LlamaRMSNorm = None
        if model is broken:
            raise AttributeError

    fake.apply_liger_kernel_to_llama = apply
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", fake)
    monkeypatch.setattr(anchors, "need", lambda *names: None)
    monkeypatch.setattr(anchors, "need_cuda", lambda *names: None)
    model, broken = (decoder["decoder_model"].build("tiny", 1, "cpu") for _ in range(2))
    prepared = anchors.liger(model)
    assert modeling_llama.LlamaRMSNorm is None
    prepared.undo()
    assert modeling_llama.LlamaRMSNorm is before
    with pytest.raises(AttributeError):
        anchors.liger(broken)
    assert modeling_llama.LlamaRMSNorm is before


def test_a_failure_is_a_row_and_the_next_variant_goes_on(decoder, tmp_path: Path, monkeypatch) -> None:
    def too_big(loss: Callable) -> Callable:
        def of_ids(ids: torch.Tensor) -> torch.Tensor:
            if ids.shape[1] > 64:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return loss(ids)

        return of_ids

    def broken(loss: Callable) -> Callable:
        def of_ids(ids: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("No available kernel.\nAborting.")

        return of_ids

    def absent(model: Any) -> None:
        raise decoder["decoder_anchors"].MissingError("no-such-package is not installed")

    variants = [
        variant_of(decoder, "big", too_big),
        decoder["decoder_variants"].Variant("absent", "absent", absent),
        variant_of(decoder, "broken", broken),
        variant_of(decoder, "plain", lambda loss: loss),
    ]
    monkeypatch.setattr(decoder["decoder"], "choose", lambda wanted: variants)
    run_decoder(decoder, "--lengths", "64", "96", "128", out=tmp_path)
    kept = json.loads((tmp_path / "decoder.json").read_text())
    found = {(row["key"], row["tokens"]): row.get("note") for row in kept["rows"]}
    assert found == {
        ("big", 64): None,
        ("big", 96): "out of memory",
        ("broken", 64): "RuntimeError: No available kernel.",
        ("plain", 64): None,
        ("plain", 96): None,
        ("plain", 128): None,
    }
    assert kept["left_out"] == {"absent": "no-such-package is not installed"}
    assert "| label of big | - |" in (tmp_path / "decoder.md").read_text()


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (lambda loss: lambda ids: loss(ids) + 0.01, "the loss is"),
        (lambda loss: lambda ids: 1.05 * loss(ids) - 0.05 * loss(ids).detach(), "the norm of layer 0 q_proj"),
        (lambda loss: lambda ids: loss(ids) * float("nan"), "the loss is nan"),
    ],
)
def test_wrong_numbers_of_a_decoder_variant_are_not_kept(
    decoder, tmp_path: Path, monkeypatch, wrong: Callable, what: str
) -> None:
    variants = [variant_of(decoder, "plain", lambda loss: loss), variant_of(decoder, "wrong", wrong)]
    monkeypatch.setattr(decoder["decoder"], "choose", lambda wanted: variants)
    with pytest.raises(SystemExit, match="wrong at 64: the"):
        run_decoder(decoder, "--lengths", "64", "128", out=tmp_path)
    rows = json.loads((tmp_path / "decoder.json").read_text())["rows"]
    assert [(row["key"], row["tokens"]) for row in rows] == [("plain", 64), ("plain", 128), ("wrong", 64)]
    assert set(rows[2]) == {"key", "variant", "tokens", "note"}
    assert rows[2]["note"].startswith(f"refused: {what}")


def test_rows_of_another_run_are_added_to(decoder, tmp_path: Path) -> None:
    run_decoder(decoder, "--lengths", "64", "--variants", "transformers-gpu", out=tmp_path)
    options = ("--lengths", "64", "128", "--variants", "longseq-host-g4-save-1", "--add")
    run_decoder(decoder, *options, out=tmp_path)
    rows = json.loads((tmp_path / "decoder.json").read_text())["rows"]
    names = ["transformers-gpu", "longseq-host-g4-save-1", "longseq-host-g4-save-1"]
    assert [(row["key"], row["tokens"]) for row in rows] == list(zip(names, (64, 64, 128), strict=True))
    # They are what others are held against, too.
    kept = json.loads((tmp_path / "decoder.json").read_text())
    kept["rows"][0]["loss"] += 0.01
    (tmp_path / "decoder.json").write_text(json.dumps(kept))
    with pytest.raises(SystemExit, match="refused"):
        run_decoder(decoder, *options, out=tmp_path)
    with pytest.raises(SystemExit, match="has layers=2, here it is 1"):
        run_decoder(decoder, "--layers", "1", *options, out=tmp_path)


def test_a_run_ends_before_its_minutes_do(decoder, monkeypatch, capsys) -> None:
    model = decoder["decoder_model"]
    now = [0.0]
    monkeypatch.setattr(model.time, "monotonic", lambda: now[0])
    budget = model.Budget(minutes=1.0)
    assert budget.allows(1000, 5)  # nothing is known yet
    budget.add(1000, 5.0)
    budget.add(1000, 4.0)
    assert budget.allows(500, 10)  # a shorter one takes no longer
    assert not budget.allows(500, 11)
    assert budget.allows(2000, 2)  # 20 s each
    assert not budget.allows(2000, 3)
    assert not budget.allows(2000, 2, start_s=20.0)
    now[0] = 30.0
    assert not budget.allows(2000, 2)
    assert model.Budget(None).allows(10**9, 10**9)
    run_decoder(decoder, "--variants", "transformers-gpu", "--lengths", "64", "--minutes", "0.1")
    assert "no time left: transformers-gpu at 64" in capsys.readouterr().out


def test_a_budget_goes_by_the_work_there_is(decoder) -> None:
    """Four times the tokens are seven times the work of an 8B model at these lengths, not sixteen times."""
    args = decoder["decoder"].parser().parse_args(["--minutes", "1"])
    budget = decoder["decoder"].Bench(args).budget
    budget.add(16384, 2.0)
    assert budget.allows(65536, 3)
    assert not budget.allows(65536, 4)


def test_slopes_are_those_of_a_variants_own_lengths(decoder) -> None:
    def row(key: str, tokens: int, peak: float | None) -> dict[str, Any]:
        return {"key": key, "variant": key, "tokens": tokens, "peak GiB": peak}

    rows = [
        row("a", 16384, 30.0),
        row("b", 16384, 40.0),
        row("a", 65536, 60.0),
        row("a", 32768, 38.0),
        {"key": "b", "variant": "b", "tokens": 32768, "note": "out of memory"},
    ]
    found = {(row["key"], row["tokens"]): row for row in decoder["decoder"].with_slopes(rows)}
    assert found["a", 32768]["KiB/token"] == 8 * 2**20 / 16384
    assert found["a", 65536]["KiB/token"] == 22 * 2**20 / 32768
    assert found["a", 65536]["KiB/token from 16,384"] == 30 * 2**20 / 49152
    assert not [name for row in (found["a", 16384], found["b", 32768]) for name in row if "KiB" in name]
    tables = dict(decoder["decoder"].tables(list(found.values())))
    assert [row["variant"] for row in tables["32,768 tokens"]] == ["a", "b"]


def test_variants_are_chosen_by_name_or_beginning(decoder) -> None:
    variants = decoder["decoder_variants"]

    def keys(*names: str) -> list[str]:
        return [variant.key for variant in variants.choose(list(names))]

    assert keys("longseq-gpu-g", "liger") == ["liger", "longseq-gpu-g1", "longseq-gpu-g2"]
    assert keys("longseq-host-g4") == ["longseq-host-g4"]  # a whole name is that one
    assert keys("longseq-gpu-g8-save-3-fa4", "alst") == ["alst-gpu", "alst-host", "longseq-gpu-g8-save-3-fa4"]
    with pytest.raises(ValueError, match="longseq-gpu-g1, "):
        keys("longsec")
    assert len(variants.choose(None)) == len({variant.key for variant in variants.VARIANTS})
    label = variants.our_variant("longseq-host-auto-save-gpu-fa4").label
    assert label == ("longseq, checkpoints=host, head_groups=auto, save_attention=gpu, attention_kernel=fa4")


def test_the_picture_has_a_line_a_variant(decoder, tmp_path: Path) -> None:
    plot = decoder["decoder_plot"]
    rows = [
        {"key": "liger", "variant": "Liger", "tokens": 64, "peak GiB": 2.0, "tokens/s": 10.0},
        {"key": "longseq-x", "variant": "ours", "tokens": 128, "peak GiB": 3.0, "tokens/s": 8.0},
        {"key": "longseq-x", "variant": "ours", "tokens": 64, "peak GiB": 1.0, "tokens/s": 9.0},
        {"key": "longseq-x", "variant": "ours", "tokens": 256, "note": "out of memory"},
    ]
    assert plot.points(rows, "peak GiB") == {"Liger": [(64, 2.0)], "ours": [(64, 1.0), (128, 3.0)]}
    (tmp_path / "decoder.json").write_text(json.dumps({"rows": rows}))
    plot.main([str(tmp_path / "decoder.json")])
    assert {path.name for path in tmp_path.iterdir()} == {"decoder.json", "decoder.png"}


def test_a_kernel_that_loses_far_elements_is_told_from_longseqs_call_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from longseq.distributed import short_offsets
    from longseq.distributed.attention_kernels import CPU

    def backward(grad_out: torch.Tensor, *others: object) -> tuple[torch.Tensor, ...]:
        far = short_offsets.last_offset(grad_out) > short_offsets.MOST_OFFSET
        return CPU.backward(torch.zeros_like(grad_out) if far else grad_out, *others)

    (module,) = (
        found["attention_offsets"] for found in imported(monkeypatch, ("report", "attention_offsets"))
    )
    monkeypatch.setattr(module, "LENGTH", 33)
    monkeypatch.setattr(short_offsets, "MOST_OFFSET", 33 * 600)
    rows = [
        row
        for far in ("g", "k")
        for elements in (512, 1024)
        for row in module.measure(CPU._replace(backward=backward), elements, far, "cpu")
    ]
    wrong = [(row["far"], row["kernel"]) for row in rows if max(row["grads"]) > 0.01]
    assert wrong == [("g", "cuDNN")]
    module.keep(rows, tmp_path)
    assert "| gradient of the output | 33,0" in (tmp_path / "attention_offsets.md").read_text()
