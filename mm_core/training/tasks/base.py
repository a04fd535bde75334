"""The task protocol: a task turns a batch into a loss, and the loop knows nothing of either."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch

from mm_core.config.component import ComponentConfig

LossParts = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


class Task(Protocol):
    """What `TASK_MAPPINGS[task_id]` holds; built as `task(model, seed=…, device=…)`.

    A task returns sums and weights for each sample, not means: the loop divides once by the weight of the whole global batch, so
    that accumulation, uneven ranks and weighted samples are exact.
    """

    def prepare(self, micro_batches: Iterable[dict[str, Any]]) -> Iterator[Any]:
        """Encode and noise the micro batches of one optimizer step; no gradient is kept. One item a micro batch.

        It is consumed one by one, so a task that keeps none back holds one micro batch in memory.
        """
        ...

    # Optional. `validation_inputs(batch) -> Iterator[Any]`: inputs of `forward` for one batch of a validation set, where it
    # is to be run more than once; the weights that `loss` then gives a sample add up to what it counts.
    # `owners`: see `mm_core.data.dealing`; None, or a function from consumed-sample indices to the expert that owns each.
    # The inputs of a task with owners have `deal`.

    def forward(self, model: torch.nn.Module, inputs: Any) -> Any:
        """Run the trained part on one prepared micro batch."""
        ...

    def loss(self, outputs: Any, inputs: Any) -> LossParts:
        """`(sums [B], weights [B], metrics)`: the loss of the batch is `sums.sum() / weights.sum()`.

        Metrics are 0-d sums over samples.
        """
        ...

    def tokens(self, inputs: Any) -> int:
        """How many tokens the trained model reads in this micro batch; for throughput alone."""
        ...

    @staticmethod
    def example_batch(
        components: Mapping[str, ComponentConfig],
        *,
        batch_size: int,
        sequence_length: int | None = None,
        device: torch.device | str = "meta",
    ) -> Any:
        """What `forward` takes, in the sizes that the job's sections say, with values that mean nothing; neither data nor
        weights are needed. `mm plan` traces it, on the meta device.

        Raises:
            UserError: the sections do not tell the sizes.
        """
        ...
