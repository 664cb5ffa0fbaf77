"""The images of TRL's rows, see `training.image_rows`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dta_plugin.adapters.trl.images import row_images
from dta_plugin.models.introspection import causal_lm
from dta_plugin.models.vision.support import images_obstacle
from dta_plugin.models.vision.units import image_token_id, runs_of
from dta_plugin.training.image_rows import ImageRows


def image_rows(model: nn.Module, inputs: Mapping[str, Any], input_ids: torch.Tensor) -> ImageRows | None:
    """inputs: with TRL's values of images. input_ids: [B, P + C]. None where no row has any images."""
    rows = row_images(inputs)
    if rows is None:
        return None
    base = causal_lm(model)
    if images_obstacle(base) is not None:
        return ImageRows(rows, [[] for _ in rows], None)
    placeholder = image_token_id(base)
    assert placeholder is not None
    return ImageRows(rows, list(map(runs_of, input_ids.eq(placeholder).cpu().numpy())), base)
