"""safetensors written and read piece by piece are those of the library, and a file that is none is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from longseq.distributed import tensor_file
from longseq.distributed.checked_file import write_file
from longseq.distributed.state_files import WEIGHT, Piece, SavedState, piece_file
from longseq.distributed.tensor_file import DTYPES, StoredTensors, TensorFile, TensorSource


def tensors() -> dict[str, torch.Tensor]:
    """One of each dtype, of odd sizes; and one that is empty, one that is a number, one transposed."""
    draw = torch.Generator().manual_seed(0)
    made = {name: torch.randint(0, 2, (3, 7), generator=draw).to(dtype) for name, dtype in DTYPES.items()}
    rows = torch.randn(5, 3, generator=draw)
    return {**made, "empty": torch.zeros(0, 4), "number": torch.tensor(7.0), "transposed": rows.t()}


def written(path: Path, content: dict[str, torch.Tensor]) -> Path:
    sources = {key: TensorSource.of(tensor) for key, tensor in content.items()}
    write_file(path, TensorFile(path.name, sources, {"format": "pt"}))
    return path


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    wanted = tensors()
    found = load_file(written(tmp_path / "ours.safetensors", wanted))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].float(), tensor.float()), name


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    wanted = {name: tensor.contiguous() for name, tensor in tensors().items()}
    save_file(wanted, tmp_path / "theirs.safetensors", metadata={"a": "b"})
    stored = StoredTensors(tmp_path / "theirs.safetensors")
    assert stored.metadata == {"a": "b"}
    for name, tensor in wanted.items():
        assert stored.shapes[name] == tensor.shape
        found = stored.tensor(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found.float(), tensor.float()), name


def test_any_elements_are_read_into_any_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "BUFFER_BYTES", 12)  # three elements at a time
    values = torch.randn(4, 5)
    stored = StoredTensors(written(tmp_path / "a.safetensors", {"first": torch.ones(3), "a": values}))
    for start, stop in ((0, 20), (3, 4), (7, 19), (5, 5)):
        for out in (torch.zeros(stop - start), torch.zeros(stop - start, dtype=torch.bfloat16)):
            stored.read_into(out, "a", start)
            assert torch.equal(out, values.view(-1)[start:stop].to(out.dtype))
        strided = torch.zeros(stop - start, 2)
        stored.read_into(strided[:, 0], "a", start)
        assert torch.equal(strided[:, 0], values.view(-1)[start:stop])
        assert not strided[:, 1].any()


def test_one_tensor_at_a_time_is_asked_for(tmp_path: Path) -> None:
    alive: list[str] = []

    def source(name: str) -> TensorSource:
        def read() -> torch.Tensor:
            alive.append(name)
            assert (tmp_path / ".a.safetensors.partial").stat().st_size == sizes[name]
            return torch.ones(6)

        return TensorSource(torch.float32, (6,), read)

    file = TensorFile("a.safetensors", {name: source(name) for name in "xyz"}, {})
    head = len(file.head)
    sizes = {"x": head, "y": head + 24, "z": head + 48}  # each is written before the next is made
    write_file(tmp_path / "a.safetensors", file)
    assert alive == ["x", "y", "z"]
    assert (tmp_path / "a.safetensors").stat().st_size == file.num_bytes


def head_of(header: object) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


BROKEN = {
    "nothing": (b"", "it has 0 bytes, less than its header"),
    "short": (b"\x10", "it has 1 bytes, less than its header"),
    "a pickle": (b"\x80\x04\x95 some bytes that are no length", "less than its header"),
    "no JSON": ((5).to_bytes(8, "little") + b"zebra", "its header is no JSON"),
    "no object": (head_of([1]), "its header"),
    "no offsets": (head_of({"a": {"dtype": "F32", "shape": [1]}}), "data_offsets"),
    "a strange dtype": (
        head_of({"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}) + bytes(8),
        "a is of dtype C64",
    ),
    "another size": (
        head_of({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}) + bytes(8),
        "the place of a is not of its size",
    ),
    "cut off": (
        head_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}) + bytes(7),
        "and a ends at",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_no_safetensors_is_named(tmp_path: Path, name: str) -> None:
    data, reason = BROKEN[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors is no whole safetensors file") as refused:
        StoredTensors(path)
    assert reason in str(refused.value)
    with pytest.raises(ValueError, match=r"model\.safetensors is no whole safetensors file"):
        SavedState(tmp_path)
    with pytest.raises(ValueError, match=r"none\.safetensors cannot be read"):
        StoredTensors(tmp_path / "none.safetensors")


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.safetensors", {"a": torch.arange(4.0), "b": torch.zeros(3, dtype=torch.int8)}
    )
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"a\.safetensors is no whole safetensors file"):
            StoredTensors(path)


def test_a_file_that_grows_shorter_meanwhile_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", {"a": torch.arange(4.0)})
    stored = StoredTensors(path)
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(ValueError, match=r"a\.safetensors ends at byte \d+, before what it is said to hold"):
        stored.tensor("a")


def test_an_index_that_says_nothing_of_use_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_file(path, piece_file(path.name, [Piece("a", (2,), 0, {WEIGHT: torch.ones(2)})], num_files=1))
    for index in ("zebra", "[]", '{"num_files": 1}'):
        save_file({"a": torch.ones(2)}, path, metadata={"longseq": index})
        with pytest.raises(ValueError, match=r"model\.safetensors has an index that says nothing of use"):
            SavedState(tmp_path)
