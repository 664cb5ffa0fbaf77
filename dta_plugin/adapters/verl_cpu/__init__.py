"""verl without an accelerator: a CPU platform and a small rollout backend, to try recipes and for tests.

Importing this package installs both in the process. It is not a part of `dta_plugin.adapters.verl`, whose import turns
the plugin on: stock verl runs on it as well. Every process of a run has to import it, which is what verl's own
`VERL_USE_EXTERNAL_MODULES=dta_plugin.adapters.verl_cpu` does. `python -m dta_plugin.adapters.verl_cpu`, with the
arguments of `python -m verl.trainer.main_ppo`, sets that up.

Promises: stock verl trains here with FSDP or FSDP2 over gloo, and with its Megatron engine where Megatron-Core and
mbridge are installed (`megatron`); what verl computes is not changed. A rank is one of Ray's logical GPUs
(`ray.init(num_gpus=N)`).

Known limits: FSDP 1 with `param_offload` asks for a device "cpu:cpu"; FSDP 2 with it works. With Megatron, runs cannot
be resumed, and rollouts take no mixture of experts (docs/megatron.md).
"""

from dta_plugin.adapters.verl_cpu import install

install.install()
