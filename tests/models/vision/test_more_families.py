"""Every family that takes images is exact with them, or refused with the reason; so are videos and sound.

Each on trees with several images, see `tests.support.image_sweep`.
"""

from __future__ import annotations

import pytest
import torch

from dta_plugin import UnsupportedError, sequence_logprobs
from tests.support.image_sweep import image_outcome
from tests.support.sweep import EXACT, NOT_BUILDABLE, REFUSED
from tests.support.vision_families import MORE_FAMILIES, NAMES, family_model
from tests.support.vision_images import rows_in
from tests.support.vision_models import FAMILIES, SCENARIOS

# One for each thing that a forward does beside what those of `test_families` do.
QUICK = ("any-resolution", "shapes", "indicated 4", "strips 1")
WITHOUT_ROTARY = "no rotary positions"
OTHER_ATTENTION = "does not call attention through"
NO_TIMM = "requires the timm library"
# Why a family is refused.
REASONS = {
    "blip": OTHER_ATTENTION,
    "git": OTHER_ATTENTION,
    "pi0": OTHER_ATTENTION,
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo", "pix2struct", "pp_formulanet"), WITHOUT_ROTARY),
    **dict.fromkeys(("udop", "vision-encoder-decoder"), WITHOUT_ROTARY),
    **dict.fromkeys(("glm5_next", "qwen4_exp"), "indexed_attention"),
    **dict.fromkeys(("inkling2", "inkling2_loop"), "carries its state by functions that are not known"),
    **dict.fromkeys(("kosmos-2", "kosmos-2.5"), "called in several places"),
    **dict.fromkeys(("idefics", "mllama"), "cross-attention"),
    "mistral4": "no image token in its config, and no get_image_features",
    "molmo2": "both ways among all images",
    "nemotron_h_omni": "no output embedding",
    "paligemma": "both directions",
    "t5gemma2": "sliding window",
    "unlimited_ocr": "reference_sliding_attention",
}
# Why one cannot be tried here.
MISSING = {
    **dict.fromkeys(("chameleon", "emu3"), "NoneType"),
    **dict.fromkeys(("fast_vlm", "gemma3n", "perception_lm"), NO_TIMM),
    "diffusion_gemma": "empty()",
    "evolla": "Unrecognized configuration class",
    "florence2": "patch_size",
    "gemma4_unified": "no vision tower",
    "inkling_mm_model": "scipy",
}


def is_quick(family: str) -> bool:
    forms = [form for _, form in MORE_FAMILIES.values()]
    return (
        family in MORE_FAMILIES
        and (form := MORE_FAMILIES[family][1]) in QUICK
        and (list(MORE_FAMILIES)[forms.index(form)] == family)
    )


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if is_quick(name) else pytest.mark.slow)
        for name in NAMES
        if name not in {*FAMILIES, *MISSING}
    ],
)
def test_exact_or_refused(family: str) -> None:
    outcome = image_outcome(family)
    if family in REASONS:
        assert outcome.result == REFUSED and REASONS[family] in outcome.note, outcome
    else:
        assert outcome.result == EXACT, outcome


@pytest.mark.slow
@pytest.mark.parametrize("family", MISSING)
def test_cannot_be_tried(family: str) -> None:
    """Or can be, by now: then it belongs to the others."""
    outcome = image_outcome(family)
    assert outcome.result == NOT_BUILDABLE and MISSING[family] in outcome.note, outcome


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("glm4v", "pixel_values_videos"),
        ("llava_next_video", "pixel_values_videos"),
        ("qwen2_5_omni_thinker", "input_features"),
        ("minicpmv4_6", "target_sizes_videos"),
        ("video_llama_3", "video_merge_sizes"),
    ],
)
def test_videos_and_sound_are_refused(family: str, name: str) -> None:
    rows = rows_in(MORE_FAMILIES[family][1], SCENARIOS["one"], torch.float64)
    images = [inputs and inputs | {name: torch.zeros(1, 3)} for inputs in rows.images]
    with pytest.raises(UnsupportedError, match=rf"A row has {name}.*videos and sound are not supported"):
        sequence_logprobs(family_model(family), rows.sequences, images=images)


def test_several_images_that_are_seen_otherwise_are_refused() -> None:
    rows = rows_in("any-resolution-alone", SCENARIOS["two"], torch.float64)
    with pytest.raises(
        UnsupportedError, match=r"2 images \(batch_num_images\), which .* sees otherwise than each alone"
    ):
        sequence_logprobs(family_model("llava_onevision"), rows.sequences, images=rows.images)


def test_sizes_that_towers_do_not_take_together_are_refused() -> None:
    """Rows alone would run; in one call, some would be filled up, and nothing tells the tower."""
    rows = rows_in("square 16", [[[1], 0, [2]], [[1], 0, [3]], [[1], 1, [2]]], torch.float64)
    for inputs in rows.images[:2]:
        assert inputs is not None
        inputs["pixel_values"] = torch.nn.functional.pad(inputs["pixel_values"], (0, 4))
    with pytest.raises(UnsupportedError, match="different sizes"):
        sequence_logprobs(family_model("llava"), rows.sequences, images=rows.images)
