"""One flag, other trainers than GRPO, two processes under DDP and FSDP2: equal to stock there, full and with LoRA."""

from __future__ import annotations

import pytest
import torch

from tests.adapters.trl.support import TOLERANCE, moved
from tests.adapters.trl.trainer_table import REFUSED, Outcome
from tests.adapters.trl.trainers_ranks_script import AROUND, CASES, NAMES, SFT, Outcomes
from tests.recipes.test_trl import launcher_environment
from tests.support.ranks import under_torchrun

pytestmark = pytest.mark.long  # two processes each time

WRAPPERS = {"ddp": {}, "fsdp2": launcher_environment("fsdp2", "--mixed_precision", "no")}
Ranks = tuple[str, list[Outcomes], str]
SCRIPT = "tests.adapters.trl.trainers_ranks_script"


@pytest.fixture(scope="module", params=WRAPPERS)
def ranks(request: pytest.FixtureRequest, model: str, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What wraps the models, the outcomes on both ranks, and what was printed."""
    wrapper, folder = request.param, tmp_path_factory.mktemp(request.param)
    environment = WRAPPERS[wrapper] | {"TMPDIR": str(folder)}
    return wrapper, *under_torchrun(SCRIPT, model, folder, wrapper, environment=environment)


def equal(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        print(f"worst difference {outcome.worst:.1e}")
        assert outcome.worst <= TOLERANCE < 100 * TOLERANCE < moved(outcome.stock)
    first, second = (outcome.flagged.weights for outcome in outcomes)
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_equal_to_stock_on_two_ranks(ranks: Ranks, name: str, case: str) -> None:
    outcomes = [rank[name, case] for rank in ranks[1]]
    equal(outcomes)
    assert all(shared == calls > 0 for outcome in outcomes for calls, shared in outcome.models)
    assert outcomes[0].flagged.dta != outcomes[1].flagged.dta, "each rank has trees of its own"


def test_what_cannot_be_a_tree_is_none_on_all_ranks(ranks: Ranks) -> None:
    for kind, first in AROUND[ranks[0]]:
        outcomes = [rank[SFT, f"{kind}, {first}"] for rank in ranks[1]]
        equal(outcomes)
        assert all(outcome.how == REFUSED and outcome.reason for outcome in outcomes)
        assert not any("on_unsupported" in outcome.reason for outcome in outcomes), "it falls back already"


def test_only_the_main_process_speaks(ranks: Ranks) -> None:
    wrapper, _, printed = ranks
    assert printed.count(" on cpu") == len(NAMES) * len(CASES)
    assert printed.count("the model's own path") == len(AROUND[wrapper])
