#!/usr/bin/env bash
# RL of a diffusion language model with verl, two FSDP2 ranks on a CPU, in two to three minutes.
#   python recipes/verl/diffusion.py runs/diffusion
#   recipes/verl/diffusion.sh                                                  # from the repository root
# critic/score/mean is the share of 7s in the responses: it rises from about 0.1. actor/diffusion/log_prob: nats per token.
# For a released model (LLaDA, Dream, SDAR), give as model.path what `load_diffusion_lm(...).save_pretrained` wrote, with
# its tokenizer. The rollout runs on CPUs: verl has none for diffusion models on GPUs.
set -euo pipefail
folder=${DIFFUSION:-runs/diffusion}

options=(
  actor_rollout_ref.model.path="$folder/model"
  data.train_files="$folder/train.jsonl"
  data.val_files="$folder/train.jsonl"
  reward.custom_reward_function.path=recipes/verl/diffusion.py

  # The plugin, and how responses are sampled and scored: the 8 steps of a response, one at a time in memory.
  actor_rollout_ref.model.external_lib=dta_plugin.adapters.verl
  "+actor_rollout_ref.rollout.custom.dta.diffusion={num_elbo_samples: 8, block_length: 8, diffusion_steps: 8}"

  # 8 prompts x 8 completions per step, one optimizer step for each (on-policy: no old likelihoods to compute).
  trainer.n_gpus_per_node=2
  data.train_batch_size=8
  actor_rollout_ref.rollout.n=8
  actor_rollout_ref.actor.ppo_mini_batch_size=8
  data.max_prompt_length=8
  data.max_response_length=8 # the canvas
  actor_rollout_ref.rollout.calculate_log_probs=False # there are none
  actor_rollout_ref.actor.use_dynamic_bsz=True
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu=512

  # The group's advantages, and clipped ratios of steps in the place of a policy loss, added up over a response;
  # seq-mean-token-mean would divide the sum by the response's length.
  algorithm.adv_estimator=grpo
  actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum
  actor_rollout_ref.actor.optim.lr=1e-3 # a tiny model with random weights takes far more than the usual 5e-7
  actor_rollout_ref.actor.optim.lr_scheduler_type=cosine
  actor_rollout_ref.actor.optim.weight_decay=0.0
  trainer.total_training_steps=20

  # float32 throughout, and few processes: this is a small machine and a small model.
  actor_rollout_ref.actor.fsdp_config.model_dtype=fp32
  "+actor_rollout_ref.actor.fsdp_config.mixed_precision={param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}"
  actor_rollout_ref.model.enable_gradient_checkpointing=False
  actor_rollout_ref.rollout.agent.num_workers=1
  reward.num_workers=1
  transfer_queue.backend.SimpleStorage.num_data_storage_units=1
  data.dataloader_num_workers=0
  ++trainer.v1.sampler.custom_sampler.path=pkg://dta_plugin.adapters.verl_cpu.replay
  ++trainer.v1.sampler.custom_sampler.name=EagerReplayBuffer

  # Every metric of every step in the console and, as JSON, in $folder/metrics.jsonl; no validation, no checkpoints.
  trainer.logger='[console, file]'
  trainer.val_before_train=False
  trainer.resume_mode=disable
  hydra.run.dir="$folder/hydra"
)
export VERL_FILE_LOGGER_PATH=${VERL_FILE_LOGGER_PATH:-$folder/metrics.jsonl}
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
exec python -m dta_plugin.adapters.verl_cpu "${options[@]}" "$@"
