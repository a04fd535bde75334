"""First values on one process without sharding: where they come from, and what is missing."""

import pytest
import torch
from torch import nn

from mm_core.weights import WeightsError, materialize


class Scale(nn.Module):
    """Parameters without reset_parameters()."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.scale = nn.Linear(3, 3), nn.BatchNorm1d(3), Scale()
        self.register_buffer("table", torch.arange(3.0), persistent=False)


class Complete(Net):
    def init_module(self, module: nn.Module) -> bool:
        if isinstance(module, Scale):
            nn.init.constant_(module.gain, 2.0)
            return True
        return False

    def reset_buffers(self, device: torch.device) -> None:
        self.table = torch.arange(3.0, device=device)


def on_meta(cls: type[nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return cls()


def test_everything_gets_a_value():
    net = on_meta(Complete)
    materialize(net, "cpu", 0)
    assert not any(t.is_meta or t.isnan().any() for t in net.state_dict().values())
    assert net.scale.gain.tolist() == [2.0] * 3
    assert net.table.tolist() == [0.0, 1.0, 2.0]
    assert net.norm.running_var.tolist() == [1.0] * 3  # a persistent buffer of a module that resets its own
    assert net.norm.num_batches_tracked.item() == 0
    assert all(p.requires_grad for p in net.parameters())


def test_what_nothing_fills_is_listed_all_at_once():
    with pytest.raises(WeightsError) as caught:
        materialize(on_meta(Net), "cpu", 0)
    text = str(caught.value)
    assert "parameter scale.gain of Scale: its module has no reset_parameters()" in text
    assert "buffer table: give the component reset_buffers(device)" in text
    assert "first" not in text


def test_a_persistent_buffer_without_value_is_an_error_unless_weights_are_loaded_next():
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(2))

    with pytest.raises(WeightsError, match="buffer count"):
        materialize(on_meta(Counter), "cpu", 0)
    materialize(on_meta(Counter), "cpu", 0, random_init=False)


def test_a_parameter_that_reset_parameters_forgets_is_found():
    class Forgetful(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.extra = nn.Parameter(torch.zeros(2))

    with pytest.raises(
        WeightsError, match=r"parameter extra of Forgetful: Forgetful.reset_parameters leaves it out"
    ):
        materialize(on_meta(Forgetful), "cpu", 0)


def test_reset_parameters_that_reaches_into_submodules_is_explained():
    class Reaching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.inner = nn.Parameter(torch.zeros(2)), nn.Linear(2, 2)

        def reset_parameters(self) -> None:
            nn.init.zeros_(self.own)
            nn.init.zeros_(self.inner.weight)

    with pytest.raises(WeightsError, match=r"Reaching.reset_parameters\(\) reaches beyond"):
        materialize(on_meta(Reaching), "cpu", 0)


def test_real_values_are_kept_and_global_generators_are_left_alone():
    net = Complete()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    state = torch.get_rng_state()
    materialize(net, "cpu", 0)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    materialize(on_meta(Complete), "cpu", 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_values_depend_on_seed_and_name_only():
    a, b, c = (on_meta(Complete) for _ in range(3))
    materialize(a, "cpu", 0)
    torch.rand(7)
    materialize(b, "cpu", 0)
    materialize(c, "cpu", 1)
    assert torch.equal(a.first.weight, b.first.weight)
    assert not torch.equal(a.first.weight, c.first.weight)


def test_a_component_that_compares_modules_with_itself_works():
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(4))

        def init_module(self, module: nn.Module) -> bool:
            if module is not self:
                return False
            nn.init.constant_(self.table, 3.0)
            return True

    net = on_meta(Table)
    materialize(net, "cpu", 0)
    assert net.table.tolist() == [3.0] * 4


def test_tied_parameters_stay_tied():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
            self.head.weight = self.embed.weight

    net = on_meta(Tied)
    materialize(net, "cpu", 0)
    assert net.head.weight is net.embed.weight
    assert not net.embed.weight.isnan().any()
