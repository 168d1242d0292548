"""Configs that cannot run: files that are none, keys, values, and what keys demand of each other."""

from __future__ import annotations

from pathlib import Path

import pytest
from bad_inputs import Case, Place, check, parametrized
from tiny_run import Workshop

GOOD = "model: {config: {model_type: llama}}\ndata: {tokenizer: bytes}\n"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("shop"))


def text(name: str, content: str | bytes, *says: str, file: str = "own.yaml") -> Case:
    """A config file of that content."""
    return Case(name, lambda place: ["train", place.write(file, content)], says)


def put(name: str, override: str | tuple[str, ...], *says: str) -> Case:
    """A good config with overrides over it."""
    overrides = (override,) if isinstance(override, str) else override
    return Case(name, lambda place: ["train", place.yaml(), *overrides], says)


def path(name: str, make, *says: str) -> Case:
    """A path in place of a config file."""
    return Case(name, lambda place: ["train", make(place.folder)], says)


def folder_of_a_run(folder: Path) -> Path:
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(GOOD)
    return folder / "run"


def near(folder: Path) -> Path:
    (folder / "mine.yaml").write_text(GOOD)
    return folder / "mien.yaml"


def loop(folder: Path) -> Path:
    (folder / "loop.yaml").symlink_to(folder / "loop.yaml")
    return folder / "loop.yaml"


def unreadable(folder: Path) -> Path:
    # Reads of this file fail, for root too.
    (folder / "unreadable.yaml").symlink_to("/proc/self/mem")
    return folder / "unreadable.yaml"


FILES = (
    path(
        "no such file",
        lambda folder: folder / "nowhere.yaml",
        "nowhere.yaml does not exist",
        "check the path",
    ),
    path("a slip in the name", near, "mien.yaml does not exist; did you mean", "mine.yaml?"),
    path(
        "no such folder",
        lambda folder: folder / "no" / "x.yaml",
        "x.yaml does not exist, nor does its folder",
    ),
    path("a folder", lambda folder: folder, "is a folder; name a YAML file or a preset"),
    path("a run's folder", folder_of_a_run, "run is a folder; did you mean", "run/config.yaml?"),
    path("a link to itself", loop, "loop.yaml"),
    path("a file that cannot be read", unreadable, "unreadable.yaml cannot be read"),
    path("no preset", lambda folder: "tiny-cpux", "tiny-cpux is neither a preset", "did you mean tiny-cpu?"),
    path(
        "nothing like a preset", lambda folder: "bert", "bert is neither a preset", "use one of", "tiny-cpu"
    ),
    path("an empty name", lambda folder: "", "the config's name is empty", "name a preset"),
    text("an empty file", "", "model.name=null and model.config={} leave no model; name a checkpoint"),
    text("comments alone", "# model:\n#   name: x\n", "leave no model; name a checkpoint"),
    text("a list", "- model\n- data\n", "own.yaml holds ['model', 'data']", "sections of `key: value` lines"),
    text("a word", "llama3\n", "own.yaml holds 'llama3'", "sections of `key: value` lines"),
    text("a number", "7\n", "own.yaml holds 7", "sections of `key: value` lines"),
    text("two documents", f"{GOOD}---\n{GOOD}", "own.yaml:3:1: not valid YAML", "check"),
    text("a tab", "model:\n\tname: x\n", "own.yaml:2:1: not valid YAML", "indent with spaces, not with tabs"),
    text(
        "a bracket left open",
        "model: {config: {model_type: llama}\n",
        "own.yaml:2:1: not valid YAML",
        "check",
    ),
    text("a quote left open", "model: {name: 'x}\n", "own.yaml:2:1: not valid YAML", "quote"),
    text(
        "no space after the colon", "model:\n  name:x\n  lora: {}\n", "own.yaml:3:7: not valid YAML", "check"
    ),
    text(
        "wrong indentation", "train:\n  steps: 3\n seed: 1\n", "own.yaml:3:2: not valid YAML", "indentation"
    ),
    text("an unknown alias", "model: *base\n", "own.yaml:1:8: not valid YAML", "check"),
    text("code in a tag", "model: !!python/object/apply:os.system ['ls']\n", "own.yaml:1:8: not valid YAML"),
    text("a merge of no mapping", "train: {<<: 3}\n", "own.yaml:1:13: not valid YAML", "check"),
    text("a control character", "model: \x07\n", "own.yaml: not valid YAML", "remove"),
    text("a wrong explicit tag", "train: {steps: !!int many}\n", "own.yaml: not valid YAML", "many"),
    text("UTF-16", GOOD.encode("utf-16"), "own.yaml is not UTF-8 text", "save it as UTF-8"),
    text("Latin-1", b"log: {run_dir: M\xfcll}\n", "own.yaml is not UTF-8 text", "save it as UTF-8"),
    text("a binary file", bytes(range(128, 256)), "own.yaml is not UTF-8 text", "save it as UTF-8"),
    text("JSON lines", '{"text": "a"}\n{"text": "b"}\n', "own.yaml:2:1: not valid YAML", "check"),
    text(
        "a key twice",
        f"{GOOD}train: {{steps: 3, steps: 4}}\n",
        "own.yaml:3: train.steps stands on line 3",
        "keep one",
    ),
    text(
        "a section twice",
        f"{GOOD}data: {{pack: false}}\n",
        "own.yaml:3: data stands on line 2 already; keep one",
    ),
)

