#!/usr/bin/env bash
# The quickstart with verl: GRPO on a task with a verifiable reward, two FSDP2 ranks on a CPU, in about three minutes.
#   python recipes/quickstart/build.py --output runs/quickstart && python recipes/verl/build.py runs/quickstart
#   recipes/verl/quickstart.sh                                                 # from the repository root
#   recipes/verl/quickstart.sh actor_rollout_ref.model.external_lib=null       # stock verl
#   python recipes/quickstart/report.py runs/quickstart --run verl
# On a machine with GPUs the same options go to `python -m verl.trainer.main_ppo`, with a rollout.name of yours.
set -euo pipefail
folder=${QUICKSTART:-runs/quickstart}/verl

options=(
  # What to train, on what, for which reward.
  actor_rollout_ref.model.path="$folder/model"
  data.train_files="$folder/train.jsonl"
  data.val_files="$folder/train.jsonl"
  reward.custom_reward_function.path=recipes/quickstart/rewards.py

  # The plugin: this line is all it takes.
  actor_rollout_ref.model.external_lib=dta_plugin.adapters.verl

  # 8 prompts x 8 completions per step, one optimizer step for each; whole groups stay on one of the two ranks.
  trainer.n_gpus_per_node=2
  data.train_batch_size=8
  actor_rollout_ref.rollout.n=8
  actor_rollout_ref.actor.ppo_mini_batch_size=8
  data.max_prompt_length=384
  data.max_response_length=24 # a guess is 3 tokens long, right work 15 or 20

  # The token budget of a micro-batch: with the plugin, of tokens after sharing.
  actor_rollout_ref.actor.use_dynamic_bsz=True
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu=2048

  # GRPO with a KL term to the first policy.
  algorithm.adv_estimator=grpo
  actor_rollout_ref.actor.use_kl_loss=True
  actor_rollout_ref.actor.kl_loss_coef=0.001
  actor_rollout_ref.actor.optim.lr=7e-4 # a tiny model takes far more than the usual 1e-6
  actor_rollout_ref.actor.optim.weight_decay=0.0
  trainer.total_training_steps=40

  # float32 throughout: the weights, FSDP's computation, and the reference's.
  actor_rollout_ref.actor.fsdp_config.model_dtype=fp32
  actor_rollout_ref.ref.fsdp_config.model_dtype=fp32
  "+actor_rollout_ref.actor.fsdp_config.mixed_precision={param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}"
  "+actor_rollout_ref.ref.fsdp_config.mixed_precision={param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}"
  actor_rollout_ref.model.enable_gradient_checkpointing=False

  # Few processes: this is a small machine and a small model.
  actor_rollout_ref.rollout.agent.num_workers=1
  reward.num_workers=1
  transfer_queue.backend.SimpleStorage.num_data_storage_units=1
  data.dataloader_num_workers=0

  # verl looks for finished rollouts every two seconds, which is most of a step here; this, every tenth of a second.
  # ("++" because verl 0.8 has no such setting, and no need for it.)
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
