"""The base under embeddings, compared with its source: what is the base's own, and what of it is shared."""

from __future__ import annotations

import logging
from collections.abc import Set
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from flair_peft.adapter import keys
from flair_peft.base import left_out, resolve
from flair_peft.base.frozen_base import FrozenBase
from flair_peft.base.left_out import PlacedStart
from flair_peft.primitives.base_record import BaseRecord, StoredBase
from flair_peft.primitives.fingerprint import are_same_bits
from flair_peft.primitives.mapped_memory import FilePages

log = logging.getLogger("flair_peft")


@dataclass
class BaseSource:
    """Where the base of embeddings comes from.

    Attributes:
        name: under which it was loaded.
        record: what files say of it; ``None`` where that was never known.
        frozen: the base whose storage the embeddings share with others, if they do.
        placed_start: what a base that is quantised or spread over devices was when it was read.
        cache_dir: where files from the Hub are kept.
    """

    name: str
    record: BaseRecord | None
    frozen: FrozenBase | None = None
    placed_start: PlacedStart | None = None
    cache_dir: str | None = None

    @property
    def fingerprint(self) -> str | None:
        """Digest of a sample of the base's weights, if these are as the source has them."""
        return None if self.frozen is None else self.frozen.sampled_digests[0]

    def compare(
        self, model: PeftModel, base: PreTrainedModel, trained: Set[str] | None = None, *, is_tied: bool = True
    ) -> StoredBase:
        """Return which weights of a model are the base's own, bit by bit; of one whose source is gone, none are.

        Args:
            model: the transformer with its adapter.
            base: the transformer alone.
            trained: names of those to be stored in any case; None means all that require a gradient.
            is_tied: tensors in one storage will be so after loading, too.
        """
        if self.placed_start is not None and self.record is not None:
            record = resolve.source_of_quantised(self.record, base, cache_dir=self.cache_dir)
            return self.placed_start.compare(model, record)
        pages = FilePages()
        source = None if self.record is None else self._read(self.record, base, pages)
        if source is None:
            log.warning(
                "The base model '%s' is not found any more, as it was: the file will hold all its weights."
                if self.record
                else "Whether the weights are those of '%s' was never known: the file will hold all of them. To leave "
                "out what is the same, use flair-peft convert.",
                self.name,
            )
            return StoredBase(self.record)
        if trained is None:
            named = model.named_parameters(remove_duplicate=False)
            trained = {name for name, parameter in named if parameter.requires_grad}
        # A source that was read anew is mapped where the pages were not looked at yet.
        known = pages if self.frozen is not None and source is self.frozen.root else None
        return left_out.compare(model.state_dict(), trained, source, is_tied=is_tied, pages=known)

    def find_record_(self, base: PreTrainedModel) -> bool:
        """Take note of the base model that weights may come from, if there is one of their shape.

        Weights in files of stock Flair come without a word on their base but its name. Whether they are that base's
        own, :meth:`compare` tells.
        """
        dtype = base.get_input_embeddings().weight.dtype
        self.record = self.record or resolve.candidate(self.name, base, dtype=dtype)
        return self.record is not None

    def without_frozen(self, model: PeftModel) -> StoredBase:
        """Return what a file would leave out if all that is frozen were the base's own; the base is not read."""
        if self.placed_start is not None and self.record is not None:
            return self.placed_start.compare(model, self.record)
        frozen_names = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        return StoredBase(self.record or BaseRecord(self.name), frozenset(frozen_names))

    def restore_(self, model: PeftModel, base: PreTrainedModel, stored: StoredBase) -> None:
        """Give the weights that a file leaves out the values that they have in its base, in place."""
        source = None if stored.record is None or not stored.is_needed else self._read(stored.record, base)
        if source is not None:
            left_out.restore_(model, stored.left_out, source)

    def _read(self, record: BaseRecord, base: PreTrainedModel, pages: FilePages | None = None) -> FrozenBase | None:
        dtype = base.get_input_embeddings().weight.dtype
        return resolve.reference(record, base, dtype=dtype, cache_dir=self.cache_dir, live=self.frozen, pages=pages)

    def share_(self, model: PeftModel, base: PreTrainedModel, other: FrozenBase) -> bool:
        """Let the frozen weights that are those of another base, bit by bit, have its storage; return if any are.

        They are compared where they came from a file as a whole, or were copied to be rewritten as PiSSA does.
        """
        if self.frozen is not None:
            return self.frozen.root is other.root
        if not isinstance(model, PeftModel) or base.config.model_type != other.config.model_type:
            return False
        rows = base.get_input_embeddings().weight[other.own_rows :].detach().clone()
        shared = (other.with_rows(rows) if len(rows) else other).variant(base.config)
        named = model.named_parameters(remove_duplicate=False)
        weights = {keys.base_key(name): parameter for name, parameter in named}
        if not shared.share_({name: parameter for name, parameter in weights.items() if name is not None}):
            return False
        self.frozen = shared
        return True

    def unchanged(self, model: PeftModel) -> list[torch.nn.Parameter]:
        """Return the frozen parameters that hold what every process reads from the base's source, bit by bit."""
        source = {} if self.frozen is None else self.frozen.own_weights()
        named = model.named_parameters(remove_duplicate=False) if source else ()
        weights = ((keys.base_key(name) or "", parameter) for name, parameter in named if not parameter.requires_grad)
        return [weight for name, weight in weights if name in source and are_same_bits(weight, source[name])]
