"""Every recipe's options are verl's: Hydra composes them, verl's dataclasses and checks accept them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset, Features, Image, Value, load_dataset
from omegaconf import DictConfig
from PIL import Image as Pixels
from verl.tools.tool_registry import load_all_tools
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.import_utils import load_module

from dta_plugin.adapters.verl_plugin.config import tree_config
from dta_plugin.adapters.verl_plugin.diffusion.worker import diffusion_settings
from dta_plugin.adapters.verl_plugin.run_checks import check_run
from recipes import stories
from recipes.verl.data import figures
from tests.adapters.verl.recipes import RECIPES, config_of

SCRIPTS = sorted((RECIPES / "verl").glob("*.sh"))
MEGATRON = [script for script in SCRIPTS if script.stem.endswith("_megatron")]


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script not in MEGATRON], ids=lambda path: path.stem)
def test_config(script: Path, tmp_path: Path) -> None:
    module, config = config_of(script, tmp_path)
    on_cpu = script.stem in ("quickstart", "quickstart_qwen3_5", "diffusion")
    assert module == ("dta_plugin.adapters.verl_cpu" if on_cpu else "verl.trainer.main_ppo")
    assert (diffusion_settings(config.actor_rollout_ref) is not None) == (script.stem == "diffusion")
    options = tree_config(config.actor_rollout_ref.rollout)
    assert (options is not None and options.selection() is not None) == (script.stem == "qwen3_8b_nat")
    check(config, "fsdp2", config.trainer.n_gpus_per_node)


@pytest.mark.parametrize("nodes", [1, 8])
@pytest.mark.parametrize("script", MEGATRON, ids=lambda path: path.stem)
def test_megatron(script: Path, nodes: int, tmp_path: Path) -> None:
    """What Megatron itself makes of the models' geometry is in tests/adapters/megatron/test_recipes.py."""
    module, config = config_of(script, tmp_path, nodes)
    assert (module, config.trainer.nnodes) == ("verl.trainer.main_ppo", nodes)
    assert config.critic.strategy == "megatron"
    assert tree_config(config.actor_rollout_ref.rollout) is not None
    engine = config.actor_rollout_ref.actor.megatron
    gpus, of_a_model = nodes * config.trainer.n_gpus_per_node, engine.tensor_model_parallel_size
    of_a_model *= engine.pipeline_model_parallel_size
    assert gpus % of_a_model == 0
    check(config, "megatron", gpus // of_a_model)
    assert config.actor_rollout_ref.ref.megatron.tensor_model_parallel_size == engine.tensor_model_parallel_size
    check_run(config)


def check(config: DictConfig, strategy: str, ranks: int) -> None:
    """What every recipe has to hold. ranks: that have rows of their own."""
    if config.actor_rollout_ref.rollout.name == "vllm":
        config.actor_rollout_ref.rollout.name = "hf_cpu"  # verl's checks of LoRA import vLLM
    else:
        assert strategy == "fsdp2"
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    rollout = omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert config.actor_rollout_ref.model.external_lib == "dta_plugin.adapters.verl"
    assert (actor.strategy, config.actor_rollout_ref.actor.use_dynamic_bsz) == (strategy, True)
    assert (config.actor_rollout_ref.ref.strategy, rollout.n > 1) == (strategy, True)
    prompts = config.actor_rollout_ref.actor.ppo_mini_batch_size
    assert prompts % ranks == 0, "every rank gets whole groups of every mini-batch"
    assert config.data.train_batch_size % prompts == 0
    longest = config.data.max_prompt_length + config.data.max_response_length
    assert longest <= config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu
    reward = config.reward.custom_reward_function.path
    assert reward is None or callable(load_module(str(RECIPES.parent / reward)).compute_score)


def test_data_and_tool(tmp_path: Path) -> None:
    """The agent's stories, its tool as verl's agent loop sees it, and its reward."""
    script = RECIPES / "verl" / "data.py"
    subprocess.run([sys.executable, script, "stories", "--output", tmp_path], check=True)
    train, test = ((tmp_path / "stories" / f"{split}.jsonl").read_text().splitlines() for split in ("train", "test"))
    assert len(train) == 4000 and not set(train) & set(test)
    row = json.loads(train[0])
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    [tool] = load_all_tools(None, str(RECIPES / "verl" / "tools.py"))
    assert tool.name == "calculate" and tool.fn("(12 + 5) * 3") == "51"
    answer = row["reward_model"]["ground_truth"]
    assert [stories.compute_score(text, answer) for text in (f"So:\n#### {answer}", answer)] == [1.0, 0.0]


def test_figures(tmp_path: Path) -> None:
    """Rows of Geometry3K, written and read again, become verl's conversations: every figure has its place."""
    columns = {
        "images": [[Pixels.new("RGB", (4, 4), colour) for colour in colours] for colours in (["red"], ["red", "blue"])],
        "problem": ["<image>Find x.", "Is <image> larger than <image>?"],
        "answer": ["3", "2 \\sqrt { 5 }"],
    }
    kinds = Features({"images": [Image()], "problem": Value("string"), "answer": Value("string")})
    figures(Dataset.from_dict(columns, features=kinds)).to_parquet(tmp_path / "train.parquet")
    reader = SimpleNamespace(image_key="images", video_key="videos", audio_key="audios", processor=object())
    for row, images, answer in zip(
        load_dataset(str(tmp_path), split="train"), columns["images"], columns["answer"], strict=True
    ):
        assert row["data_source"] == "hiyouga/geometry3k" and row["reward_model"]["ground_truth"] == answer
        [message] = RLHFDataset._build_messages(reader, row, key="prompt")
        parts = [part["image"] for part in message["content"] if part["type"] == "image"]
        assert [part.getpixel((0, 0)) for part in parts] == [image.getpixel((0, 0)) for image in images]
        assert "\\boxed{}" in message["content"][-1]["text"]