KEYS = (
    put("a slip in a key", "train.stepz=3", "train.stepz=3 is an unknown key; did you mean train.steps"),
    put("a slip in a section", "trian.steps=3", "trian is an unknown key; did you mean train?"),
    put("a key without its section", "steps=3", "steps=3 is an unknown key; did you mean train.steps?"),
    put("a key of another section", "train.lr=1", "train.lr=1 is an unknown key; did you mean optimizer.lr?"),
    put("a key of another trainer", "learning_rate=1", "did you mean optimizer.lr?"),
    put("another trainer's length", "max_seq_length=4k", "did you mean sequence.length?"),
    put("nothing like a key", "train.zzz=3", "train.zzz=3 is an unknown key;", "steps"),
    put("nothing like a section", "qqq=3", "qqq=3 is an unknown key;", "model, data"),
    text("an unknown section", f"{GOOD}wxyz: {{a: 1}}\n", "wxyz is an unknown key;"),
    text(
        "a dot in a key",
        f"{GOOD}train.steps: 3\n",
        "train.steps=3 has a dot in its key",
        "write it as a section",
    ),
    text("a number as a key", f"{GOOD}train: {{3: 4}}\n", "train.3=4 is an unknown key;", "steps"),
    put("a key below a value", "train.steps.more=3", "which is no section", "train.steps itself"),
    put(
        "an override without a value",
        "train.steps=",
        "has no value (an unset shell variable?); write train.steps=null",
    ),
    put("an override with an empty part", "train..steps=3", "has an empty key; write key=value"),
    put("an override of nothing", "=3", "has an empty key; write key=value"),
    put("an override that is no YAML", "optimizer.betas=[0.9,", "not valid YAML", "optimizer.betas"),
    put(
        "epochs over steps",
        "train.epochs=2",
        "train.epochs was overridden, but train.steps=4",
        "add train.steps=null",
    ),
    text("a section that is a number", f"{GOOD}train: 3\n", "train=3 must be a section with the keys steps"),
    text("a section that is a list", f"{GOOD}train: [steps]\n", "train=['steps'] must be a section"),
    Case(
        "a bare word",
        lambda place: ["train", place.yaml(), "train.steps"],
        ("train.steps", "has no `=`; write key=value"),
    ),
    Case(
        "an override with dashes",
        lambda place: ["train", place.yaml(), "--train.steps=3"],
        ("--train.steps=3", "try `longseq --help`"),
    ),
)

