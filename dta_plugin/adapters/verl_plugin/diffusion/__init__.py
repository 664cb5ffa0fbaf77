"""RL of diffusion language models in verl: one of `training.diffusion`'s objectives in the place of its policy loss.

    '+actor_rollout_ref.rollout.custom.dta.diffusion={num_elbo_samples: 16, diffusion_steps: 128}'

verl has no rollout and no likelihood for such models. Responses come from the CPU rollout backend
(`adapters.verl_cpu`), which samples with `dta_plugin.diffusion.sample`; the update is that of
`dta_plugin.training.diffusion`, one Monte-Carlo sample at a time. Rewards, advantages, data, optimizer, checkpoints and
weight synchronisation stay verl's.

What verl calls old log-probs is NaN here: nothing may read them. Where a batch of rollouts makes more than one
optimizer step, verl's log-prob pass computes the old policy's terms instead, which verl's data path carries, as field
`dta_elbo_terms`, to the update: log-probs of steps, whose record travels in verl's `extra_fields`, or, with objectives
on masks, ELBO terms; masks are drawn again, from the tokens of a row.
"""
