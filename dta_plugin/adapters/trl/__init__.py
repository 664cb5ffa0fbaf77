"""TRL: trainers that run as prefix trees. Online: GRPOTrainer, RLOOTrainer. Offline: SFT, DPO, reward models.

With the flag, any other trainer shares prefixes, too: `every_trainer`.
"""

from dta_plugin.adapters.trl.upstream import check

check()  # before anything that needs TRL: a release that cannot be imported gets our message, too

from dta_plugin.adapters.trl.config import TreeGRPOConfig, TreeRLOOConfig
from dta_plugin.adapters.trl.diffusion import DiffusionGRPOConfig, DiffusionGRPOTrainer
from dta_plugin.adapters.trl.offline import SiblingBatchesMixin, TreeDPOTrainer, TreeRewardTrainer, TreeSFTTrainer
from dta_plugin.adapters.trl.trainer import TreeGRPOTrainer, TreeRLOOTrainer, TreeTrainerMixin

__all__ = [
    "DiffusionGRPOConfig",
    "DiffusionGRPOTrainer",
    "SiblingBatchesMixin",
    "TreeDPOTrainer",
    "TreeGRPOConfig",
    "TreeGRPOTrainer",
    "TreeRLOOConfig",
    "TreeRLOOTrainer",
    "TreeRewardTrainer",
    "TreeSFTTrainer",
    "TreeTrainerMixin",
]
