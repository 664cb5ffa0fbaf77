"""The images of a batch: each distinct one once, and where on every sequence, and in the tree, its features go.

A placeholder token is the same as another only if its image is and its place within it is. `BatchImages.identities`
says so to the tree; the tree's tokens stay ids. Positions are the model's own, asked for sequence by sequence.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from dta_plugin.errors import InvalidInputError, UnsupportedError
from dta_plugin.models.image_blocks import block_rules
from dta_plugin.models.introspection import decoder_of
from dta_plugin.models.vision.distinct import distinct_units
from dta_plugin.models.vision.support import check_images
from dta_plugin.models.vision.units import ImageInputs, Unit, image_token_id, indicator_ids, row_units, runs_of
from dta_plugin.tree.trie import PrefixTree, TokenSequence, token_rows
from dta_plugin.upload import upload

# Identities from here on are places within images; ids of tokens are below.
_FIRST_PLACE = 2**31


@dataclass(frozen=True, slots=True, eq=False)
class TreeImages:
    """The images of a tree, or of a part of it, as a model call needs them; T = its tokens.

    units: the distinct ones, all of which the tower sees. feature: int64 [T] row of the units' features, one after the
    other, that each token is, or -1 for text. positions: int64 [axes, T] of the rotary embedding, None where they are
    depths. most_per_row: units of the row that has most, 0 where one only stands in for those of other ranks.
    """

    units: list[Unit]
    feature: np.ndarray
    positions: np.ndarray | None
    most_per_row: int = 0

    def at(self, tokens: np.ndarray) -> TreeImages:
        """Of some tokens only. tokens: int64 [C] layout indices."""
        positions = None if self.positions is None else self.positions[:, tokens]
        return replace(self, feature=self.feature[tokens], positions=positions)

    def position_ids(self, device: torch.device) -> torch.Tensor | None:
        """int64 [axes, 1, T]."""
        if self.positions is None:
            return None
        return torch.stack(upload(list(np.ascontiguousarray(self.positions)), device))[:, None]

    def places(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [I] the image tokens, and the row of the features that each is."""
        tokens = np.flatnonzero(self.feature >= 0)
        on_device = upload([tokens, self.feature[tokens]], device)
        return on_device[0], on_device[1]


@dataclass(frozen=True, slots=True, eq=False)
class BatchImages:
    """rows: per sequence, its images' inputs, or None. units: the distinct ones of all.

    ids: per sequence, int64 [len]. feature: int64 [len], positions: int64 [axes, len] or None, of each: as in
    `TreeImages`. attends_both_ways: within an image, in some layer.
    """

    rows: list[ImageInputs | None]
    ids: list[np.ndarray]
    units: list[Unit]
    units_of_row: list[list[int]]
    feature: list[np.ndarray]
    positions: list[np.ndarray] | None
    attends_both_ways: bool

    @classmethod
    def from_rows(
        cls, model: PreTrainedModel, sequences: Sequence[TokenSequence], rows: Sequence[ImageInputs | None]
    ) -> BatchImages:
        """The images of a batch.

        Args:
            model: the causal LM inside all wrappers.
            sequences: token ids [len], placeholders included.
            rows: per sequence, what the model's processor returned for its images; None for text.

        Raises:
            InvalidInputError: inputs that do not fit each other, or placeholders.
            UnsupportedError: a model of which it is not known how images come in, or rows that it cannot have as trees.
        """
        check_images(model)
        if len(rows) != len(sequences):
            raise InvalidInputError(f"Got images of {len(rows)} rows for {len(sequences)} sequences. Expected as many.")
        ids, token_id = token_rows(sequences), image_token_id(model)
        assert token_id is not None
        is_image = [row == token_id for row in ids]
        units: list[list[Unit]] = []
        for index, (row, places) in enumerate(zip(rows, is_image, strict=True)):
            count = int(places.sum())
            if count and row is None:
                raise InvalidInputError(
                    f"Sequence {index} has {count} image tokens (id {token_id}) and no images, in a batch with images. "
                    "Expected the inputs of its images, or none of these tokens."
                )
            units.append([] if row is None else row_units(model, row, runs_of(places)))
        found, kinds = distinct_units([unit for own in units for unit in own])
        begins = np.cumsum([0, *(unit.tokens for unit in found)])
        kind, features, of_row = iter(kinds), [], []
        indicators = indicator_ids(model)
        for tokens, own, places in zip(ids, units, is_image, strict=True):
            which = [next(kind) for _ in own]
            feature = np.full(len(places), -1, dtype=np.int64)
            if which:
                feature[places] = np.concatenate([np.arange(begins[k], begins[k + 1]) for k in which])
                for place, indicator in enumerate(indicators, start=begins[-1]):
                    feature[tokens == indicator] = place
            features.append(feature)
            of_row.append(which)
        positions = _positions(model, ids, is_image, rows)
        attends_both_ways = any(rule != "causal" for rule in block_rules(model).values())
        if attends_both_ways:
            _check_apart(units, is_image)
        return cls(list(rows), ids, found, of_row, features, positions, attends_both_ways)

    @property
    def most_per_row(self) -> int:
        """Units of the row that has most."""
        return max(map(len, self.units_of_row))

    def all_units(self) -> Iterator[Unit]:
        """Of every row, however many have the same."""
        return (self.units[kind] for own in self.units_of_row for kind in own)

    def identities(self) -> list[np.ndarray]:
        """Per sequence, int64 [len]: ids, and for placeholders, which place within which image it is."""
        pairs = zip(self.ids, self.feature, strict=True)
        return [np.where(feature >= 0, _FIRST_PLACE + feature, row) for row, feature in pairs]

    def merged(self) -> tuple[PrefixTree, TreeImages]:
        """The tree of the sequences, and the same by its tokens.

        Raises InvalidInputError where tokens that are merged have different positions.
        """
        tree = PrefixTree.from_sequences(self.ids, self.identities())
        images = self._on_tree(tree)
        if self.attends_both_ways:
            left = [np.arange(unit.tokens, 0, -1) for unit in self.units]  # of its image, from each token on
            in_image = np.concatenate([*left, [1]])[images.feature]
            tree = replace(tree, reach=np.arange(tree.tree_tokens) + in_image)
        return tree, images

    def _on_tree(self, tree: PrefixTree) -> TreeImages:
        feature = _in_layout(tree, np.concatenate(self.feature))
        if self.positions is None:
            return TreeImages(self.units, feature, None, self.most_per_row)
        flat = np.concatenate(self.positions, axis=1)
        positions = np.stack([_in_layout(tree, axis) for axis in flat])
        if (positions[:, tree.paths] != flat).any():
            raise InvalidInputError(
                "Tokens with the same tokens and images before them have different positions. Expected positions that "
                "depend on what comes before alone."
            )
        return TreeImages(self.units, feature, positions, self.most_per_row)


