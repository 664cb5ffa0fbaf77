"""Every trainer of the installed TRL, and a tiny training of each: found in its packages, not listed by hand.

`RECIPES` says by class name how a training is made; a trainer without a recipe fails `test_every_trainer.py`.
"""

from __future__ import annotations

import importlib
import pkgutil
import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, Trainer, set_seed
from transformers.trainer_callback import PrinterCallback

from tests.adapters.trl.support import TRAINING, VOCABULARY, reward, tokenizer

STEPS = {name: TRAINING[name] for name in TRAINING if name not in ("num_generations", "max_completion_length")}
STEPS |= {"per_device_train_batch_size": 4, "max_steps": 2}
OF_THE_TRAINER = ("peft_config", "reward_funcs")
Recipe = Callable[[type, str, dict[str, Any]], Trainer]


def trainers_of_trl() -> dict[str, type[Trainer]]:
    """By "module.Class": every trainer class of TRL, the private base of all of them left out."""
    found: dict[str, type[Trainer]] = {}
    for package in ("trl.trainer", "trl.experimental"):
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            try:
                names = vars(importlib.import_module(module.name))
            except ModuleNotFoundError:  # an environment's; a module with a trainer needs nothing that is not here
                assert not module.name.endswith("_trainer"), module.name
                continue
            for value in names.values():
                is_trainer = isinstance(value, type) and issubclass(value, Trainer)
                if is_trainer and value.__module__.startswith("trl.") and not value.__name__.startswith("_"):
                    found[f"{value.__module__}.{value.__qualname__}"] = value
    return found


def words(count: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(11, VOCABULARY, (count,), generator=generator).tolist())


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def texts() -> Dataset:
    return Dataset.from_list([{"text": f"{words(8, i // 4)} {words(2 + i % 3, 50 + i)}"} for i in range(16)])


def pairs(margin: bool = False, longer: int = 3) -> Dataset:
    """Four pairs of each prompt. longer: lengths of the chosen ones differ by less."""
    rows = [
        {"prompt": words(8, i // 4), "chosen": f" {words(4 + i % longer, 50 + i)}", "rejected": f" {words(4, 80 + i)}"}
        | ({"margin": 0.1 * i} if margin else {})
        for i in range(16)
    ]
    return Dataset.from_list(rows)


def triples() -> Dataset:
    return pairs().map(lambda row: {"reference": row["chosen"] + " w12"})


def labelled() -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": words(8, i // 4), "completion": f" {words(3 + i % 3, 50 + i)}", "label": i % 2 == 0}
            for i in range(16)
        ]
    )


