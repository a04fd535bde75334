"""For each check that builds and runs a component: a toy plugin broken so that this check, for this reason, fails."""

from __future__ import annotations

from defects import Mutation
from mutations_modules import INITIAL_WEIGHTS, MODULES, PREDICTOR, RANKS, SHARDING
from mutations_networks import NETWORKS
from mutations_roles import AUTOENCODER, DIFFUSION, PARTS, PROCESSOR, TEXT_ENCODER

MUTATIONS: tuple[Mutation, ...] = (
    *MODULES,
    *PREDICTOR,
    *INITIAL_WEIGHTS,
    *SHARDING,
    *RANKS,
    *AUTOENCODER,
    *TEXT_ENCODER,
    *NETWORKS,
    *PROCESSOR,
    *DIFFUSION,
    *PARTS,
)
