"""TRL: trainers whose log-prob passes run as prefix trees. GRPOTrainer, RLOOTrainer and what inherits from them."""

from dta_plugin.adapters.trl.version import check_version

check_version()  # before anything that needs TRL: a release that cannot be imported gets our message, too

from dta_plugin.adapters.trl.config import TreeGRPOConfig, TreeRLOOConfig
from dta_plugin.adapters.trl.trainer import TreeGRPOTrainer, TreeRLOOTrainer, TreeTrainerMixin

__all__ = ["TreeGRPOConfig", "TreeGRPOTrainer", "TreeRLOOConfig", "TreeRLOOTrainer", "TreeTrainerMixin"]
