"""The plugin for verl. Importing this module turns it on in the process; nothing else has to be called.

    python -m verl.trainer.main_ppo ... actor_rollout_ref.model.external_lib=dta_plugin.adapters.verl

verl imports the module in the task runner and in every worker; verl 0.8 in workers only, so that it needs
`VERL_USE_EXTERNAL_MODULES=dta_plugin.adapters.verl` in the environment besides. Options are fields of TreeConfig, given
as `+actor_rollout_ref.rollout.custom.dta.<field>=<value>`; see `verl_plugin.config`.
"""

from dta_plugin.adapters.verl_plugin import install

install.install()
