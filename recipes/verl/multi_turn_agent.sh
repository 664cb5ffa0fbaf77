#!/usr/bin/env bash
# An agent with verl: Qwen3-4B calls a calculator over several turns, on 8 GPUs (written for 80 GB each, not yet run).
#   pip install 'dta-plugin[verl]' 'verl[vllm]==0.9.1' && python recipes/verl/data.py stories
#   recipes/verl/multi_turn_agent.sh                 # more options of verl may follow
# Rollouts of a prompt part at their first different call and go on from there: their tree forks turn by turn.
set -euo pipefail

options=(
  actor_rollout_ref.model.path=Qwen/Qwen3-4B
  # verl's default, flash_attention_2, needs flash-attn, which pip has to build; leave this out where you have it.
  +actor_rollout_ref.model.override_config.attn_implementation=sdpa
  data.train_files=data/stories/train.jsonl
  data.val_files=data/stories/test.jsonl
  +data.apply_chat_template_kwargs.enable_thinking=False
  reward.custom_reward_function.path=recipes/stories.py

  # The plugin. `external_lib=null` after this script's name is the stock run.
  actor_rollout_ref.model.external_lib=dta_plugin.adapters.verl
  +actor_rollout_ref.rollout.custom.dta.verify=first # compare the first batch with verl's own path, then never again

  # verl's tool agent: it parses a turn's call, runs it, appends the result and lets the model go on.
  actor_rollout_ref.rollout.agent.default_agent_loop=tool_agent
  actor_rollout_ref.rollout.multi_turn.enable=True
  actor_rollout_ref.rollout.multi_turn.format=hermes
  actor_rollout_ref.rollout.multi_turn.max_assistant_turns=6
  actor_rollout_ref.rollout.multi_turn.function_tool_path=recipes/verl/tools.py

  # 64 prompts x 16 rollouts per step, in mini-batches of 16 prompts: two whole groups on every rank.
  trainer.n_gpus_per_node=8
  data.train_batch_size=64
  actor_rollout_ref.rollout.n=16
  actor_rollout_ref.actor.ppo_mini_batch_size=16
  data.max_prompt_length=512
  data.max_response_length=2048 # all turns and results

  # The memory knob: tokens per micro-batch, counted after sharing.
  actor_rollout_ref.actor.use_dynamic_bsz=True
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu=32768

  algorithm.adv_estimator=grpo
  actor_rollout_ref.actor.use_kl_loss=False
  actor_rollout_ref.actor.clip_ratio_high=0.28
  actor_rollout_ref.actor.optim.lr=1e-6
  actor_rollout_ref.actor.strategy=fsdp2
  actor_rollout_ref.ref.strategy=fsdp2
  actor_rollout_ref.model.enable_gradient_checkpointing=True

  actor_rollout_ref.rollout.name=vllm
  actor_rollout_ref.rollout.tensor_model_parallel_size=1
  actor_rollout_ref.rollout.gpu_memory_utilization=0.6

  trainer.logger='[console, file]' # or wandb, tensorboard, ...
  trainer.project_name=dta
  trainer.experiment_name=multi_turn_agent
  trainer.total_epochs=1
  trainer.save_freq=50
  trainer.test_freq=10
)
exec python -m verl.trainer.main_ppo "${options[@]}" "$@"
