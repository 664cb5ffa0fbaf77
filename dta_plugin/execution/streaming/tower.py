"""Features of images for the chunks of a streamed run: the tower runs before the first, and backward after the last.

Chunks read the features as inputs of their own, whose gradients are summed like those of parameters; the sums go into
the tower's graph in the end. Of that graph only the images are kept, the tower runs again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dta_plugin.execution.streaming.gradient_sums import GradientSums
from dta_plugin.execution.streaming.recomputation import plain_checkpointing
from dta_plugin.models.introspection import is_checkpointed
from dta_plugin.models.vision.batch_images import TreeImages
from dta_plugin.models.vision.forward import image_features


@dataclass(frozen=True, slots=True, eq=False)
class Tower:
    """What the tower has made of a tree's images. features: as `image_features` returns them, with graph where trained.

    leaves: the same for chunks, by a name for the sums of their gradients; only those that have any.
    """

    images: TreeImages
    features: list[torch.Tensor]
    leaves: Mapping[str, torch.Tensor]

    @classmethod
    def from_images(cls, model: PreTrainedModel, images: TreeImages, device: torch.device) -> Tower:
        with plain_checkpointing(model):
            if is_checkpointed(model) or not torch.is_grad_enabled():
                features = image_features(model, images.units, device)
            else:
                features = checkpoint(image_features, model, images.units, device, use_reentrant=False)
        leaves = {f"<features {i}>": x.detach().requires_grad_() for i, x in enumerate(features) if x.requires_grad}
        return cls(images, features, leaves)

    @property
    def for_chunks(self) -> list[torch.Tensor]:
        return [self.leaves.get(f"<features {i}>", x) for i, x in enumerate(self.features)]

    @property
    def trained(self) -> list[torch.Tensor]:
        """The features that have a graph, in the order of the leaves."""
        return [x for x in self.features if x.requires_grad]

    def go_backward(self, sums: GradientSums, parameters: Mapping[str, torch.Tensor]) -> None:
        """Add to the sums what parameters get through the features."""
        found = list(sums.hand_out(self.leaves))
        pairs = [(x, gradient) for x, gradient in zip(self.trained, found, strict=True) if gradient is not None]
        if pairs:
            outputs, seeds = zip(*pairs, strict=True)
            sums.add(outputs, seeds, parameters)