def chats() -> Dataset:
    """Prompt and answer as messages; four answers of each prompt."""
    return Dataset.from_list(
        [{"messages": [turn("user", words(8, i // 4)), turn("assistant", words(3 + i % 3, 50 + i))]} for i in range(16)]
    )


def prompts(length: int = 8) -> Dataset:
    return Dataset.from_list([{"prompt": words(length, i // 4)} for i in range(16)])


def _config_of(trainer_class: type) -> Any:
    """The config class that stands beside a trainer."""
    for base in trainer_class.__mro__:
        package = importlib.import_module(base.__module__)
        name = base.__name__.replace("Trainer", "Config")
        if hasattr(package, name):
            return getattr(package, name)
    raise AssertionError(f"no config for {trainer_class}")


def _offline(data: Callable[[], Dataset], **options: Any) -> Recipe:
    def build(trainer_class: type, model: str, args: dict[str, Any]) -> Trainer:
        return trainer_class(model=_model(model), **_args(trainer_class, args | options), **_common(model, data()))

    return build


def _taught(data: Callable[[], Dataset], **options: Any) -> Recipe:
    def build(trainer_class: type, model: str, args: dict[str, Any]) -> Trainer:
        teacher = _model(model)
        torch.manual_seed(5)
        for parameter in teacher.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        settings = _args(trainer_class, args | options)
        return trainer_class(model=_model(model), teacher_model=teacher, **settings, **_common(model, data()))

    return build


def _rewarded(data: Callable[[], Dataset], **options: Any) -> Recipe:
    def build(trainer_class: type, model: str, args: dict[str, Any]) -> Trainer:
        settings = {"reward_funcs": reward} | _args(trainer_class, args | options)
        return trainer_class(model=_model(model), **settings, **_common(model, data()))

    return build


def _model(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _args(trainer_class: type, options: dict[str, Any]) -> dict[str, Any]:
    """The config as `args`, and those of the options that are the trainer's own."""
    own = {name: value for name, value in options.items() if name in OF_THE_TRAINER}
    config = {name: value for name, value in options.items() if name not in OF_THE_TRAINER}
    return {"args": _config_of(trainer_class)(**config)} | own


def _common(folder: str, data: Dataset) -> dict[str, Any]:
    return {"train_dataset": data, "processing_class": AutoTokenizer.from_pretrained(folder)}


def _of_bytes(trainer_class: type, model: str, args: dict[str, Any]) -> Trainer:
    """GOLD asks for a tokenizer of bytes, by the name of its parts."""
    with patch("trl.experimental.utils.is_byte_level_tokenizer", return_value=True):
        return _taught(chats, lmbda=0.5, max_completion_length=6, use_uld_loss=False)(trainer_class, model, args)


def _scored(trainer_class: type, model: str, args: dict[str, Any]) -> Trainer:
    set_seed(1)
    scorer = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    return trainer_class(model=scorer, **_args(trainer_class, args), **_common(model, pairs(margin=True)))


class _TeacherServer:
    """Log-probs of a teacher that is nowhere: functions of the token ids."""

    def __init__(self, **_: Any) -> None:
        pass

    def get_sequence_logprobs(
        self, sequences: list[list[int]], prompt_lengths: list[int], **_: Any
    ) -> dict[str, list[list[list[float]]]]:
        completions = [row[start:] for row, start in zip(sequences, prompt_lengths, strict=True)]
        own = [[[-1 - token % 7 / 2] for token in row] for row in completions]
        return {
            "actual_logprobs": own,
            "logprobs": own,
            "logprob_token_ids": [[[t] for t in row] for row in completions],
        }


def _served(trainer_class: type, model: str, args: dict[str, Any]) -> Trainer:
    options = args | {"max_completion_length": 6, "teacher_model_server_url": "http://nowhere", "loss_top_k": 1}
    with patch("trl.generation.vllm_client.VLLMClient", _TeacherServer):
        return _offline(prompts)(trainer_class, model, options)


class _Rollouts:
    """A rollout worker that has done its work: four answers to each of four prompts."""

    def __init__(self, sample_class: type) -> None:
        self.rollout_buffer: queue.Queue[Any] = queue.Queue()
        self.metrics_queue: queue.Queue[Any] = queue.Queue()
        inner = tokenizer()
        for row in labelled():
            prompt, answer = (inner(row[name])["input_ids"] for name in ("prompt", "completion"))
            ids = np.asarray(prompt + answer)
            own = np.where(np.arange(len(ids)) < len(prompt), -np.inf, -1 - ids % 7 / 2)
            fields = {
                "prompt": [turn("user", row["prompt"])],
                "completion": [turn("assistant", row["completion"])],
                "input_ids": ids,
                "completion_mask": np.asarray([0] * len(prompt) + [1] * len(answer)),
                "teacher_topk_ids": np.where(own > -np.inf, ids, -1)[:, None],
                "teacher_topk_logprobs": own[:, None],
                "model_version": 0,
                "metrics": {},
                "prompt_id": 0,
                "teacher_id": "default",
            }
            self.rollout_buffer.put_nowait(sample_class(**fields))

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Nothing is to be started, stopped, told or checked; the weights go nowhere."""
        return lambda *_, **__: None


def _asynchronous(trainer_class: type, model: str, args: dict[str, Any]) -> Trainer:
    module = importlib.import_module(trainer_class.__module__)
    rollouts = _Rollouts(module.RolloutSample)
    options = {"token_budget": 64, "max_staleness": 100, "model_init_kwargs": {"attn_implementation": "sdpa"}}
    settings = _args(trainer_class, args | options)
    common = _common(model, prompts())
    with patch.object(module, "get_peak_flops_per_device", return_value=1.0):  # asks for a GPU
        return trainer_class(model=model, rollout_worker=rollouts, weight_transfer=rollouts, **settings, **common)


GENERATION = {"num_generations": 4, "max_completion_length": 6}
RECIPES: dict[str, Recipe] = {
    "SFTTrainer": _offline(texts),
    "DPOTrainer": _offline(pairs),
    "RewardTrainer": _scored,
    "KTOTrainer": _offline(labelled),
    "CPOTrainer": _offline(lambda: pairs(longer=1)),
    "ORPOTrainer": _offline(lambda: pairs(longer=1)),
    "TPOTrainer": _offline(triples, tpo_alpha=1.0),
    "GKDTrainer": _taught(chats, lmbda=0.5, max_new_tokens=6),
    "GOLDTrainer": _of_bytes,
    "IWOPDTrainer": _taught(chats, lmbda=1.0, max_completion_length=6),
    "ServerDistillationTrainer": _served,
    "AsyncDistillationTrainer": _asynchronous,
    "DistillationTrainer": _taught(prompts, max_completion_length=6),
    "OnlineDPOTrainer": _rewarded(prompts, max_new_tokens=6, max_length=32),
    "A2POTrainer": _rewarded(prompts, max_completion_length=6, num_value_samples=2, filter_all_incorrect=False),
    "GRPOTrainer": _rewarded(prompts, **GENERATION),
    "RLOOTrainer": _rewarded(prompts, **GENERATION),
    "GMPOTrainer": _rewarded(prompts, **GENERATION),
    "SDFTTrainer": _offline(
        lambda: prompts().map(lambda row: {"privileged_context": words(3, 7)}), distillation_topk=10, **GENERATION
    ),
    "SDPOTrainer": _rewarded(prompts, success_reward_threshold=0.3, **GENERATION),
}


def build(trainer_class: type[Trainer], model: str, output: Path, **options: Any) -> Trainer:
    """A trainer with fixed seeds, whose training is two steps. options: of its config, and `OF_THE_TRAINER`."""
    set_seed(11)
    trainer = RECIPES[trainer_class.__name__](trainer_class, model, STEPS | {"output_dir": str(output)} | options)
    trainer.remove_callback(PrinterCallback)
    return trainer
