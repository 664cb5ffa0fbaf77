"""Token selection: options, and drawings that follow their designs, repeat, and weigh all tokens 1 on average."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from dta_plugin import InvalidInputError
from dta_plugin.token_selection import select as nat
from dta_plugin.token_selection.select import SCHEMES, SHARINGS, Drawn, TokenSelection, draw
from tests.support.nat import drawings

CUTS = ("rpc", "rpc-uniform", "rpc-two-point")


def drawn(
    selection: TokenSelection, carries_loss: np.ndarray, groups: Sequence[int] | None = None, step: int = 0
) -> Drawn:
    rows = range(len(carries_loss))
    return draw(selection, carries_loss, rows if groups is None else groups, seed=0, step=step, rank=0)


def kept_tokens(selection: TokenSelection, rows: int, tokens: int, groups: Sequence[int], steps: int) -> np.ndarray:
    """bool [steps, rows, tokens] of as many drawings."""
    everything = np.ones((rows, tokens), dtype=bool)
    return np.array([drawn(selection, everything, groups, step).weights > 0 for step in range(steps)])


def test_options() -> None:
    assert SCHEMES == ("urs", "rpc", "rpc-uniform", "rpc-two-point")
    assert [TokenSelection(scheme=scheme).cuts for scheme in SCHEMES] == [False, True, True, True]
    default = TokenSelection(scheme="rpc")
    assert (default.budget, default.min_prefix, default.floor, default.sharing) == (0.5, 1, None, "group")
    assert default.smallest_probability == 0.4
    assert TokenSelection(scheme="rpc", budget=0.05).smallest_probability == pytest.approx(0.04)


@pytest.mark.parametrize("scheme", ("urs", "rpc", "rpc-two-point"))
def test_no_weight_is_large_by_default(scheme: str) -> None:
    """Above all the second of two tokens, whose first one takes the whole budget: a floor of 0.1 weighs it 10 times."""
    for tokens in (1, 2, 3, 10, 1000):
        assert 1 / TokenSelection(scheme=scheme).design(tokens).probabilities.min() <= 2.5 * (1 + 1e-12)
    assert TokenSelection(scheme=scheme, floor=0.1).design(2).probabilities[1] == pytest.approx(0.1)


INVALID: dict[str, tuple[dict[str, object], str]] = {
    "scheme": ({"scheme": "random"}, r"token_selection='random'. Expected all or one of urs, rpc, rpc-unif"),
    "budget 0": ({"budget": 0.0}, r"token_budget=0.0. Expected a share of the tokens in \(0, 1\]"),
    "budget in tokens": ({"budget": 512}, r"token_budget=512. Expected a share of the tokens"),
    "budget NaN": ({"budget": float("nan")}, r"token_budget=nan"),
    "uniform below half": (
        {"scheme": "rpc-uniform", "budget": 0.4},
        r"token_budget=0.4 with token_selection=rpc-uniform.* Expected at least 0.5; rpc reaches any budget above",
    ),
    "no prefix": ({"min_prefix": 0}, r"token_min_prefix=0. Expected a whole number of tokens, at least 1"),
    "prefix as a share": ({"min_prefix": 1.5}, r"token_min_prefix=1.5. Expected a whole number of tokens"),
    "floor 0": ({"floor": 0.0}, r"token_floor=0.0. Expected a probability in \(0, 1\]"),
    "floor as a weight": ({"floor": 10.0}, r"token_floor=10.0. Expected a probability"),
    "floor NaN": ({"floor": float("nan")}, r"token_floor=nan"),
    "sharing": ({"sharing": "rank"}, r"token_sharing='rank'. Expected one of row, group"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_options_say_what_was_expected(case: str) -> None:
    options, message = INVALID[case]
    with pytest.raises(InvalidInputError, match=message):
        TokenSelection(**({"scheme": "rpc"} | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("sharing", SHARINGS)
def test_draws_keep_each_token_with_its_probability(scheme: str, sharing: str) -> None:
    """20,000 rows: z below 4 for every token, counting rows that are cut together as one."""
    rows, steps, tokens = 20, 1000, 4
    selection = TokenSelection(scheme=scheme, budget=0.6, floor=0.2, sharing=sharing)
    kept = kept_tokens(selection, rows, tokens, [row // 4 for row in range(rows)], steps).mean((0, 1))
    design = selection.design(tokens)
    alike = {"row": 1, "group": 4}[sharing] if selection.cuts else 1
    p = design.probabilities[1:]
    assert kept[0] == 1
    assert np.abs((kept[1:] - p) / np.sqrt(p * (1 - p) / (rows * steps / alike))).max() < 4


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("sharing", SHARINGS)
def test_every_drawing_is_one_that_was_enumerated(scheme: str, sharing: str) -> None:
    """Rows that begin, or go on, without loss, a row without any, and what follows the last loss token."""
    carries_loss = np.array([[1, 1, 0, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0]], dtype=bool)
    selection = TokenSelection(scheme=scheme, budget=0.6, floor=0.2, sharing=sharing)
    all_of_them, chances = zip(*drawings(selection, carries_loss), strict=True)
    weights = np.array([one.weights for one in all_of_them])
    assert sum(chances) == pytest.approx(1, rel=1e-12)
    np.testing.assert_allclose(np.tensordot(chances, weights, 1), carries_loss, rtol=1e-12)
    for step in range(30):
        one = drawn(selection, carries_loss, [5, 5, 5, 2], step)
        assert (np.abs(weights - one.weights).max((1, 2)) < 1e-12).any()
        assert one.weights.dtype == np.float64
        assert (one.weights[~carries_loss] == 0).all()


class FixedNumbers:
    """A generator of a given number, and of a given order of the siblings."""

    def __init__(self, number: float, order: Sequence[int]) -> None:
        self.number, self.order = number, order

    def random(self) -> float:
        return self.number

    def permutation(self, rows: int) -> np.ndarray:
        return np.array(self.order[:rows])


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 0, 2, 1)])
def test_spread_cuts_keep_the_probabilities_of_each_row_exactly(
    order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a grid of the group's number, for rows of different lengths; with one number for all passes they do not."""
    carries_loss = np.arange(5) < np.array([5, 1, 2, 4])[:, None]
    selection = TokenSelection(scheme="rpc-uniform", sharing="group")

    def frequencies(numbers: np.ndarray) -> np.ndarray:
        kept = np.zeros(carries_loss.shape)
        for number in numbers:
            monkeypatch.setattr(nat, "_generator", lambda entropy, row, number=number: FixedNumbers(number, order))
            kept += drawn(selection, carries_loss, [0] * 4).weights > 0
        return kept / len(numbers)

    expected = np.zeros(carries_loss.shape)
    for row, tokens in enumerate((5, 1, 2, 4)):
        expected[row, :tokens] = selection.design(tokens).probabilities
    np.testing.assert_allclose(frequencies((np.arange(60) + 0.5) / 60), expected, rtol=1e-12)
    assert np.abs(frequencies(np.full(1, 0.5 / 60)) - expected).max() > 0.1


