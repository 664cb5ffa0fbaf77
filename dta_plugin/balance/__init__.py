"""Which sequences go where: batches split so that siblings stay together and every rank and micro-batch costs alike."""

from dta_plugin.balance.packing import pack
from dta_plugin.balance.partition import Partition, partition, partition_each

__all__ = ["Partition", "pack", "partition", "partition_each"]
