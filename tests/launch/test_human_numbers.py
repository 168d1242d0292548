import pytest

from longseq.launch.human_numbers import parse_count, parse_tokens, refuse_bool


@pytest.mark.parametrize(
    ("written", "tokens", "count"),
    [
        (4096, 4096, 4096),
        (4096.0, 4096, 4096),
        ("131072", 131072, 131072),
        ("131_072", 131072, 131072),
        ("131,072", 131072, 131072),
        ("64k", 65536, 64000),
        ("64K", 65536, 64000),
        ("1M", 1048576, 1_000_000),
        ("2g", 2 * 1024**3, 2_000_000_000),
        ("1.5k", 1536, 1500),
        (".5k", 512, 500),
        (" 128 k ", 131072, 128000),
        ("1e3", 1000, 1000),
        ("-4k", -4096, -4000),
    ],
)
def test_people_write_numbers_in_many_ways(written, tokens, count):
    assert parse_tokens(written) == tokens
    assert parse_count(written) == count
    assert type(parse_tokens(written)) is int


@pytest.mark.parametrize("value", ["auto", "none", "", None, [1], "k", "Infinity"])
def test_what_is_no_number_is_left_alone(value):
    assert parse_tokens(value) is value
    assert parse_count(value) is value


@pytest.mark.parametrize(
    "value", ["12x", "64kb", "1,5k", "1__0", "12 34", "1.2.3", "1e999999999", 0.5, "1.0001k", float("inf")]
)
def test_what_is_half_a_number_is_refused_with_an_example(value):
    with pytest.raises(ValueError, match="number; write one such as 4096, 64k"):
        parse_tokens(value)


@pytest.mark.parametrize("parse", [parse_tokens, parse_count, refuse_bool])
def test_a_truth_value_is_no_number(parse):
    with pytest.raises(ValueError, match="True is a truth value"):
        parse(True)


def test_a_decimal_is_exact_or_refused():
    assert parse_count("1.1M") == 1_100_000
    assert parse_count("1000000.000001M") == 1_000_000_000_001
