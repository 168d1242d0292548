"""The fine-tuning story: its text and notes, its probes, and what it says of a kill and of a deadline."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from benchmark_modules import imported
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor, nn

NAMES = (
    *("report", "retrieval", "fine_tuning_shapes", "fine_tuning_text", "fine_tuning_notes"),
    *("fine_tuning_configs", "fine_tuning_corpus", "fine_tuning_results", "fine_tuning_story", "fine_tuning"),
)
PARTS = ("copy", "look", "short", "long", "long-text", "heldout", "probes")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The modules of the folder, as the script imports them, and gone afterwards."""
    yield from imported(monkeypatch, NAMES)


@pytest.fixture
def packages(bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Packages of a few files: what is installed differs from machine to machine."""
    words = [f"word{letter}{other}" for letter in "abcdefgh" for other in "abcdefgh"]
    names = [f"{first}{second}{third}" for first in "bdgk" for second in "aeo" for third in ("lum", "rin")]
    found: dict[str, list[Path]] = {}
    for package in range(8):
        folder = tmp_path / "installed" / f"package{package}"
        folder.mkdir(parents=True)
        for number in range(4):
            lines = [
                f"    {words[(line * 7 + number + package) % 64]} = {names[(line + package) % 24]}({line})"
                for line in range(60)
            ]
            path = folder / f"file{number}.py"
            path.write_text("def run():\n" + "\n".join(lines) + "\n")
            found.setdefault(folder.name, []).append(path)
        copy = folder / "copy.py"
        copy.write_text(path.read_text())
        found[folder.name].append(copy)
    monkeypatch.setattr(bench["fine_tuning_text"], "packages", lambda: found)


def documents_of(path: Path) -> list[str]:
    """Of tokens, as they are read by the tokenizer beside them, without bos and eos."""
    from transformers import AutoTokenizer

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if "text" in rows[0]:
        return [row["text"] for row in rows]
    if "messages" in rows[0]:
        return ["".join(message["content"] for message in row["messages"]) for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(path.parent / "tokenizer")
    assert all(row["input_ids"][0] == tokenizer.bos_token_id for row in rows)
    assert all(row["input_ids"][-1] == tokenizer.eos_token_id for row in rows)
    return tokenizer.batch_decode([row["input_ids"][1:-1] for row in rows])


@pytest.mark.usefixtures("packages")
def test_corpus_is_the_same_each_time_and_notes_are_asked(bench, tmp_path: Path) -> None:
    shape = bench["fine_tuning_shapes"].SHAPES["tiny"]
    facts = bench["fine_tuning_corpus"].build(shape, tmp_path / "one")
    bench["fine_tuning_corpus"].build(shape, tmp_path / "two")
    for name in PARTS:
        one, two = ((tmp_path / folder / f"{name}.jsonl").read_bytes() for folder in ("one", "two"))
        assert one == two, name
    kinds = {run.name: {kind[2:5] for kind in run.kinds} for run in shape.base}
    assert [len(some) for some in kinds.values()] == [1, 2, 2]
    long = {(shape.long_notes, 4, 1)}  # an earlier answer would be nearer than the note
    parts = (
        *(("copy", kinds["copy"], 128), ("look", kinds["look"], 256), ("short", kinds["short"], 256)),
        *(("long", long, 1024), ("long-text", long, 1024), ("heldout", long, 1024)),
    )
    for part, wanted, length in parts:
        found = documents_of(tmp_path / "one" / f"{part}.jsonl")
        assert len(found) == facts[part]["documents"]
        assert {planted(text) for text in found} == wanted
        assert facts[part]["longest_tokens"] == length
        assert facts[part]["notes"] == sum(notes * asks for notes, _, asks in map(planted, found))
    trained = [documents_of(tmp_path / f"one/{part}.jsonl") for part in ("short", "long", "long-text")]
    text = "".join(itertools.chain(*trained))
    assert not [package for package in facts["heldout_packages"] if f"# file: {package}/" in text]
    assert "/file3.py" in text
    assert "/copy.py" not in text  # a text counts once


def planted(text: str) -> tuple[int, int, int]:
    """How many notes, words of each, and questions of each, all of them behind their notes and right."""
    codes: dict[str, str] = {}
    asked: dict[str, int] = {}
    for kind, line in re.findall("# (note|asked):<([a-z><]+)>\n", text):
        name, *words = line.split("><")
        if kind == "note":
            assert name not in codes
            codes[name] = "-".join(words)
        else:
            assert codes[name] == "-".join(words)
            asked[name] = asked.get(name, 0) + 1
    drawn = [word for name, code in codes.items() for word in (name, *code.split("-"))]
    assert len(set(drawn)) == len(drawn), "a word says which is next, since it is nowhere else"
    (asks,) = set(asked.values())
    assert asked.keys() == codes.keys()
    (words,) = {code.count("-") + 1 for code in codes.values()}
    return len(codes), words, asks


@pytest.mark.usefixtures("packages")
def test_tokens_are_those_of_the_saved_tokenizer(bench, tmp_path: Path) -> None:
    """A run tokenises the text again: lengths and distances must be what the corpus says."""
    from transformers import AutoTokenizer

    shape = bench["fine_tuning_shapes"].SHAPES["tiny"]
    facts = bench["fine_tuning_corpus"].build(shape, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert len(tokenizer) == facts["vocab_size"] <= shape.vocab_size
    rows = [json.loads(line)["input_ids"] for line in (tmp_path / "short.jsonl").read_text().splitlines()]
    texts = documents_of(tmp_path / "short.jsonl")
    assert [row[1:-1] for row in rows] == tokenizer(texts, add_special_tokens=False).input_ids
    for part in ("short", "long", "long-text", "heldout"):
        found = documents_of(tmp_path / f"{part}.jsonl")
        lengths = [len(tokenizer(text, add_special_tokens=False).input_ids) + 2 for text in found]
        assert set(lengths) == ({128, 256} if part == "short" else {1024})
        assert sum(lengths) == facts[part]["tokens"]
        assert (min(lengths), max(lengths)) == (
            facts[part]["shortest_tokens"],
            facts[part]["longest_tokens"],
        )
    for probe in probes_of(tmp_path):
        whole, control = (tokenizer.convert_ids_to_tokens(probe[part]) for part in ("ids", "control"))
        for ask in probe["asks"]:
            asked_at = len(whole) - ask["from_end"]
            noted_at = asked_at - ask["distance_tokens"]
            assert len(ask["code"]) == 4
            assert whole[asked_at : asked_at + 4] == whole[noted_at : noted_at + 4] == ask["code"]
            assert whole[asked_at - 1] == whole[noted_at - 1] == ask["name"]
            assert (
                abs(ask["distance_tokens"] - ask["wished_tokens"]) < 80
            )  # planted lines, and one of the text
            assert control[len(control) - ask["control_from_end"] :][:4] == ask["code"]
            for word in (ask["name"], *ask["code"]):
                assert whole.count(word) == 2
                assert control.count(word) == 1


def probes_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "probes.jsonl").read_text().splitlines()]


def test_a_line_that_no_document_has_room_for_is_left_out(bench) -> None:
    notes, shapes = bench["fine_tuning_notes"], bench["fine_tuning_shapes"]
    words = bench["fine_tuning_text"].made_up_words(8)
    vocabulary = {word: at for at, word in enumerate(["<|bos|>", "<|eos|>", "\n", "#", *words])}
    tokenizer = SimpleNamespace(
        token_to_id=vocabulary.get,
        encode=lambda text: SimpleNamespace(ids=[2] if text == "\n" else [3] * 5),
    )
    lines = bench["fine_tuning_text"].Lines(
        ["short\n"] * 9 + ["long\n"] + ["short\n"] * 9, [[9] * 8] * 9 + [[9] * 90] + [[9] * 8] * 9
    )
    kind = shapes.Kind(1, 64, notes=1, words=4, asks=1)
    found = list(notes.documents(lines, [kind], notes.Notes(tokenizer, 8, "seed")))
    assert [len(document.ids) for document in found] == [64, 64, 64]
    text = "".join(document.text for document in found)
    assert "long" not in text
    assert text.count("short") == sum(document.used for document in found) == 14


@pytest.mark.usefixtures("packages")
def test_looking_is_shown_at_many_distances(bench, tmp_path: Path) -> None:
    """A model would learn a distance, if there were a few of them, and not to look for the word."""
    shape = bench["fine_tuning_shapes"].SHAPES["tiny"]
    bench["fine_tuning_corpus"].build(shape, tmp_path)
    rows = [json.loads(line)["input_ids"] for line in (tmp_path / "look.jsonl").read_text().splitlines()]
    tokenizer = FastTokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    words = {tokenizer.token_to_id(word) for word in bench["fine_tuning_text"].made_up_words(shape.words)}
    found: set[int] = set()
    for row in rows:
        name = next(word for word in row if word in words)
        first, *others = [at for at, word in enumerate(row) if word == name]
        assert len(others) in {kind.asks for kind in shape.base[1].kinds}
        found |= {at - first for at in others}
    assert len(found) > 20


@pytest.mark.parametrize(("far", "below_100", "above_2500"), [(False, 0.307, 0.209), (True, 0.187, 0.364)])
def test_some_distances_of_long_documents_are_long(
    bench, far: bool, below_100: float, above_2500: float
) -> None:
    """Shares by arithmetic: of 13 to 9,968 tokens by their logarithms, and half by their roots."""
    notes, shapes = bench["fine_tuning_notes"], bench["fine_tuning_shapes"]
    tokenizer = SimpleNamespace(
        token_to_id=lambda word: 1, encode=lambda text: SimpleNamespace(ids=[0] * len(text))
    )
    kind = shapes.Kind(1, 10_000, notes=2000, words=4, asks=1, far=far)
    places = notes.Notes(tokenizer, 8, "seed").places(kind)
    distances = sorted(asked_at - note_at for note_at, asked_at in places)
    note = len(notes.NOTE) + 1 + 4 + 1
    assert distances[0] >= note - 1
    assert 9_000 < distances[-1] < 10_000 - 2 * note
    assert sum(distance < 100 for distance in distances) / 2000 == pytest.approx(below_100, abs=0.03)
    assert sum(distance > 2500 for distance in distances) / 2000 == pytest.approx(above_2500, abs=0.03)
    assert all(0 <= note_at < 10_000 - note for note_at, _ in places)


@pytest.mark.usefixtures("packages")
def test_loss_of_the_looking_is_that_of_answers(bench, tmp_path: Path) -> None:
    """Each of them comes behind the same word a second time."""
    shape = bench["fine_tuning_shapes"].SHAPES["tiny"]
    bench["fine_tuning_corpus"].build(shape, tmp_path)
    kinds = {kind.tokens: kind for kind in shape.base[1].kinds}
    for line in (tmp_path / "look.jsonl").read_text().splitlines():
        ids, labels = json.loads(line).values()
        answers = [at for at, label in enumerate(labels) if label != -100]
        _, notes, words, asks = kinds[len(ids)][1:5]
        assert len(labels) == len(ids)
        assert len(answers) == notes * words * asks
        pairs = list(itertools.pairwise(ids))
        assert all(labels[at] == ids[at] and pairs.index(pairs[at - 1]) < at - 1 for at in answers)
    for name in ("copy", "short"):
        assert "labels" not in json.loads((tmp_path / f"{name}.jsonl").read_text().splitlines()[0])


@pytest.mark.usefixtures("packages")
def test_loss_of_the_conversations_is_that_of_answers(bench, tmp_path: Path) -> None:
    """As a run reads them: all tokens of a document, and loss on the codes that answer alone."""
    from transformers import AutoTokenizer

    from longseq.launch.data.encode import Encoder
    from longseq.launch.data.rows import Document

    shape = bench["fine_tuning_shapes"].SHAPES["tiny"]
    bench["fine_tuning_corpus"].build(shape, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    encoder, texts = Encoder(tokenizer), documents_of(tmp_path / "long.jsonl")
    for line, text in zip((tmp_path / "long.jsonl").read_text().splitlines(), texts, strict=True):
        encoded = encoder.encode(Document("messages", json.loads(line), "long.jsonl"))
        ids = encoded.tokens.tolist()
        assert tokenizer.decode(ids) == f"{tokenizer.bos_token}{text}{tokenizer.eos_token}"
        learned = [tokenizer.decode(ids[start:stop]) for start, stop in encoded.runs.tolist()]
        asked = re.findall("# asked:<[a-z]+>(.+)\n", text)
        assert learned == asked
        assert len(asked) == shape.long_notes


def test_a_run_that_has_learned_enough_ends(bench) -> None:
    is_learned = bench["fine_tuning"].is_learned
    steps = [step(number, 3.0 if number < 5 else 0.25, 0.1) for number in range(24)]
    assert not is_learned(steps, enough=0.3)
    assert is_learned([*steps, step(24, 0.25, 0.1)], enough=0.3)
    assert not is_learned(steps[-19:], enough=0.3)
    assert not is_learned([*steps, step(24, 0.25, 0.1)], enough=0.0)


def test_a_run_has_as_many_tokens_as_are_wished(bench, tmp_path: Path) -> None:
    corpus = bench["fine_tuning_corpus"]
    writer = corpus.Writer(tmp_path / "short.jsonl")
    some = [corpus.Written(json.dumps({"text": str(number)}) + "\n", 30, [9]) for number in range(4)]
    writer.add(some, 100)
    writer.add(some, 100)
    assert writer.total == writer.end()["tokens"] == 120
    assert len((tmp_path / "short.jsonl").read_text().splitlines()) == 4


@pytest.mark.usefixtures("packages")
def test_made_up_words_are_part_of_the_vocabulary(bench) -> None:
    text = bench["fine_tuning_text"]
    texts = [one for some in text.read_packages(1).values() for one in some]
    tokenizer = text.train_tokenizer(texts, 400, 64)
    assert tokenizer.get_vocab_size() == 400
    words = text.made_up_words(64)
    assert len(set(words)) == 64
    assert tokenizer.encode("".join(words)).ids == list(range(336, 400))


def test_kinds_have_room_for_their_notes(bench) -> None:
    """With some left for text: a line of it that has no room is lost."""
    for shape in bench["fine_tuning_shapes"].SHAPES.values():
        for kind in (*(kind for run in shape.base for kind in run.kinds), shape.long_kind):
            planted = kind.notes * (1 + kind.asks) * (kind.words + 6)
            assert planted <= kind.tokens - 2 if kind in shape.base[0].kinds else planted < 0.85 * kind.tokens
            assert kind.notes * (kind.words + 1) <= shape.words
        base = [kind for run in shape.base for kind in run.kinds]
        assert not any(shape.short_length % kind.tokens for kind in base)  # no padding
        assert len(shape.distances) * shape.asks_a_distance * 5 <= shape.words


class Copier:
    """Says what followed the last three tokens where they stood before, if that is near; else a wrong one."""

    def __init__(self, vocab_size: int, reach: int, surety: float) -> None:
        self.reach, self.surety = reach, surety
        self.lm_head = nn.Linear(vocab_size, vocab_size, bias=False)
        nn.init.eye_(self.lm_head.weight)

    def model(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        ids: Sequence[int] = input_ids[0].tolist()
        hidden = torch.zeros(1, len(ids), self.lm_head.in_features)
        for place in range(2, len(ids)):
            guess = 0
            for before in range(place - 1, max(1, place - self.reach - 1), -1):
                if ids[before - 2 : before + 1] == ids[place - 2 : place + 1]:
                    guess = ids[before + 1]
                    break
            hidden[0, place, guess] = self.surety
        return SimpleNamespace(last_hidden_state=hidden)


def drawn_probe(distances: Sequence[int]) -> dict:
    """Text whose tokens (100 and up) never come again, with codes behind names of three tokens each."""
    filler = iter(range(100, 1000))
    length = 2 * max(distances) + 60
    ids = [next(filler) for _ in range(length)]
    control, asks = list(ids), []
    for number, distance in enumerate(distances):
        planted = list(range(1 + 11 * number, 12 + 11 * number))
        asked_at = length - 15 * (number + 1)
        for some in (ids, control):
            some[asked_at - 3 : asked_at + 8] = planted
        ids[asked_at - distance - 3 : asked_at - distance + 8] = planted
        ask = {"code": "12345678", "wished_tokens": distance, "distance_tokens": distance}
        asks.append({**ask, "from_end": length - asked_at, "control_from_end": length - asked_at})
    return {"ids": ids, "control": control, "asks": asks}


def test_a_model_that_copies_from_near_finds_what_is_near(bench) -> None:
    retrieval = bench["retrieval"]
    probe = drawn_probe([60, 100, 200])
    rows = list(
        retrieval.score(Copier(1000, reach=150, surety=20.0), [probe, probe], [64, len(probe["ids"])])
    )
    near, middle, far = retrieval.by_distance(rows)
    assert [row["asks"] for row in (near, middle, far)] == [2, 2, 2]
    assert near["found"] == middle["found"] == 1
    assert near["loss"] == pytest.approx(0, abs=1e-3)
    assert far["found"] == far["control_found"] == near["control_found"] == 0
    # The right tokens, at 0, against a wrong one at 20.
    assert far["loss"] == pytest.approx(20, abs=1e-2)
    assert far["control_loss"] == pytest.approx(20, abs=1e-2)


def test_the_control_is_read_where_its_codes_are(bench) -> None:
    """It lacks notes that lie behind a question, so that the code is nearer to its end."""
    probe = drawn_probe([40])
    probe["control"] = probe["ids"][:-2]
    probe["asks"][0]["control_from_end"] -= 2
    (row,) = bench["retrieval"].score(Copier(1000, 150, 20.0), [probe], [len(probe["ids"])])
    assert row["asks"][0]["found"] is row["asks"][0]["control_found"] is True


def test_the_end_of_a_document_has_the_near_notes_alone(bench) -> None:
    retrieval, probe = bench["retrieval"], drawn_probe([60, 200])
    end = retrieval.end_of(probe, 128)
    assert len(end["ids"]) == len(end["control"]) == 128
    assert (end["ids"][0], end["ids"][1:]) == (probe["ids"][0], probe["ids"][-127:])
    near, far = retrieval.by_distance(list(retrieval.score(Copier(1000, 500, 20.0), [end], [4096])))
    assert (near["found"], far["found"]) == (1, 0)


def test_a_code_is_found_if_all_its_digits_are(bench) -> None:
    probe = drawn_probe([40])
    at = len(probe["ids"]) - probe["asks"][0]["from_end"]
    probe["ids"][at + 7] = 99  # the last digit is another one than was noted
    (row,) = bench["retrieval"].score(Copier(1000, 150, 20.0), [probe], [len(probe["ids"])])
    assert row["asks"][0]["found"] is False
    assert row["asks"][0]["loss"] == pytest.approx(20 / 8, abs=1e-2)


def test_loss_by_position_covers_each_token_once(bench) -> None:
    probe = drawn_probe([40, 100])
    model, length = Copier(1000, 150, 3.0), len(probe["ids"])
    (row,) = bench["retrieval"].score(model, [probe], [50, 120, 4096])
    ids = torch.tensor(probe["control"])
    logits = model.lm_head(model.model(ids[None], use_cache=False).last_hidden_state[0])
    losses = nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none").detach()
    assert [place["tokens"] for place in row["positions"]] == [49, 70, length - 120]
    parts = losses.split([49, 70, length - 120])
    assert [place["nll"] for place in row["positions"]] == pytest.approx(
        [float(part.sum()) for part in parts]
    )
    means = [found["loss"] for found in bench["retrieval"].by_position([row, row])]
    assert means == pytest.approx([float(part.mean()) for part in parts])


def step(number: int, loss: float, seconds: float) -> dict:
    return {"kind": "step", "step": number, "loss": loss, "seconds": seconds}


def test_steps_taken_again_are_compared(bench) -> None:
    compare = bench["fine_tuning"].compare
    before = [step(1, 3.0, 0.1), step(2, 2.5, 0.2), step(3, 2.25, 0.3)]
    again = [step(1, 3.0, 0.1), step(2, 2.5, 0.25), step(3, 2.25, 0.35), step(4, 2.0, 0.1)]
    found = compare(before, again)
    assert (found["steps_again"], found["equal"], found["largest_difference"]) == ([2, 3], True, 0)
    again[2]["loss"] = 2.5
    found = compare(before, again)
    assert (found["equal"], found["largest_difference"]) == (False, 0.25)
    assert compare(before[:1], again)["equal"] is False  # nothing was taken again: nothing is shown
    assert compare(before, again[:2])["steps_again"] == [2]  # it was stopped before it had come as far


def test_a_run_is_killed_only_behind_a_whole_checkpoint(bench, tmp_path: Path) -> None:
    is_past = bench["fine_tuning"].is_past_checkpoint
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(step(n, 1.0, 0.1)) + "\n" for n in range(1, 5))
    )
    (checkpoints / "latest").write_text("step-00000001")
    assert not is_past(tmp_path, 2, 1)
    (checkpoints / "step-00000002").mkdir()
    assert is_past(tmp_path, 2, 1)
    assert is_past(tmp_path, 2, 2)
    assert not is_past(tmp_path, 2, 3)


def test_time_counts_from_the_first_step(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fine_tuning = bench["fine_tuning_story"]
    clock, sent = SimpleNamespace(now=100.0), []
    monkeypatch.setattr(
        fine_tuning, "time", SimpleNamespace(perf_counter=lambda: clock.now, sleep=lambda _: None)
    )
    process = SimpleNamespace(send_signal=sent.append)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(json.dumps(step(1, 1.0, 0.1)) + "\n")  # of the process that was killed
    stop = fine_tuning.stop_when(tmp_path, lambda seconds: seconds > 10, never_s=60)
    for seconds in (0, 50):
        clock.now += seconds
        assert stop(process) is None
    with metrics.open("a") as file:
        file.write(json.dumps(step(2, 1.0, 0.1)) + "\n")
    for seconds in (0, 5, 4):
        clock.now += seconds
        assert stop(process) is None
    assert not sent
    clock.now += 2
    assert "SIGTERM" in stop(process)
    assert sent == [fine_tuning.signal.SIGTERM]

    stop = fine_tuning.stop_when(tmp_path / "none", lambda seconds: seconds > 10, never_s=60)
    clock.now += 59
    assert stop(process) is None
    clock.now += 2
    with pytest.raises(fine_tuning.NeverStartedError, match="took no step in 60 s"):
        stop(process)


@pytest.fixture
def story(bench, tmp_path: Path):
    """Whose commands are Python's own, in the place of `longseq`'s."""
    args = {"shape": "tiny", "work": tmp_path / "work", "out": tmp_path / "out", "deadline_s": 60}
    steps = dict.fromkeys(("base_steps", "base_lr", "long_steps", "long_lr"))
    return bench["fine_tuning_story"].Story(SimpleNamespace(**args, **steps))


def test_steps_are_given_in_the_order_of_the_runs(bench, story, tmp_path: Path) -> None:
    args = {"shape": "tiny", "work": tmp_path / "other", "out": tmp_path, "deadline_s": 60, "base_lr": None}
    args |= {"base_steps": [7, 8, 9], "long_steps": 3, "long_lr": 0.5}
    other = bench["fine_tuning_story"].Story(SimpleNamespace(**args)).shape
    assert [(run.name, run.steps) for run in other.base] == [("copy", 7), ("look", 8), ("short", 9)]
    assert (other.long_steps, other.long_lr, other.base_lr) == (3, 0.5, story.shape.base_lr)


def test_a_command_that_does_not_get_going_is_ended_and_quoted(bench, story) -> None:
    said = "import sys, time; print('still preparing', file=sys.stderr, flush=True); time.sleep(60)"

    def watch(process) -> None:
        if any("still" in path.read_text() for path in story.work.glob("*.log")):
            raise bench["fine_tuning_story"].NeverStartedError("took no step in 1 s")

    with pytest.raises(SystemExit, match="took no step in 1 s; the end of what it said:\nstill preparing"):
        story.run("train", [bench["fine_tuning_story"].sys.executable, "-c", said], "train", watch)
    assert story.facts["commands"][-1]["ended"] == "took no step in 1 s"


def test_a_command_that_does_not_stop_when_asked_is_killed(bench, story, monkeypatch) -> None:
    monkeypatch.setattr(bench["fine_tuning_story"], "STOP_S", 0.2)
    said = "import time; time.sleep(60)"
    story.run("train", [bench["fine_tuning_story"].sys.executable, "-c", said], "train", lambda _: "asked")
    assert story.facts["commands"][-1]["ended"] == "asked, and killed 0.2 s later"


def test_a_deadline_shortens_the_second_stage(bench) -> None:
    fine_tuning, shape = bench["fine_tuning"], bench["fine_tuning_shapes"].SHAPES["full"]
    steps = [
        fine_tuning.steps_in_time(SimpleNamespace(shape=shape, left_s=left_s), 2.0)
        for left_s in (3600.0, 210.0, 10.0)
    ]
    assert steps[0] == shape.long_steps
    assert 2 * shape.checkpoint_every < steps[1] < shape.long_steps
    assert steps[2] == 2 * shape.checkpoint_every
    # What is left is not gone before the steps are: those of the kill come twice.
    assert (steps[1] + shape.kill_after) * 2.0 + 2 * fine_tuning.START_S + fine_tuning.PROBE_S < 210


def test_configs_are_valid_and_the_second_goes_on_from_the_first(bench, tmp_path: Path) -> None:
    from longseq.launch.config import RunConfig
    from longseq.launch.config_file import load_config

    fine_tuning = bench["fine_tuning"]
    for shape in bench["fine_tuning_shapes"].SHAPES.values():
        found: list[RunConfig] = []
        for name, config in (
            *((name, fine_tuning.base_config(shape, name)) for name in bench["fine_tuning_shapes"].BASE),
            ("long", fine_tuning.long_config(shape)),
        ):
            fine_tuning.write_yaml(tmp_path / f"{name}.yaml", config)
            found.append(load_config(str(tmp_path / f"{name}.yaml")))
        assert [run.name for run in shape.base] == list(bench["fine_tuning_shapes"].BASE)
        assert found[0].model.config["max_position_embeddings"] >= found[-1].sequence.length
        assert [config.model.name for config in found[1:]] == ["copy-model", "look-model", "short-model"]
        assert [config.schedule.name for config in found] == ["constant", "constant", "cosine", "cosine"]
        assert max(shape.distances) + 1000 * (shape.long_length > 2000) < shape.long_length
        # The kill comes behind the first checkpoint and before the last step.
        assert shape.checkpoint_every + shape.kill_after < 2 * shape.checkpoint_every <= shape.long_steps


def test_tables_are_written_from_what_is_there(bench, tmp_path: Path) -> None:
    results, probe = bench["fine_tuning_results"], drawn_probe([40, 100])
    story = {
        "shape": "tiny",
        "commands": [{"command": "longseq train x.yaml", "seconds": 1.5, "ended": "done"}],
    }
    results.write(story, tmp_path, tmp_path / "out", show=False)
    assert not (tmp_path / "out" / "fine_tuning_tiny.png").exists()
    rows = list(bench["retrieval"].score(Copier(1000, 60, 20.0), [probe], [64, 4096]))
    (tmp_path / "probe-long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results.write(story, tmp_path, tmp_path / "out", show=False)
    found = json.loads((tmp_path / "out" / "fine_tuning_tiny.json").read_text())
    assert [(row["model"], row["wished_tokens"], row["found"]) for row in found["rows"]] == [
        ("long", 40, 1),
        ("long", 100, 0),
    ]
    assert found["commands"] == story["commands"]
    assert "`longseq train x.yaml`" in (tmp_path / "out" / "fine_tuning_tiny.md").read_text()
    assert (tmp_path / "out" / "fine_tuning_tiny.png").stat().st_size > 1000


@pytest.mark.parametrize(("gpu", "is_there"), [("NVIDIA H200", True), ("h100-80g", False)])
def test_a_plan_for_another_machine_is_not_beside_the_run(
    bench, tmp_path: Path, gpu: str, is_there: bool
) -> None:
    run = dict.fromkeys(
        ("parameters", "length", "steps", "tokens", "lr", "step_s", "peak_gib", "last_loss"), 7
    )
    run |= {"evals": [], "planned": {"step_s": 0.125, "peak_gib": 1.75, "gpu": gpu}}
    story = {"shape": "tiny", "commands": [], "long": run}
    bench["fine_tuning_results"].write(story, tmp_path, tmp_path, show=False)
    text = (tmp_path / "fine_tuning_tiny.md").read_text()
    assert ("0.125" in text, "1.75" in text) == (is_there, is_there)
