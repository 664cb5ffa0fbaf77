#!/usr/bin/env bash
# Geometry3K with verl: questions about figures, full fine-tuning of Qwen3-VL-8B, tower included, on 8 GPUs with FSDP2
# (written for 80 GB each, not yet run on them).
#   pip install 'dta-plugin[verl]' 'verl[vllm]==0.9.1' qwen-vl-utils mathruler && python recipes/verl/data.py geo3k
#   recipes/verl/qwen3_vl_8b_grpo.sh                 # more options of verl may follow
set -euo pipefail

options=(
  actor_rollout_ref.model.path=Qwen/Qwen3-VL-8B-Instruct
  # verl's default, flash_attention_2, needs flash-attn, which pip has to build; leave this out where you have it.
  +actor_rollout_ref.model.override_config.attn_implementation=sdpa
  data.train_files=data/geo3k/train.parquet
  data.val_files=data/geo3k/test.parquet
  data.image_key=images
  data.filter_overlong_prompts=True # a figure's tokens count: they may not be cut

  # The plugin. `external_lib=null` after this script's name is the stock run.
  actor_rollout_ref.model.external_lib=dta_plugin.adapters.verl
  +actor_rollout_ref.rollout.custom.dta.verify=first # compare the first batch with verl's own path, then never again

  # 128 prompts x 8 completions per step, in mini-batches of 32 prompts. Make n x ppo_mini_batch_size a multiple of
  # n x the number of GPUs: then every rank gets whole groups, and a figure goes through the tower once for all eight.
  trainer.n_gpus_per_node=8
  data.train_batch_size=128
  actor_rollout_ref.rollout.n=8
  actor_rollout_ref.actor.ppo_mini_batch_size=32
  data.max_prompt_length=1024
  data.max_response_length=2048

  # The memory knob: tokens per micro-batch, counted after sharing. A group that is larger is streamed.
  actor_rollout_ref.actor.use_dynamic_bsz=True
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384

  # GRPO with a KL term.
  algorithm.adv_estimator=grpo
  actor_rollout_ref.actor.use_kl_loss=True
  actor_rollout_ref.actor.kl_loss_coef=0.01
  actor_rollout_ref.actor.kl_loss_type=low_var_kl
  actor_rollout_ref.actor.optim.lr=1e-6

  # FSDP2 for the policy and the reference, whose weights stay in host memory between uses.
  actor_rollout_ref.actor.strategy=fsdp2
  actor_rollout_ref.ref.strategy=fsdp2
  actor_rollout_ref.ref.fsdp_config.param_offload=True
  actor_rollout_ref.model.enable_gradient_checkpointing=True
  # Where memory is short: Adam's moments in host memory between steps, 8 GB less on each of 8 GPUs.
  # actor_rollout_ref.actor.fsdp_config.optimizer_offload=True

  # Generation by vLLM in the training processes, between updates.
  actor_rollout_ref.rollout.name=vllm
  actor_rollout_ref.rollout.tensor_model_parallel_size=1
  actor_rollout_ref.rollout.gpu_memory_utilization=0.6

  trainer.logger='[console, file]' # or wandb, tensorboard, ...
  trainer.project_name=dta
  trainer.experiment_name=qwen3_vl_8b_grpo
  trainer.total_epochs=15 # of 2,101 questions
  trainer.save_freq=50
  trainer.test_freq=10
)
exec python -m verl.trainer.main_ppo "${options[@]}" "$@"
