"""The benchmarks of optimizers, at sizes that a CPU has time for."""

from __future__ import annotations

import json
import math
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_modules import imported

PRETRAINING_NAMES = (
    "report",
    "optimizer_corpus",
    "optimizer_plot",
    "optimizer_pretraining_model",
    "optimizer_pretraining",
)

# --- Pre-training ---


@pytest.fixture
def pretraining(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The modules of pre-training, imported as the script does, and gone afterwards."""
    yield from imported(monkeypatch, PRETRAINING_NAMES)


@pytest.fixture(scope="module")
def sdists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source package of some of the standard library's modules; one again with a few words more."""
    folder = tmp_path_factory.mktemp("sdists")
    library = Path(sysconfig.get_path("stdlib"))
    with tarfile.open(folder / "Standard_Library-1.0.tar.gz", "w:gz") as archive:
        for package in ("email", "logging", "unittest", "http"):
            for path in sorted((library / package).glob("*.py")):
                archive.add(path, f"standard-library-1.0/{package}/{path.name}")
        archive.add(library / "decimal.py", "standard-library-1.0/decimal.py")
        archive.add(library / "statistics.py", "standard-library-1.0/statistics.py")
        changed = folder / "changed.py"
        changed.write_text((library / "statistics.py").read_text() + '"""It is not all a copy."""\n')
        archive.add(changed, "standard-library-1.0/changed.py")
    return folder


@pytest.fixture
def corpus(
    pretraining: dict[str, ModuleType], sdists: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.getbasetemp() / "optimizer-corpus"
    if not (out / "corpus.json").exists():
        options = ("--sources", "standard-library==1.0", "--vocab-size", "700")
        pretraining["optimizer_corpus"].HELDOUT_ONE_IN = 4
        pretraining["optimizer_corpus"].main(["--sdists", str(sdists), "--out", str(out), *options])
    return out


def pretrain(bench: dict[str, ModuleType], corpus: Path, out: Path | None, *options: str) -> None:
    sizes = ("--shape", "tiny", "--steps", "2", "--batch", "6", "--micro-batch", "3", "--length", "17")
    where = ("--out", str(out)) if out is not None else ()
    options = (*sizes, "--heldout-tokens", "200", *where, *options)
    bench["optimizer_pretraining"].main(["--corpus", str(corpus), *options])


def kept_rows(out: Path) -> dict[tuple[str, float], dict[str, Any]]:
    rows = json.loads((out / "optimizer_pretraining.json").read_text())["rows"]
    return {(row["run"], row["lr"]): row for row in rows}


def test_corpus_has_each_paragraph_once_and_both_parts_apart(pretraining, corpus: Path) -> None:
    found = pretraining["optimizer_corpus"].load(corpus)
    facts = json.loads((corpus / "corpus.json").read_text())
    assert [source["source"] for source in facts["sources"]] == ["standard-library==1.0"]
    assert facts["train"]["documents"] + facts["heldout"]["documents"] == facts["sources"][0]["documents"]
    assert found.train.dtype == found.heldout.dtype == np.uint16
    assert np.count_nonzero(found.train == 0) == facts["train"]["documents"]
    assert np.count_nonzero(found.heldout == 0) == facts["heldout"]["documents"]
    text = decoded(corpus, np.concatenate([found.train, found.heldout]))
    paragraphs = [" ".join(part.lower().split()) for part in text.replace("<|end|>", "\n\n").split("\n\n")]
    long = [paragraph for paragraph in paragraphs if len(paragraph) >= 50]
    assert len(long) > 100
    assert len(set(long)) == len(long)


def decoded(corpus: Path, tokens: np.ndarray) -> str:
    import gzip

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(gzip.decompress((corpus / "tokenizer.json.gz").read_bytes()).decode())
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("The words of a text are what is read by people, and not by a machine. " * 9, True),
        ("The words are few. ", False),
        ("alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi " * 9, False),
        ("the 1.25 of 3.5e-7 and 8.125 in 9.0 is 4.75 to 1e9 for 3 | " * 9, False),
        ("Это the и of слова and на русском языке to be или a не быть is вопрос. " * 9, False),
    ],
)
def test_prose_is_long_english_and_no_table(pretraining, text: str, kept: bool) -> None:
    assert pretraining["optimizer_corpus"].is_prose(text) is kept