VALUES = (
    put("a word for a number", "optimizer.lr=fast", "optimizer.lr='fast' must be a number (above 0)"),
    put("a word for a count", "train.steps=many", "train.steps='many' must be a whole number (1 or above"),
    put("none for null", "train.steps=none", "train.steps='none' must be a whole number", "or null"),
    put("a list for a number", "optimizer.lr=[1,2]", "optimizer.lr=[1, 2] must be a number"),
    put("a section for a number", "optimizer.lr={a: 1}", "optimizer.lr={'a': 1} must be a number"),
    put("null for a number", "optimizer.lr=null", "optimizer.lr=null must be a number"),
    put("yes for a number", "train.steps=yes", "train.steps=true must be a whole number"),
    put("NaN", "optimizer.lr=.nan", "optimizer.lr=nan must be a number (above 0)"),
    put(
        "infinity", "optimizer.weight_decay=.inf", "optimizer.weight_decay=inf must be a number (0 or above)"
    ),
    put("NaN in a list", "optimizer.betas=[0.9,.nan]", "optimizer.betas=[0.9, nan] must be a list of 2"),
    put("zero where one is least", "train.steps=0", "train.steps=0 must be a whole number (1 or above"),
    put("a negative count", "train.steps=-3", "train.steps=-3 must be a whole number (1 or above"),
    put("a negative seed", "train.seed=-1", "train.seed=-1 must be a whole number (0 or above"),
    put("a learning rate of zero", "optimizer.lr=0", "optimizer.lr=0 must be a number (above 0)"),
    put("a negative learning rate", "optimizer.lr=-1e-4", "optimizer.lr=-0.0001 must be a number (above 0)"),
    put(
        "a share of one",
        "data.eval_fraction=1",
        "data.eval_fraction=1 must be a number (0 or above, below 1)",
    ),
    put(
        "a share in percent",
        "data.eval_fraction=5",
        "data.eval_fraction=5 must be a number (0 or above, below 1)",
    ),
    put("half a step", "train.steps=2.5", "train.steps=2.5 must be a whole number"),
    put("half a token", "sequence.length=0.3k", "sequence.length='0.3k' must be a whole number of tokens"),
    put(
        "a decimal comma", "sequence.length='1,5k'", "sequence.length='1,5k' must be a whole number of tokens"
    ),
    put(
        "a unit",
        "sequence.length=64kb",
        "sequence.length='64kb' must be a whole number of tokens",
        "64k is 65,536",
    ),
    put("a unit in words", "sequence.length='64 thousand'", "sequence.length", "64k is 65,536"),
    put(
        "a unit of memory",
        "sequence.loss_memory_mib=2GiB",
        "sequence.loss_memory_mib='2GiB' must be a whole number",
    ),
    put(
        "a huge exponent",
        "sequence.length=1e999999999",
        "sequence.length",
        "must be a whole number of tokens",
    ),
    put("an empty text", "model.name=''", "model.name='' must be text or null; it is empty"),
    put("an empty list", "data.source=[]", "data.source=[] must be", "it is empty"),
    put("a number for a text", "log.run_dir=2026", "log.run_dir=2026 must be text; put it in quotes"),
    put("on for a word", "checkpoint.resume=on", "checkpoint.resume=true must be text", "quotes"),
    put("null in a list", "data.source=[a.jsonl,null]", "data.source=['a.jsonl', None] must be"),
    put("a list too long", "optimizer.betas=[0.9,0.95,0.99]", "optimizer.betas", "must be a list of 2"),
    put("a list too short", "optimizer.betas=[0.9]", "optimizer.betas=[0.9] must be a list of 2"),
    put("a number for a list", "optimizer.betas=0.9", "optimizer.betas=0.9 must be a list of 2"),
    put(
        "a word that is no choice",
        "optimizer.name=sgd",
        "optimizer.name='sgd' must be adamw, apollo or apollo-mini",
    ),
    put("a slip in a choice", "schedule.name=cosin", "schedule.name='cosin'", "did you mean cosine?"),
    put("a choice in capitals", "train.precision=BF16", "train.precision='BF16'", "did you mean bf16?"),
    put("a precision there is not", "train.precision=fp16", "train.precision='fp16' must be float32 or bf16"),
    put("a stage there is not", "parallel.zero_stage=4", "parallel.zero_stage=4 must be 0, 1, 2, 3 or auto"),
    put("a stage of half", "parallel.zero_stage=1.5", "parallel.zero_stage=1.5 must be 0, 1, 2, 3 or auto"),
    put(
        "no for a choice",
        "sequence.save_attention=no",
        "sequence.save_attention=false must be none",
        "quotes",
    ),
    put("a word for a truth", "data.pack=maybe", "data.pack='maybe' must be true or false"),
    put("two for a truth", "data.pack=2", "data.pack=2 must be true or false"),
    put("a rank of zero", "model.lora={rank: 0}", "model.lora.rank=0 must be a whole number (1 or above"),
    put(
        "an adapter on nothing",
        "model.lora={target_modules: []}",
        "model.lora.target_modules=[] must be a list",
    ),
    put("an unknown key of adapters", "model.lora={r: 8}", "model.lora.r=8 is an unknown key"),
    put(
        "a growth limit of one",
        "optimizer.apollo.norm_growth_limit=1",
        "norm_growth_limit=1 must be a number (above 1)",
    ),
    put("nothing to keep", "checkpoint.keep=0", "checkpoint.keep=0 must be a whole number (1 or above"),
    put("a length that is a word", "sequence.length=long", "sequence.length='long'", "64k is 65,536"),
    put("a length past all numbers", "sequence.length=99999999999G", "sequence.length"),
    put(
        "a learning rate past all numbers",
        "optimizer.lr=1e400",
        "optimizer.lr=inf must be a number (above 0)",
    ),
)

