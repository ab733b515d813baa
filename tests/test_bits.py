"""The net of bits: ops, runs with both ranges 0, and stored checkpoints give what they gave at the commit that wrote them."""

import pytest
import torch

from . import bits
from .tolerances import CONTINUED, CONTINUED_BFLOAT16, GOLDEN_META

GOLDEN = bits.golden()


def assert_hashes(case, parts, expected):
    found = bits.hashed(parts)
    differing = [part for part in {**expected, **found} if found.get(part) != expected.get(part)]
    assert not differing, f"{case}: other bits in {', '.join(differing)} (tests/bits.py says when they may change)"


def test_every_case_has_hashes():
    assert GOLDEN["portable"].keys() == bits.PORTABLE.keys()
    assert GOLDEN["continued, ranges 0"].keys() == GOLDEN["continued, values"].keys() == bits.CHECKPOINT_KINDS.keys()


@pytest.mark.parametrize("case", GOLDEN["portable"])
def test_bits_are_those_of_before(case):
    assert_hashes(case, bits.PORTABLE[case](), GOLDEN["portable"][case])


@pytest.mark.parametrize("threads", [1, 3])
def test_bits_do_not_depend_on_threads(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for case in ("tensor_stats: float32", f"{bits.STEPS} steps: float32, lagged, max_grad_norm"):
            assert_hashes(case, bits.PORTABLE[case](), GOLDEN["portable"][case])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", bits.CHECKPOINT_KINDS)
def test_a_stored_checkpoint_goes_on_with_the_bits_of_before(kind):
    assert_hashes(kind, bits.continued(kind, **bits.OFF), GOLDEN["continued, ranges 0"][kind])


@pytest.mark.parametrize("kind", bits.CHECKPOINT_KINDS)
def test_a_stored_checkpoint_goes_on_with_its_encoder(kind):
    parts, expected = bits.continued(kind), GOLDEN["continued, values"][kind]
    assert parts.keys() == expected.keys()
    low = bits.CHECKPOINT_KINDS[kind][1].get("dtype") == torch.bfloat16
    for name, numbers in bits.values(parts).items():
        tolerance = CONTINUED_BFLOAT16 if low and name in ("params", "exp_avg", "exp_avg_sq") else CONTINUED
        tolerance = GOLDEN_META if name in ("total", "log_vars", "head") else tolerance
        actual, golden = (torch.tensor(x, dtype=torch.float64) for x in (numbers, expected[name]))
        torch.testing.assert_close(actual, golden, **tolerance, msg=lambda m, n=name: f"{kind}, {n}: {m}")
    assert any(abs(x - 1.0) > 1e-2 for x in expected["lr_scale"])  # the encoder has its say


def test_the_comparison_names_what_differs():
    there = {"a": {"params": "1", "step": "2"}, "b": {"params": "3"}, "c": {"error": "E"}, "gone": {"params": "4"}}
    here = {"a": {"params": "1", "step": "2"}, "b": {"params": "5"}, "c": {"error": "E"}, "new": {"params": "6"}}
    lines, same = bits.compared(here, there)
    assert not same
    assert lines == [
        "same     a",
        "differs  b: params",
        "differs  c: error, E, E",
        "differs  gone: params",
        "differs  new: params",
    ]
    assert bits.compared({"a": here["a"]}, {"a": there["a"]}) == (["same     a"], True)


@pytest.mark.parametrize(
    "arguments", [[], ["--against"], ["--write", "--against", "HEAD"], ["--unknown"]], ids=["none", "no commit", "two", "unknown"]
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        bits.main(arguments)
    assert error.value.code == 2
    assert "usage: python -m tests.bits" in capsys.readouterr().err


def test_a_dump_refuses_code_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(bits, "PORTABLE", {})
    monkeypatch.setattr(bits, "LOCAL", {})
    with pytest.raises(SystemExit, match="was imported from"):
        bits.main(["--dump", str(tmp_path / "hashes"), "--tree", str(tmp_path)])
    assert bits.main(["--dump", str(tmp_path / "hashes")]) == 0
    assert (tmp_path / "hashes").read_text() == "{}"


def test_writing_keeps_the_checkpoints_that_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(bits, "GOLDEN", tmp_path / "bits.json")
    monkeypatch.setattr(bits, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(bits, "PORTABLE", {"a": lambda: {"x": torch.zeros(2)}})
    monkeypatch.setattr(bits, "CHECKPOINT_KINDS", {"amsgrad": bits.CHECKPOINT_KINDS["amsgrad"]})
    assert bits.main(["--write"]) == 0
    first = bits.golden()
    assert first["portable"] == {"a": bits.hashed({"x": torch.zeros(2)})}
    assert first["continued, ranges 0"].keys() == first["continued, values"].keys() == {"amsgrad"}
    before = (tmp_path / "checkpoints" / "amsgrad.pt").read_bytes()
    monkeypatch.setitem(bits.CHECKPOINT_KINDS, "amsgrad", ({"amsgrad": True, "lr": 0.5}, {}))  # another would be written now
    assert bits.main(["--write"]) == 0
    assert (tmp_path / "checkpoints" / "amsgrad.pt").read_bytes() == before
    assert bits.golden() == first  # lr is the checkpoint's
