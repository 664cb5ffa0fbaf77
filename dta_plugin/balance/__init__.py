"""Which sequences go where: batches split so that siblings stay together and every rank and micro-batch costs alike."""

from dta_plugin.balance.collator import SequenceBalancingCollator
from dta_plugin.balance.packing import pack
from dta_plugin.balance.partition import Partition, partition, partition_each
from dta_plugin.balance.sampler import SiblingSampler

__all__ = ["Partition", "SequenceBalancingCollator", "SiblingSampler", "pack", "partition", "partition_each"]