def _check_apart(units: list[list[Unit]], is_image: list[np.ndarray]) -> None:
    """Raises UnsupportedError for images side by side, whose tokens would see what comes after theirs."""
    for index, (own, places) in enumerate(zip(units, is_image, strict=True)):
        if runs_of(places) != [unit.tokens for unit in own]:
            raise UnsupportedError(
                f"Row {index} has images without a token between them, in a model that attends both ways within runs "
                "of image tokens. Expected text around each, as the model's own processor puts it."
            )


def has_own_positions(model: PreTrainedModel) -> bool:
    """Whether images change the positions of what comes after them (multimodal rotary embedding)."""
    return hasattr(decoder_of(model), "get_rope_index")


def position_axes(model: PreTrainedModel) -> int:
    """How many positions a token has in the multimodal rotary embedding: time, height and width, or what is stated."""
    sections = (getattr(model.config.get_text_config(), "rope_parameters", None) or {}).get("mrope_section")
    return len(sections) if sections else 3


def _in_layout(tree: PrefixTree, flat: np.ndarray) -> np.ndarray:
    """[N] of all sequences -> [T]."""
    values = np.empty(tree.tree_tokens, dtype=np.int64)
    values[tree.paths] = flat
    return values


def _positions(
    model: PreTrainedModel, ids: list[np.ndarray], is_image: list[np.ndarray], rows: Sequence[ImageInputs | None]
) -> list[np.ndarray] | None:
    """Per sequence, int64 [axes, len]; None where positions are depths.

    The model's own function is asked once for siblings, up to the first token behind their last image. From there on
    positions count up, as those of all text do.
    """
    if not has_own_positions(model):
        return None
    known: dict[object, np.ndarray] = {}
    axes, found = position_axes(model), []
    own: Any = decoder_of(model).get_rope_index
    has_kinds = "mm_token_type_ids" in inspect.signature(own).parameters
    for row, places, images in zip(ids, is_image, rows, strict=True):
        if images is None:
            found.append(np.broadcast_to(np.arange(len(row)), (axes, len(row))))
            continue
        end = int(np.flatnonzero(places)[-1]) + 2  # the first token behind the last image, too
        told = places if has_kinds else row  # without kinds of tokens, it looks at ids
        key = told[:end].tobytes(), *(value.numpy().tobytes() for value in _of_positions(model, images).values())
        if key not in known:
            known[key] = _own_positions(model, row[:end], places[:end], images)
        behind = known[key][:, -1:] + np.arange(1, max(0, len(row) - end) + 1)
        found.append(np.concatenate([known[key], behind], axis=1))
    return found


def _own_positions(model: PreTrainedModel, row: np.ndarray, places: np.ndarray, images: ImageInputs) -> np.ndarray:
    """int64 [axes, len] of one row, by the model's own function.

    Raises InvalidInputError where it cannot be asked: for images of other sizes than the row has places for.
    """
    own: Any = decoder_of(model).get_rope_index
    tokens = torch.from_numpy(row)[None]
    kinds = {
        "mm_token_type_ids": torch.from_numpy(places.astype(np.int64))[None],
        "attention_mask": torch.ones_like(tokens),
    }
    taken = inspect.signature(own).parameters
    inputs = _of_positions(model, images) | {name: value for name, value in kinds.items() if name in taken}
    try:
        positions, _ = own(tokens, **inputs)
    except Exception as error:  # whatever it raises for images that are others than those of the row
        raise InvalidInputError(
            f"{type(model).__name__} has no positions for a row of {int(places.sum())} image tokens and its images "
            f"({type(error).__name__}: {error}). Expected what the model's own processor returned for this row."
        ) from error
    return positions[-position_axes(model) :, 0].to(torch.int64).numpy()


def _of_positions(model: PreTrainedModel, images: ImageInputs) -> dict[str, torch.Tensor]:
    """What of a row's images its positions depend on."""
    own: Any = decoder_of(model).get_rope_index
    taken = inspect.signature(own).parameters
    return {name: value.cpu() for name, value in images.items() if name in taken}
