"""What stands between a pipeline and the parts of a model that trains."""

from __future__ import annotations

import torch
from torch import nn

from mm_core.training.samples import Live, RememberedText


class Encoder(nn.Module):
    """Texts to ids times a weight; counts how often it is asked."""

    asked = 0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def encode(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        Encoder.asked += len(ids)
        return (ids[..., None] * self.weight).detach(), mask


def test_each_text_is_encoded_once_and_an_encoder_of_its_own_is_given_back() -> None:
    Encoder.asked = 0
    built: list[Encoder] = []

    def build() -> Encoder:
        built.append(Encoder())
        return built[-1]

    text = RememberedText(None, build)
    ids, mask = torch.tensor([[1, 2], [3, 4], [1, 2]]), torch.tensor([[1, 1], [1, 0], [1, 1]])
    embeddings, own_mask = text.encode(ids, mask)
    assert torch.equal(embeddings, ids[..., None] * 2.0)
    assert torch.equal(own_mask, mask)
    text.forget_encoder()
    text.encode(ids[:2], mask[:2])
    assert (len(built), Encoder.asked) == (1, 2)
    text.encode(ids[:1], torch.zeros_like(mask[:1]))  # another mask is another text
    assert (len(built), Encoder.asked) == (2, 3)
    assert not list(text.parameters())


def test_the_training_jobs_encoder_stays_and_stays_where_it_is() -> None:
    encoder = Encoder()
    text = RememberedText(encoder, lambda: None)
    text.to(torch.float64).train()
    text.forget_encoder()
    text.encode(torch.ones(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int64))
    assert text.is_live
    assert encoder.weight.dtype == torch.float32


def test_a_live_network_can_be_called_and_asked_and_not_moved() -> None:
    network = nn.Linear(2, 2)
    live = Live(network)
    x = torch.ones(1, 2)
    assert torch.equal(live(x), network(x))
    assert live.in_features == 2
    live.to(torch.float64).eval()
    assert network.weight.dtype == torch.float32
    assert network.training
    assert not list(live.parameters())