def test_a_changed_corpus_is_refused(pretraining, corpus: Path, tmp_path: Path) -> None:
    for path in corpus.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "train.npy.xz").write_bytes((corpus / "heldout.npy.xz").read_bytes())
    with pytest.raises(SystemExit, match="is not what corpus"):
        pretraining["optimizer_corpus"].load(tmp_path)
    with pytest.raises(SystemExit, match="has no corpus"):
        pretraining["optimizer_corpus"].load(tmp_path / "nowhere")


def test_a_package_that_cannot_be_had_is_named(pretraining, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nothing==9"):
        pretraining["optimizer_corpus"].fetch("nothing==9", tmp_path, "no-such-command")


def test_pretraining_of_each_optimizer_leaves_table_curves_and_picture(
    pretraining, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Every run sees the same batches and starts from the same weights."""
    module = pretraining["optimizer_pretraining"]
    batches: dict[str, list[torch.Tensor]] = {}
    first_losses: dict[str, float] = {}
    names = ("adamw-lr-2e-3", "apollo-lr-0.01", "mini-lr-0.02", "mini-bf16-lr-0.02")
    train, loss = module.Bench.train, module.Bench.loss

    def watched_run(self: Any, name: str) -> dict[str, Any]:
        batches[name] = []
        return train(self, name)

    def watched_loss(self: Any, model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found = loss(self, model, ids, labels)
        if batches:
            name = next(reversed(batches))
            batches[name].append(torch.cat((ids, labels), 1))
            first_losses.setdefault(name, found.item())
        return found

    with monkeypatch.context() as patched:
        patched.setattr(module.Bench, "train", watched_run)
        patched.setattr(module.Bench, "loss", watched_loss)
        pretrain(pretraining, corpus, tmp_path, "--runs", *names)
    of_first = torch.stack(batches[names[0]])
    assert len(of_first) == 2 * (2 + 3)  # steps of two micro-batches, and three that are held out
    assert torch.equal(of_first[:, :, 1:17], of_first[:, :, 17:-1])  # labels are the next tokens
    for found in batches.values():
        assert torch.equal(torch.stack(found[:10]), of_first)
    assert len({first_losses[name] for name in names[:3]}) == 1
    assert first_losses[names[3]] == pytest.approx(first_losses[names[0]], rel=1e-3)
    rows = kept_rows(tmp_path)
    assert set(rows) == {("adamw", 2e-3), ("apollo", 0.01), ("mini", 0.02), ("mini-bf16", 0.02)}
    best = rows["adamw", 2e-3]["held-out perplexity"]
    for row in rows.values():
        assert row["/ best AdamW"] == pytest.approx(row["held-out perplexity"] / best)
        assert row["tokens/s"] > 0
    sizes = [rows[key]["state bytes"] for key in (("adamw", 2e-3), ("apollo", 0.01), ("mini", 0.02))]
    assert sizes == expected_state_bytes(vocab_size=700)
    report = json.loads((tmp_path / "optimizer_pretraining.json").read_text())
    curve = report["curves"]["mini-lr-0.02"]
    assert [point["tokens"] for point in curve] == [102, 204]
    first = math.log(700)
    assert all(point["heldout nll"] == pytest.approx(first, rel=0.05) for point in curve)
    assert rows["mini", 0.02]["held-out perplexity"] == pytest.approx(math.exp(curve[-1]["heldout nll"]))
    text = (tmp_path / "optimizer_pretraining.md").read_text()
    assert "| GaLore | 34.88 | 1.024 |" in text
    assert (tmp_path / "optimizer_pretraining.png").read_bytes()[:4] == b"\x89PNG"
    capsys.readouterr()
    pretrain(pretraining, corpus, tmp_path, "--runs", ",".join(names))
    assert "runs of about" not in capsys.readouterr().out  # each is there already
    with pytest.raises(SystemExit, match="has seed=0, here it is 1"):
        pretrain(pretraining, corpus, tmp_path, "--seed", "1", "--runs")


def expected_state_bytes(vocab_size: int) -> list[int]:
    """Of AdamW, APOLLO and Mini for the tiny shape, by the formulas."""
    width, inner, layers = 48, 80, 2
    matrices = ([(width, width)] * 4 + [(width, inner)] * 3) * layers
    others = 2 * vocab_size * width + width * (2 * layers + 1)
    num_others = 2 + 2 * layers + 1
    adamw_of_others = 2 * others + num_others
    numbers = [adamw_of_others + sum(2 * m * n + 1 for m, n in matrices)]
    for rank in (width // 4, 1):
        numbers.append(adamw_of_others + sum(2 * max(m, n) * rank + 2 for m, n in matrices))
    return [4 * number for number in numbers]


def test_a_cut_run_leaves_those_before_it(
    pretraining, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pretraining["optimizer_pretraining"]
    make = module.make_optimizer

    def cut(method: str, *rest: Any) -> torch.optim.Optimizer:
        if method == "mini":
            raise KeyboardInterrupt
        return make(method, *rest)

    names = ("adamw-lr-1e-3", "mini-lr-0.01", "adamw-lr-3e-3")
    with monkeypatch.context() as patched:
        patched.setattr(module, "make_optimizer", cut)
        with pytest.raises(KeyboardInterrupt):
            pretrain(pretraining, corpus, tmp_path, "--runs", *names)
    assert set(kept_rows(tmp_path)) == {("adamw", 1e-3)}
    pretrain(pretraining, corpus, tmp_path, "--runs", *names, "--time-limit-s", "0.01")
    assert set(kept_rows(tmp_path)) == {("adamw", 1e-3)}
    pretrain(pretraining, corpus, tmp_path, "--runs", *names)
    assert set(kept_rows(tmp_path)) == {("adamw", 1e-3), ("adamw", 3e-3), ("mini", 0.01)}


def test_a_run_that_diverges_has_a_note_and_no_perplexity(
    pretraining, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(pretraining, corpus, None, "--runs", "adamw-lr-1e30")
    assert "diverged" in capsys.readouterr().out


def test_an_epoch_has_each_sequence_once(pretraining) -> None:
    order = pretraining["optimizer_pretraining"].batch_order(available=13, batch=4, steps=5, seed=3)
    assert order.shape == (5, 4)
    assert len(set(order[:3].flatten())) == 12
    assert len(set(order[3:].flatten())) == 8
    assert not np.array_equal(order[:2], order[3:])


def test_pretraining_model_is_transformers_llama(pretraining) -> None:
    """Weights copied over, the logits are those of the model that the papers train."""
    from transformers import LlamaConfig, LlamaForCausalLM

    module = pretraining["optimizer_pretraining_model"]
    shape = module.SHAPES["tiny"]
    ours = module.Llama(shape, 101, 23).double()
    ours.turns = tuple(turn.double() for turn in ours.turns)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_attention_heads=shape.heads,
        num_hidden_layers=shape.layers,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    theirs = LlamaForCausalLM._from_config(config, dtype=torch.float64, attn_implementation="eager")
    names = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    weights = {}
    for name, weight in ours.state_dict().items():
        for one in ("q_proj", "k_proj", "v_proj", "o_proj"):
            name = name.replace(f".{one}", f".self_attn.{one}")
        for one in ("gate_proj", "up_proj", "down_proj"):
            name = name.replace(f".{one}", f".mlp.{one}")
        for one, other in names.items():
            name = name.replace(one, other)
        weights[name if name.startswith("lm_head") else f"model.{name}"] = weight
    theirs.load_state_dict(weights)
    ids = torch.randint(0, 101, (2, 23))
    with torch.no_grad():
        torch.testing.assert_close(ours.lm_head(ours(ids)), theirs(ids).logits, rtol=1e-5, atol=1e-6)


def test_runs_are_named_by_method_and_rate(pretraining) -> None:
    module = pretraining["optimizer_pretraining"]
    assert module.parse("mini-bf16-lr-1e-2") == ("mini-bf16", None, 0.01)
    assert module.parse("apollo-alpha-2.5-lr-1e-2") == ("apollo", 2.5, 0.01)
    assert {module.parse(name)[0] for name in module.RUNS} == set(module.METHODS)
    assert len([name for name in module.RUNS if name.startswith("adamw")]) >= 3
    for name in (
        "sgd-lr-1",
        "adamw",
        "adamw-lr-fast",
        "adamw-lr-0",
        "adamw-alpha-2-lr-1",
        "mini-alpha-0-lr-1",
    ):
        with pytest.raises(SystemExit, match="is not METHOD-lr-RATE"):
            module.parse(name)