TOGETHER = (
    put("no model", ("model.config={}",), "leave no model; name a checkpoint"),
    put("no model type", "model.config={hidden_size: 32}", "model.config.model_type=null must be named"),
    put("a number as a model type", "model.config.model_type=3", "model.config.model_type=3 must be named"),
    put("no tokenizer", "data.tokenizer=null", "data.tokenizer=null", "set data.tokenizer to bytes"),
    put(
        "a suffix in a shape",
        "model.config.hidden_size=4k",
        "hidden_size='4k' must be a whole number",
        "no 4k",
    ),
    put("a shape of zero", "model.config.num_hidden_layers=0", "num_hidden_layers=0 must be a whole number"),
    put(
        "a negative shape", "model.config.vocab_size=-1", "model.config.vocab_size=-1 must be a whole number"
    ),
    put("heads in uneven groups", "model.config.num_key_value_heads=3", "must divide", "use 1, 2 or 4"),
    put(
        "adapters on random weights",
        "model.lora={rank: 8}",
        "model.lora adapts a checkpoint's",
        "name a checkpoint",
    ),
    put(
        "nothing to evaluate on",
        ("data.eval_source=null", "data.eval_fraction=0", "train.eval_every=2"),
        "train.eval_every=2 has nothing to evaluate on",
        "set one of them",
    ),
    put("one token", "sequence.length=1", "sequence.length=1 leaves no token to predict; use 2 or more"),
    put(
        "less than two tokens a process",
        ("sequence.length=3", "parallel.ulysses_degree=2"),
        "sequence.length=3 leaves fewer than 2 tokens",
        "use 4 or more",
    ),
    put(
        "a length of uneven shards",
        ("sequence.length=127", "parallel.ulysses_degree=2"),
        "sequence.length=127 is no multiple of parallel.ulysses_degree=2",
        "use 126",
    ),
    put(
        "a length past the positions",
        "sequence.length=512",
        "sequence.length=512 is above model.config.max_position_embeddings=256; shorten it",
    ),
    put(
        "memory for a loss of logits",
        ("sequence.loss=logits", "sequence.loss_memory_mib=64"),
        "sequence.loss_memory_mib=64 has no effect",
        "set it to null",
    ),
    put(
        "every other layer of none",
        ("sequence.checkpoints=none", "sequence.checkpoint_every=2"),
        "sequence.checkpoint_every=2 has no effect",
        "set it to 1",
    ),
    put(
        "every other layer of auto",
        "sequence.checkpoint_every=2",
        "sequence.checkpoint_every=2",
        "set sequence.checkpoints=gpu",
    ),
    put(
        "head groups of no streaming",
        ("sequence.checkpoints=none", "sequence.head_groups=2"),
        "sequence.head_groups=2 has no effect",
        "set it to auto",
    ),
    put(
        "saved attention of no streaming",
        ("sequence.checkpoints=none", "sequence.save_attention=gpu"),
        "sequence.save_attention=gpu has no effect",
        "set it to none",
    ),
    put(
        "a degree that does not divide",
        ("parallel.num_gpus=4", "parallel.ulysses_degree=3", "train.global_batch_sequences=4"),
        "parallel.ulysses_degree=3 does not divide parallel.num_gpus=4; use 1, 2 or 4",
    ),
    put(
        "a degree above the heads",
        ("parallel.num_gpus=8", "parallel.ulysses_degree=8"),
        "parallel.ulysses_degree=8 is above model.config.num_attention_heads=4",
        "use 1, 2 or 4",
    ),
    put(
        "a batch that is not shared out",
        ("parallel.num_gpus=2", "train.global_batch_sequences=3"),
        "train.global_batch_sequences=3 must be a multiple of 2",
        "use 2 or 4",
    ),
    put(
        "a batch below a micro batch",
        ("train.global_batch_sequences=2", "train.micro_batch_sequences=4"),
        "train.global_batch_sequences=2 must be a multiple of 4",
        "use 4",
    ),
    put(
        "offload without shards",
        "parallel.offload_optimizer=cpu",
        "parallel.offload_optimizer='cpu' needs parallel.zero_stage 1, 2 or 3",
        "set parallel.zero_stage=1",
    ),
    put(
        "parameters offloaded from stage 2",
        ("parallel.offload_parameters=cpu", "parallel.zero_stage=2"),
        "parallel.offload_parameters='cpu' needs parallel.zero_stage 3",
        "set parallel.zero_stage=3",
    ),
    put(
        "DeepSpeed's file without ZeRO",
        "parallel.deepspeed_config={}",
        "parallel.deepspeed_config={} needs parallel.zero_stage",
    ),
    put(
        "DeepSpeed's file that is not there",
        ("parallel.zero_stage=1", "parallel.deepspeed_config=no.json"),
        "parallel.deepspeed_config='no.json'",
    ),
    put(
        "DeepSpeed's optimizer",
        ("parallel.zero_stage=1", "parallel.deepspeed_config={optimizer: {type: Adam}}"),
        "parallel.deepspeed_config: optimizer=",
        "remove the section",
    ),
    put(
        "DeepSpeed's other stage",
        ("parallel.zero_stage=1", "parallel.deepspeed_config={zero_optimization: {stage: 2}}"),
        "zero_optimization.stage=2 contradicts parallel.zero_stage=1",
        "remove the former",
    ),
    put(
        "APOLLO's settings for AdamW",
        "optimizer.apollo.rank=8",
        "optimizer.apollo.rank has no effect",
        "set optimizer.name=apollo",
    ),
    put(
        "factored embeddings with ZeRO",
        ("optimizer.name=apollo", "optimizer.apollo.embeddings=factored", "parallel.zero_stage=1"),
        "optimizer.apollo.embeddings",
        "parallel.zero_stage",
    ),
    put(
        "bf16 weights for AdamW",
        "optimizer.weights=bf16",
        "optimizer.weights='bf16' does not go with",
        "set these",
    ),
    put(
        "updates in backward with ZeRO",
        ("optimizer.in_backward=true", "parallel.zero_stage=1", "train.global_batch_sequences=1"),
        "optimizer.in_backward=true",
        "set these, or leave it out",
    ),
    put(
        "skipped steps with updates in backward",
        ("optimizer.in_backward=true", "train.on_nonfinite=skip", "train.global_batch_sequences=1"),
        "train.on_nonfinite='skip'",
        "set train.on_nonfinite=stop",
    ),
    put(
        "an action there is not",
        "train.on_nonfinite=ignore",
        "train.on_nonfinite='ignore' must be stop or skip",
    ),
    put(
        "updates in backward of two micro batches",
        "optimizer.in_backward=true",
        "optimizer.in_backward=true",
        "set train.global_batch_sequences=1",
    ),
    put(
        "warm-up without end",
        "schedule.warmup_steps=4",
        "schedule.warmup_steps=4 must be below train.steps=4; use 3",
    ),
    put(
        "a final ratio of a constant",
        "schedule.final_ratio=0.5",
        "schedule.final_ratio=0.5 has no effect",
        "remove it",
    ),
    put(
        "a final ratio above one",
        ("schedule.name=linear", "schedule.final_ratio=2"),
        "schedule.final_ratio=2 must be a number (0 or above, 1 or below)",
    ),
)


@parametrized((*FILES, *KEYS, *VALUES, *TOGETHER))
def test_a_bad_config_gets_a_way_out(
    case: Case, shop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(case, Place(tmp_path, shop, {}), capsys)
