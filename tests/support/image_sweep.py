"""Every family that takes images, tiny and random, with them through the tree: exact, refused, or a bug.

    python -m tests.support.image_sweep [families]

`make families` writes what comes out into docs/families.md. The oracle is the untouched model, one sequence at a time;
compared are log-probs, entropies and the gradient of every parameter, of the vision tower too, packed and streamed, on
trees with several images, alike and different, at forks and between them. Every comparison has to notice images that
are told apart by their placeholders' ids alone.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator

import pytest
import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils import logging as transformers_logging

import dta_plugin
from dta_plugin.errors import UnsupportedError
from dta_plugin.models.support import tree_obstacle
from dta_plugin.models.vision import batch_images
from dta_plugin.models.vision.batch_images import BatchImages
from dta_plugin.models.vision.support import images_obstacle
from tests.support.oracle import Result, dense, difference
from tests.support.sweep import CRASH, EXACT, NOT_BUILDABLE, NOTICED, REFUSED, STREAMED, WRONG, Outcome
from tests.support.tree_run import through_tree
from tests.support.vision_families import MORE_FAMILIES, NAMES, family_model
from tests.support.vision_images import Rows, rows_in
from tests.support.vision_models import FAMILIES, SCENARIOS, rows_of, vision_model
from tests.support.widened import widened

# Without float32 islands in float64, but for those of a few routers; where float64 does not run, float32.
FLOAT64, FLOAT32 = 1e-6, 3e-4
# What is not shared alike is the images of a batch alone.
ONE_IMAGE = ("llava_onevision",)


def image_outcome(family: str) -> Outcome:
    """Try one family."""
    try:
        model, oracle = (_model(family) for _ in range(2))
    except Exception as error:
        return Outcome(NOT_BUILDABLE, f"{type(error).__name__}: {' '.join(str(error).split())}")
    name = type(model).__name__
    obstacle = tree_obstacle(model) or images_obstacle(model)
    if obstacle is not None:
        return Outcome(REFUSED, obstacle, name)
    if family not in {**FAMILIES, **MORE_FAMILIES}:
        return Outcome(NOT_BUILDABLE, "its config class alone has no vision tower", name)
    try:
        with own_forward_repaired():
            apart = _largest_difference(family, model, oracle)
    except UnsupportedError as error:
        return Outcome(REFUSED, str(error), name)
    except AssertionError as error:
        return Outcome(WRONG, str(error), name)
    except Exception as error:
        return Outcome(CRASH, f"{type(error).__name__}: {' '.join(str(error).split())}", name)
    return Outcome(EXACT, f"{apart:.0e}{'' if model.dtype is torch.float64 else ' in float32'}", name)


@contextlib.contextmanager
def own_forward_repaired() -> Iterator[None]:
    """Llama 4's, in transformers 5.24, asks its language model's output for images, which that does not have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoeCausalLMOutputWithPast, "image_outputs", None, raising=False)
        yield


def _model(family: str) -> PreTrainedModel:
    return vision_model(family) if family in FAMILIES else family_model(family)


def _rows(family: str, scenario: str, dtype: torch.dtype) -> Rows:
    if family in FAMILIES:
        return rows_of(family, SCENARIOS[scenario], dtype)
    return rows_in(MORE_FAMILIES[family][1], SCENARIOS[scenario], dtype)


def _largest_difference(family: str, model: PreTrainedModel, oracle: PreTrainedModel) -> float:
    """From the oracle, packed and streamed. Raises AssertionError where it is too large."""
    scenarios = ["one", "same text"] if family in ONE_IMAGE else ["in some branches", "repeated", "same text"]
    worst, expected, rows = 0.0, {}, {}
    for scenario in scenarios:
        expected[scenario] = _expected(family, scenario, model, oracle)
        rows[scenario] = _rows(family, scenario, model.dtype)
        for executor, config in (("packed", None), ("streamed", STREAMED)):
            actual = _through_tree(model, rows[scenario], config, executor)
            found = difference(actual, expected[scenario])
            assert found.worst <= (FLOAT64 if model.dtype is torch.float64 else FLOAT32), f"{executor}: {found}"
            worst = max(worst, found.worst)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchImages, "identities", lambda self: [row.copy() for row in self.ids])
        patch.setattr(batch_images, "has_own_positions", lambda _: False)
        with _wide(model):
            blind = dta_plugin.sequence_logprobs(
                model, rows["same text"].sequences, dta_plugin.TreeConfig(probe="off"), images=rows["same text"].images
            )
    pairs = zip(blind.logprobs, expected["same text"].logprobs, strict=True)
    assert max((a - b).abs().max().item() for a, b in pairs) > NOTICED, "other images change nothing: blind"
    return worst


def _through_tree(model: PreTrainedModel, rows: Rows, config: dta_plugin.TreeConfig | None, executor: str) -> Result:
    with _wide(model):
        return through_tree(model, rows.sequences, config=config, executor=executor, images=rows.images)


def _expected(family: str, scenario: str, model: PreTrainedModel, oracle: PreTrainedModel) -> Result:
    """The oracle's result, in float64 if the model runs in it; both models are left in that dtype."""
    try:
        rows = _rows(family, scenario, oracle.dtype)
        with _wide(oracle):
            return dense(oracle, rows.sequences, more=rows.dense_inputs(oracle))
    except RuntimeError:
        if oracle.dtype is torch.float32:
            raise
    model.float(), oracle.float()
    return _expected(family, scenario, model, oracle)


def _wide(model: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
    return widened() if model.dtype is torch.float64 else contextlib.nullcontext()


def image_sweep(families: Iterable[str] = NAMES) -> Iterator[tuple[str, Outcome]]:
    """Try families, one after the other."""
    for family in families:
        yield family, image_outcome(family)


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    for family, outcome in image_sweep(sys.argv[1:] or NAMES):
        print(f"{family}: {outcome.result}, {outcome.note}", flush=True)


if __name__ == "__main__":
    main()
