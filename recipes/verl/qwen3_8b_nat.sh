#!/usr/bin/env bash
# GSM8K with verl, updates on half of the tokens (NAT, arXiv 2603.06619): full fine-tuning of Qwen3-8B on 8 GPUs with
# FSDP2 (written for 80 GB each, not yet run on them).
#   pip install 'dta-plugin[verl]' 'verl[vllm]==0.9.1' && python recipes/verl/data.py gsm8k
#   recipes/verl/qwen3_8b_nat.sh                     # more options of verl may follow
set -euo pipefail

options=(
  actor_rollout_ref.model.path=Qwen/Qwen3-8B
  # verl's default, flash_attention_2, needs flash-attn, which pip has to build; leave this out where you have it.
  +actor_rollout_ref.model.override_config.attn_implementation=sdpa
  data.train_files=data/gsm8k/train.jsonl
  data.val_files=data/gsm8k/test.jsonl
  +data.apply_chat_template_kwargs.enable_thinking=False

  # The plugin. `external_lib=null` after this script's name is the stock run.
  actor_rollout_ref.model.external_lib=dta_plugin.adapters.verl
  +actor_rollout_ref.rollout.custom.dta.verify=first # compare the first batch with verl's own path, then never again

  # Every update runs a random prefix of each completion, half of the tokens on average, weighted so that the gradient
  # is on average that of all of them, none by more than 2.5. Watch actor/dta/kept_fraction, .../predicted_variance,
  # .../effective_sample_size and actor/grad_norm.
  +actor_rollout_ref.rollout.custom.dta.token_selection=rpc
  +actor_rollout_ref.rollout.custom.dta.token_budget=0.5

  # 128 prompts x 8 completions per step, in mini-batches of 32 prompts. Make n x ppo_mini_batch_size a multiple of
  # n x the number of GPUs: then every rank gets whole groups, and what they share is computed once.
  trainer.n_gpus_per_node=8
  data.train_batch_size=128
  actor_rollout_ref.rollout.n=8
  actor_rollout_ref.actor.ppo_mini_batch_size=32
  data.max_prompt_length=512
  data.max_response_length=1024

  # The memory knob: tokens per micro-batch, counted after sharing. A group that is larger is streamed.
  actor_rollout_ref.actor.use_dynamic_bsz=True
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384

  # GRPO without KL and entropy terms: then completions whose group has equal rewards are not run in updates at all.
  # The loss has to be one of those that read tokens one by one; vanilla, the default, is. gspo would be an error.
  algorithm.adv_estimator=grpo
  actor_rollout_ref.actor.use_kl_loss=False
  actor_rollout_ref.actor.loss_agg_mode=token-mean
  actor_rollout_ref.actor.optim.lr=1e-6

  # FSDP2.
  actor_rollout_ref.actor.strategy=fsdp2
  actor_rollout_ref.ref.strategy=fsdp2
  actor_rollout_ref.model.enable_gradient_checkpointing=True
  # Where memory is short: Adam's moments in host memory between steps, 8 GB less on each of 8 GPUs.
  # actor_rollout_ref.actor.fsdp_config.optimizer_offload=True

  # Generation by vLLM in the training processes, between updates.
  actor_rollout_ref.rollout.name=vllm
  actor_rollout_ref.rollout.tensor_model_parallel_size=1
  actor_rollout_ref.rollout.gpu_memory_utilization=0.6

  trainer.logger='[console, file]' # or wandb, tensorboard, ...
  trainer.project_name=dta
  trainer.experiment_name=qwen3_8b_nat
  trainer.total_epochs=1
  trainer.save_freq=50
  trainer.test_freq=10
)
exec python -m verl.trainer.main_ppo "${options[@]}" "$@"
