"""verl without an accelerator: a CPU platform and a small rollout backend, to try recipes and for tests.

Importing this package installs both in the process. It is not a part of `dta_plugin.adapters.verl`, whose import turns
the plugin on: stock verl runs on it as well. Every process of a run has to import it, which is what verl's own
`VERL_USE_EXTERNAL_MODULES=dta_plugin.adapters.verl_cpu` does. `python -m dta_plugin.adapters.verl_cpu`, with the
arguments of `python -m verl.trainer.main_ppo`, sets that up.
"""

from dta_plugin.adapters.verl_cpu import install

install.install()
