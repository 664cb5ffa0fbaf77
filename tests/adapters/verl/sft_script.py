"""verl's SFT trainer on a CPU, with batches that are ready instead of texts: its own engine, steps and logger.

python -m tests.adapters.verl.sft_script <hydra overrides>
"""

from __future__ import annotations

import os
from types import SimpleNamespace

from dta_plugin.adapters import verl_cpu

# isort: split
import hydra
import torch
from torch import distributed
from verl.trainer.sft_trainer import SFTTrainer

assert verl_cpu
STEPS = 3


class Batches(list):
    """In place of a data loader and its sampler."""

    def set_epoch(self, epoch: int) -> None:
        pass


class Trainer(SFTTrainer):
    def _build_dataset(self) -> None:
        self.train_dataset = self.val_dataset = None

    def _build_dataloader(self) -> None:
        from tests.adapters.verl.support import Step, mini_batch

        self.global_batch_size, self.val_dataloader = 16, None
        self.train_dataloader = self.train_sampler = Batches()
        for seed in range(STEPS):
            found = mini_batch(Step(), seed)
            ids = found["input_ids"]
            masks = [
                torch.cat([torch.zeros(len(prompt), dtype=torch.long), mask])
                for prompt, mask in zip(found["prompts"].unbind(), found["response_mask"].unbind(), strict=True)
            ]
            mask = torch.nested.as_nested_tensor(masks, layout=torch.jagged)
            self.train_dataloader.append({"input_ids": ids, "position_ids": found["position_ids"], "loss_mask": mask})

    def _build_ckpt_handler(self) -> None:
        self.ckpt_handler = SimpleNamespace(load_checkpoint=lambda: 0, save_checkpoint=lambda step: None)
        self.model_config.__dict__["tokenizer"] = SimpleNamespace(pad_token_id=0)


@hydra.main(config_path="pkg://verl.trainer.config", config_name="sft_trainer_engine", version_base=None)
def main(config: object) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{os.environ['STORE']}", rank=0, world_size=1)
    Trainer(config=config).fit()  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
