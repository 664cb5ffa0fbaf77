"""Which sequences go where: batches split so that siblings stay together and every rank and micro-batch costs alike."""

from dta_plugin.balance.partition import Partition, partition

__all__ = ["Partition", "partition"]
