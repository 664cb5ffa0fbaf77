"""`SequenceBalancingCollator`: any data collator, with the examples of a batch in an order that suits prefix trees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dta_plugin.balance.costs import TYPICAL
from dta_plugin.balance.examples import token_path
from dta_plugin.balance.partition import partition
from dta_plugin.errors import InvalidInputError
from dta_plugin.tree.cost import ModelCost
from dta_plugin.tree.trie import TokenSequence


class SequenceBalancingCollator:
    """Puts siblings next to each other, and, for a batch that is cut up later, into parts that cost alike.

        trainer = Trainer(..., data_collator=SequenceBalancingCollator(DataCollatorForSeq2Seq(tokenizer), bins=4))

    Args:
        collator: makes a batch of a list of examples; it gets the same examples in another order.
        bins: equal parts that the batch is cut into afterwards, as ``torch.chunk`` does: processes with accelerate's
            ``split_batches``, micro-batches, DataParallel replicas. (Rows of a preference batch, chosen after rejected,
            must not be cut so.) 1: order alone.
        token_ids: an example -> its token ids, ints [len]. None: by the names that TRL's and transformers' data sets
            have.
        cost: what tokens and pairs cost, see `models.introspection.model_cost`; any unit.

    Raises:
        InvalidInputError: fewer than one bin; in a call, examples without known token ids.
    """

    def __init__(
        self,
        collator: Callable[[list[Any]], Any],
        bins: int = 1,
        *,
        token_ids: Callable[[Any], TokenSequence] | None = None,
        cost: ModelCost = TYPICAL,
    ) -> None:
        if bins < 1:
            raise InvalidInputError(f"Got bins={bins}. Expected at least 1.")
        self.collator, self.bins, self.cost = collator, bins, cost
        self.token_ids = token_ids or token_path

    def __call__(self, examples: Sequence[Any]) -> Any:
        return self.collator([examples[index] for index in self.order(examples)])

    def order(self, examples: Sequence[Any]) -> list[int]:
        """Indices of the examples, part after part."""
        if len(examples) < 2:
            return list(range(len(examples)))
        size = -(-len(examples) // self.bins)
        sizes = [min(size, len(examples) - start) for start in range(0, len(examples), size)]
        dealt = partition([self.token_ids(x) for x in examples], len(sizes), cost=self.cost, sizes=sizes)
        return [index for part in dealt.bins for index in part]
