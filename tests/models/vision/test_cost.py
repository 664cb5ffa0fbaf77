"""What a tower costs, against what torch counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dta_plugin import TreeConfig
from dta_plugin.execution.prepared_batch import prepare_batch
from dta_plugin.models.vision.batch_images import BatchImages
from dta_plugin.models.vision.cost import tower_work
from dta_plugin.models.vision.forward import image_features
from dta_plugin.models.vision.units import row_units, runs_of
from tests.support.vision_images import IMAGE
from tests.support.vision_models import FAMILIES, SCENARIOS, rows_of, vision_model


@pytest.mark.parametrize("family", FAMILIES)
def test_counted_as_torch_does(family: str) -> None:
    model, rows = vision_model(family, torch.float32), rows_of(family, [[[1], 0, [2], 1, [3]]], torch.float32)
    assert rows.images[0] is not None
    units = row_units(model, rows.images[0], runs_of(np.array(rows.sequences[0]) == IMAGE))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        image_features(model, units, torch.device("cpu"))
    assert tower_work(model, units).flops == pytest.approx(counter.get_total_flops(), rel=0.15)
    model.requires_grad_(False)
    assert tower_work(model, units).flops == pytest.approx(counter.get_total_flops() / 3, rel=0.15)


def test_distinct_images_count_once() -> None:
    model = vision_model("qwen3_vl", torch.float32)
    rows = rows_of("qwen3_vl", SCENARIOS["repeated"], torch.float32)
    images = BatchImages.from_rows(model, rows.sequences, rows.images)
    assert len(images.units) == 2 and len(list(images.all_units())) == 6
    per_image = tower_work(model, images.units).flops / 2
    with_images = prepare_batch(model, rows.sequences, None, TreeConfig(), images=rows.images).decision.flops
    text = prepare_batch(model, rows.sequences, None, TreeConfig()).decision.flops  # whose rows are as long
    assert with_images.dense - text.dense == pytest.approx(6 * per_image)
