from __future__ import annotations

from pathlib import Path

import numpy as np

from longseq.launch.data.lengths import describe_lengths, plot_lengths


def test_the_table_counts_each_document_between_powers_of_two() -> None:
    lines = describe_lengths(np.array([1, 2, 3, 4, 1023, 1024])).splitlines()
    # Powers of two are their bin's first length: 1024 is not where 1023 is.
    for name, count in {"1": 1, "2 to 3": 2, "4 to 7": 1, "512 to 1,023": 1, "1,024 to 2,047": 1}.items():
        [line] = [line for line in lines if line.strip().startswith(f"{name}  ")]
        assert line.removeprefix(line[: line.index(name)] + name).split()[0] == str(count)
    assert "6 documents, 2,057 tokens; median 3" in lines[-1]
    assert "longest 1,024" in lines[-1]


def test_no_documents_are_no_error() -> None:
    assert describe_lengths(np.empty(0, np.int64)) == "no documents"


def test_the_picture_is_whole(tmp_path: Path) -> None:
    plot_lengths(np.array([1, 70, 70, 5000]), tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["lengths.png"]
