#!/usr/bin/env bash
# GSM8K with verl and Megatron: full fine-tuning of Qwen3-8B on 8 GPUs, or on 64 (written for 80 GB each, not yet run).
#   pip install 'dta-plugin[megatron]' 'verl[vllm]==0.9.1' megatron-core==0.16.1 mbridge==0.15.1
#   pip install --no-build-isolation 'transformer-engine[pytorch]' && python recipes/verl/data.py gsm8k
#   recipes/verl/qwen3_8b_megatron.sh                # more options of verl may follow
# On several machines, with Ray started on each (`ray start`), from the first one: NNODES=8 recipes/verl/...
set -euo pipefail

NNODES=${NNODES:-1} # machines of 8 GPUs
TENSOR=2            # GPUs that share each layer: half of 8.2 B parameters is 8 GB, and its float32 gradients 16 GB
PIPELINE=1          # stages; with 36 layers 2, 3 or 4. An 8B needs none
PROMPTS=$((128 * NNODES))   # per step; n completions each
MINI_BATCH=$((32 * NNODES)) # prompts per update: a multiple of 8 * NNODES / (TENSOR * PIPELINE), so whole groups
TREE_TOKENS=16384           # per micro-batch, counted after sharing: the memory knob

options=(
  model_engine=megatron # the actor and the reference
  actor_rollout_ref.model.path=Qwen/Qwen3-8B
  data.train_files=data/gsm8k/train.jsonl
  data.val_files=data/gsm8k/test.jsonl
  +data.apply_chat_template_kwargs.enable_thinking=False

  # The plugin. `external_lib=null` after this script's name is the stock run.
  actor_rollout_ref.model.external_lib=dta_plugin.adapters.verl
  +actor_rollout_ref.rollout.custom.dta.verify=first # compare the first batch with verl's own path, then never again

  trainer.nnodes="$NNODES"
  trainer.n_gpus_per_node=8
  data.train_batch_size="$PROMPTS"
  actor_rollout_ref.rollout.n=8
  actor_rollout_ref.actor.ppo_mini_batch_size="$MINI_BATCH"
  data.max_prompt_length=512
  data.max_response_length=1024

  # Each micro-batch is one packed row of a tree; a group that is larger is cut along its tree.
  actor_rollout_ref.actor.use_dynamic_bsz=True
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu="$TREE_TOKENS"

  # GRPO with a KL term.
  algorithm.adv_estimator=grpo
  actor_rollout_ref.actor.use_kl_loss=True
  actor_rollout_ref.actor.kl_loss_coef=0.001
  actor_rollout_ref.actor.kl_loss_type=low_var_kl
  actor_rollout_ref.actor.optim.lr=1e-6

  # How GPUs share the model; the reference follows. Context parallelism has to stay 1: a tree needs far fewer tokens.
  # Sequence parallelism, between the layers that are shared, is on by verl's default.
  actor_rollout_ref.actor.megatron.tensor_model_parallel_size="$TENSOR"
  actor_rollout_ref.actor.megatron.pipeline_model_parallel_size="$PIPELINE"
  # mbridge is what trees were tested with. verl's default is Megatron-Bridge (False), which LoRA needs.
  actor_rollout_ref.actor.megatron.vanilla_mbridge=True

  # Activations are recomputed, layer by layer; weights and Adam's states wait in host memory while vLLM generates.
  actor_rollout_ref.actor.megatron.override_transformer_config.recompute_granularity=full
  actor_rollout_ref.actor.megatron.override_transformer_config.recompute_method=uniform
  actor_rollout_ref.actor.megatron.override_transformer_config.recompute_num_layers=1
  actor_rollout_ref.actor.megatron.param_offload=True
  actor_rollout_ref.actor.megatron.optimizer_offload=True
  # verl's default, flash, needs flash-attn; auto lets Transformer Engine choose. Trees use neither.
  actor_rollout_ref.actor.megatron.override_transformer_config.attention_backend=auto

  # Generation by vLLM in the training processes, between updates.
  actor_rollout_ref.rollout.name=vllm
  actor_rollout_ref.rollout.tensor_model_parallel_size=1
  actor_rollout_ref.rollout.gpu_memory_utilization=0.6

  trainer.logger='[console, file]' # or wandb, tensorboard, ...
  trainer.project_name=dta
  trainer.experiment_name=qwen3_8b_megatron
  trainer.total_epochs="$NNODES" # as many steps on any number of machines
  trainer.save_freq=50
  trainer.test_freq=10
)
exec python -m verl.trainer.main_ppo "${options[@]}" "$@"
