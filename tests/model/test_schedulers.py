"""diffusers' schedulers as components, and their torch-free config classes."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import torch
from pydantic import ValidationError

from mm_core.models import sampler_config, schedulers
from mm_core.models.protocols import Diffusion
from mm_core.models.scheduler_config import FlowMatchEulerDiscreteConfig, UniPCMultistepConfig
from mm_core.models.schedulers import FlowMatchEulerDiscrete, UniPCMultistep
from mm_registry.errors import UserError

OURS = {"guidance_scale", "num_inference_steps", "num_train_steps"}
PAIRS = [
    (UniPCMultistepConfig, UniPCMultistep, diffusers.UniPCMultistepScheduler),
    (FlowMatchEulerDiscreteConfig, FlowMatchEulerDiscrete, diffusers.FlowMatchEulerDiscreteScheduler),
    *(
        (
            getattr(sampler_config, f"{name}Config"),
            getattr(schedulers, name),
            getattr(diffusers, f"{name}Scheduler"),
        )
        for name in (
            *(
                "FlowMatchHeunDiscrete",
                "FlowMatchLCM",
                "DPMSolverMultistep",
                "DPMSolverSinglestep",
                "DEISMultistep",
            ),
            *("SASolver", "DDIM", "DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete"),
        )
    ),
]
#: What JSON cannot say is said by None.
BY_NONE = {"lambda_min_clipped"}
FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@pytest.mark.parametrize(("config_class", "component", "theirs"), PAIRS)
def test_config_has_the_fields_and_defaults_of_diffusers(
    config_class: Any, component: Any, theirs: Any
) -> None:
    parameters = dict(inspect.signature(theirs.__init__).parameters)
    del parameters["self"]
    fields = config_class.model_fields
    assert set(fields) - OURS == set(parameters)
    effective = config_class().effective()
    for name, parameter in parameters.items():
        assert effective[name] == (None if name in BY_NONE else parameter.default), name
    built = component(**effective)
    assert isinstance(built, Diffusion)
    assert type(built.scheduler) is theirs


@torch.no_grad()
@pytest.mark.parametrize(("config_class", "component", "theirs"), PAIRS, ids=lambda value: value.__name__)
def test_sampling_equals_a_plain_diffusers_loop(config_class: Any, component: Any, theirs: Any) -> None:
    own = inspect.signature(theirs.__init__).parameters
    fields: dict[str, Any] = {"shift": 3.0} if "shift" in own else FLOW if "flow_shift" in own else {}
    noise = torch.randn(2, 3, 1, 4, 4)

    def model(latents: torch.Tensor, timestep: torch.Tensor, scale: float) -> torch.Tensor:
        assert timestep.shape == (2,)
        return torch.sin(latents * scale) + timestep.view(-1, 1, 1, 1, 1) / 1000

    scheduler = theirs(**fields)
    scheduler.set_timesteps(6)
    extra = {"generator": torch.Generator().manual_seed(3)} if draws(scheduler) else {}
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        conditional, unconditional = model(seen, t.expand(2), 1.0), model(seen, t.expand(2), 0.5)
        output = unconditional + 4.0 * (conditional - unconditional)
        x = scheduler.step(output, t, x, return_dict=False, **extra)[0]
    ours = component(num_inference_steps=6, **fields)
    assert ours.is_flow == config_class(**fields).is_flow == bool(fields)
    assert component().is_flow == config_class().is_flow
    for _call in range(2):  # a second call starts anew
        generator = torch.Generator().manual_seed(3)
        result = ours.sample(
            model, noise, {"scale": 1.0}, uncond_kwargs={"scale": 0.5}, guidance=4.0, generator=generator
        )
        assert torch.allclose(result, x, atol=1e-5, rtol=1e-5)


def draws(scheduler: Any) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters


def test_stochastic_sampling_is_keyed_by_its_generators() -> None:
    sampler = FlowMatchEulerDiscrete(num_inference_steps=3, stochastic_sampling=True)
    noise = torch.randn(2, 1, 1, 2, 2)

    def draw(which: slice) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        return sampler.sample(
            lambda latents, timestep: latents, noise[which], {}, generator=generators[which]
        )

    assert torch.equal(draw(slice(0, 2))[1:], draw(slice(1, 2)))


def test_it_does_not_train() -> None:
    with pytest.raises(UserError, match="only generates"):
        UniPCMultistep().q_sample(torch.zeros(1, 1, 1, 1, 1))
    with pytest.raises(UserError, match="only generates"):
        UniPCMultistep().training_losses()


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(UserError, match="num_inference_steps"):
        UniPCMultistep().sample(lambda latents, timestep: latents, torch.zeros(1, 1, 1, 1, 1), {})
    with pytest.raises(UserError, match="shift_terminal"):
        UniPCMultistep(shift_terminal=0.1)
    with pytest.raises(ValidationError, match="only one spacing"):
        UniPCMultistepConfig(use_karras_sigmas=True, use_beta_sigmas=True)
    with pytest.raises(ValidationError, match="use_dynamic_shifting"):
        UniPCMultistepConfig(use_dynamic_shifting=True)
    assert not UniPCMultistep().is_flow


def test_the_section_of_published_inference_files_loads() -> None:
    section = {
        "guidance_scale": [4.0, 3.0],
        "num_train_steps": 900,
        "num_inference_steps": 40,
        "beta_end": 0.02,
        "disable_corrector": [],
        "flow_shift": 3.0,
        "prediction_type": "flow_prediction",
        "solver_p": None,
        "trained_betas": None,
        "use_flow_sigmas": True,
    }
    config = UniPCMultistepConfig.model_validate(section)
    assert config.num_train_timesteps == 900
    assert config.guidance_scale == (4.0, 3.0)
    built = UniPCMultistep(**config.effective())
    assert built.num_train_timesteps == 900
    assert built.is_flow