@pytest.mark.parametrize("sharing", ["row", "group"])
def test_siblings_are_spread_evenly_whatever_their_place(sharing: str) -> None:
    """Two groups whose rows alternate: within one, cuts of equal rows lie a quarter of the row apart."""
    selection = TokenSelection(scheme="rpc-uniform", sharing=sharing)
    even, alike = [], 0
    for step in range(20):
        lengths = (drawn(selection, np.ones((8, 400), dtype=bool), [7, 3] * 4, step).weights > 0).sum(1)
        even += [np.diff(sorted(lengths[first::2])) for first in (0, 1)]
        alike += sorted(lengths[0::2]) == sorted(lengths[1::2])
    assert alike <= 2
    assert bool((np.abs(np.array(even) - 100) <= 1).all()) == (sharing == "group")


@pytest.mark.parametrize("scheme", CUTS)
def test_siblings_vary_less_together_than_by_themselves(scheme: str) -> None:
    def variance_of_the_mean(sharing: str) -> float:
        selection = TokenSelection(scheme=scheme, sharing=sharing)
        return float(kept_tokens(selection, 8, 40, [0] * 8, 400).sum(2).mean(1).var())

    by_themselves, together = variance_of_the_mean("row"), variance_of_the_mean("group")
    assert together < by_themselves / 4


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("sharing", SHARINGS)
def test_drawings_repeat_and_passes_ranks_and_seeds_differ(scheme: str, sharing: str) -> None:
    selection = TokenSelection(scheme=scheme, sharing=sharing)
    carries_loss = np.ones((12, 50), dtype=bool)

    def weights(seed: int, step: int, rank: int) -> bytes:
        result = draw(selection, carries_loss, [row // 2 for row in range(12)], seed=seed, step=step, rank=rank)
        assert result.entropy == (seed, step, rank)
        return result.weights.tobytes()

    tuples = list(itertools.product((1, 2), repeat=3))
    first = [weights(*entropy) for entropy in tuples]
    assert first == [weights(*entropy) for entropy in tuples]
    if scheme != "rpc-two-point":  # whose rows have but two outcomes
        assert len(set(first)) == len(tuples)
    assert len(set(first)) > 1


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_row_is_drawn_whatever_the_others_carry(scheme: str, sharing: str) -> None:
    """But rows are drawn differently."""
    selection = TokenSelection(scheme=scheme, sharing=sharing)
    everything = np.ones((6, 40), dtype=bool)
    fewer = everything.copy()
    fewer[0] = False
    fewer[1, 7:] = False
    fewer[2, ::2] = False
    full = drawn(selection, everything, [0] * 6).weights
    np.testing.assert_array_equal(full[3:], drawn(selection, fewer, [0] * 6).weights[3:])
    assert len(np.unique(full, axis=0)) > 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_batches_with_nothing_to_draw(scheme: str) -> None:
    selection = TokenSelection(scheme=scheme)
    for shape in ((0, 0), (0, 5), (3, 0), (3, 5)):
        nothing = drawn(selection, np.zeros(shape, dtype=bool))
        assert nothing.weights.shape == shape
        assert not nothing.weights.any()
        assert nothing.statistics() == {}
    rows = np.array([[False, False], [True, False], [True, True]])
    weights = drawn(selection, rows).weights
    assert weights[0].tolist() == [0, 0]
    assert weights[1].tolist() == [1, 0]
    assert weights[2, 0] == 1


def test_cuts_count_positions_and_single_tokens_those_with_loss() -> None:
    """A row of two turns, a tool's answer between them, then padding."""
    carries_loss = np.zeros((1, 12), dtype=bool)
    carries_loss[0, [0, 1, 6, 7]] = True
    where = np.flatnonzero(carries_loss)
    for scheme, positions in {"rpc-uniform": where, "urs": np.arange(4)}.items():
        selection = TokenSelection(scheme=scheme, min_prefix=2)
        p = selection.design(8 if selection.cuts else 4).probabilities[positions]
        seen = np.array([drawn(selection, carries_loss, step=step).weights[0] for step in range(100)])
        assert (seen[:, ~carries_loss[0]] == 0).all()
        np.testing.assert_allclose(seen[:, where].max(0), 1 / p, rtol=1e-12)
    cut = TokenSelection(scheme="rpc-uniform", min_prefix=2).design(8).probabilities
    np.testing.assert_allclose(cut[where], [1, 1, 2 / 7, 1 / 7], rtol=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_behind_the_last_loss_token_counts(scheme: str) -> None:
    selection = TokenSelection(scheme=scheme)
    short = np.ones((4, 9), dtype=bool)
    padded = np.pad(short, ((0, 0), (0, 30)))
    expected = drawn(selection, short).weights
    np.testing.assert_array_equal(drawn(selection, padded).weights, np.pad(expected, ((0, 0), (0, 30))))


def test_statistics_by_hand() -> None:
    weights = np.array([[1.0, 4.0, 0.0], [0.0, 0.0, 3.0]])
    probabilities = np.array([[1.0, 0.25, 0.2], [0.5, 1.0, 1.0]])
    carries_loss = np.array([[True, True, True], [True, False, False]])
    assert Drawn(weights, probabilities, carries_loss, (0, 0, 0)).statistics() == {
        "kept_fraction": 0.5,
        "max_weight": 4.0,
        "mean_weight": 1.25,
        "effective_sample_size": pytest.approx(25 / 17 / 4),
        "predicted_variance": pytest.approx((0 + 3 + 4 + 1) / 4),
    }
    everything = Drawn(np.ones((2, 3)), np.ones((2, 3)), np.ones((2, 3), dtype=bool), (0, 0, 0)).statistics()
    assert everything.pop("predicted_variance") == 0.0
    assert set(everything.values()) == {1.0}


def test_statistics_where_a_cut_leaves_no_loss_token() -> None:
    """As in a row that begins with a tool's answer."""
    p = np.array([[1.0, 1.0, 0.5]])
    statistics = Drawn(np.zeros((1, 3)), p, np.array([[False, False, True]]), (0, 0, 0)).statistics()
    assert statistics.pop("predicted_variance") == 1.0
    assert set(statistics.values()) == {0.0}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("sharing", SHARINGS)
def test_predicted_variance_is_that_over_all_drawings(scheme: str, sharing: str) -> None:
    """Enumerated for gradients at right angles, rows that begin, or go on, without loss; the same for every drawing."""
    carries_loss = np.array([[1, 1, 0, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]], dtype=bool)
    selection = TokenSelection(scheme=scheme, budget=0.6, floor=0.2, sharing=sharing)
    off = sum(chance * ((one.weights - carries_loss) ** 2).sum() for one, chance in drawings(selection, carries_loss))
    found = {drawn(selection, carries_loss, step=step).statistics()["predicted_variance"] for step in range(5)}
    assert len(found) == 1
    predicted = found.pop()
    assert predicted == pytest.approx(off / carries_loss.sum(), rel=1e-12)
    other = TokenSelection(scheme=scheme, budget=0.8, floor=0.2, sharing=sharing)
    assert drawn(other, carries_loss).statistics()["predicted_variance"] < 0.9 * predicted
