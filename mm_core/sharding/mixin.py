"""`FSDP2Mixin`: a model that shards itself, from fsdp2.yaml and the policies of its parts."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from mm_core.config.fsdp2 import PATTERN_FIELDS
from mm_core.config.parallel import ParallelSizes
from mm_core.sharding.apply import apply_plan, fsdp_settings, needs_sharding
from mm_core.sharding.build import build_plans
from mm_core.sharding.combinations import check_parallel
from mm_core.sharding.mesh import ParallelMesh, build_parallel_mesh
from mm_core.sharding.observe import differences, observe_plan, shard_sizes
from mm_core.sharding.plan import ShardingError, ShardingPlan
from mm_core.sharding.policy import ShardingPolicy

if TYPE_CHECKING:
    from mm_core.config.fsdp2 import Fsdp2Config

log = logging.getLogger(__name__)


class FSDP2Mixin:
    """For `class MyModel(nn.Module, FSDP2Mixin)`.

    `fully_shard` runs `_pre_fully_shard`, `_fully_shard`, `_post_fully_shard`; each can be overridden.
    Whatever `_fully_shard` does, the result is read back as a plan and checked in the same way; keys of fsdp2.yaml
    that it did not follow are named in a warning. A `post_meta_init()` of the model or of a module inside it is
    called when `materialize` has given it its first values.

    Attributes:
        sharding_plans: path of each FSDP root -> its plan, after `fully_shard`; with pipeline parallelism that of this
            rank's stage.
        device_mesh: what the parameters are sharded over, after `fully_shard`.
        parallel_mesh: all ranks, `device_mesh` among their dimensions, after `fully_shard`.
    """

    sharding_plans: dict[str, ShardingPlan]
    device_mesh: DeviceMesh
    parallel_mesh: ParallelMesh

    def sharding_roots(self) -> dict[str, ShardingPolicy]:
        """Path of each FSDP root in this model -> its policy. By default the model is one root and its
        blocks are found by structure.

        A child of a sharded root cannot be called on its own, so each part that is called by itself is a
        root of its own.
        """
        return {"": ShardingPolicy()}

    def fully_shard(
        self,
        process_group: dist.ProcessGroup | None = None,
        fsdp2_config_path: str | Path | Fsdp2Config | None = None,
        parallel: ParallelSizes | None = None,
    ) -> bool:
        """Shard the model in place. Every rank of the group calls this, with the model on the meta device or
        on its own.

        Args:
            process_group: the data-parallel ranks; all by default.
            fsdp2_config_path: path of an fsdp2.yaml, its content as a config, or `None` for the policies
                alone.
            parallel: how many ranks share one model beside FSDP's; by default none do. The experts' number of ranks is
                that of fsdp2.yaml.

        Returns:
            True: the model is sharded, nothing is left for a caller to do.

        Raises:
            UserError: the file, the policies, the sizes and the model do not fit together.
        """
        self._parallel_sizes = parallel or ParallelSizes()
        kwargs, config = self._pre_fully_shard(process_group, fsdp2_config_path)
        self._fully_shard(kwargs, config)
        self._post_fully_shard()
        return True

    def _pre_fully_shard(
        self,
        process_group: dist.ProcessGroup | None,
        fsdp2_config_path: str | Path | Fsdp2Config | None,
    ) -> tuple[dict[str, Any], Fsdp2Config]:
        """Read the configuration, make the mesh, build and check the plans.

        Returns:
            Keyword arguments for `torch.distributed.fsdp.fully_shard` on the units of the (first) root, and
            the configuration.
        """
        model = _module(self)
        config = load_fsdp2_config(fsdp2_config_path)
        policies = self.sharding_roots()
        roots = {path: model.get_submodule(path) for path in policies}
        plans = build_plans(roots, policies, config, model)
        sizes: ParallelSizes = getattr(self, "_parallel_sizes", ParallelSizes())
        for path, plan in plans.items():
            check_parallel(roots[path], plan, sizes)
        self.parallel_mesh = build_parallel_mesh(config, sizes, process_group)
        if self.parallel_mesh.pp is not None:
            from mm_core.sharding.pipeline import cut_stage  # few jobs have stages

            # The plan is made of the whole model, so that patterns and their checks mean the same on every stage.
            plans = {path: cut_stage(roots[path], plan, self.parallel_mesh) for path, plan in plans.items()}
        self.sharding_plans = plans
        self.device_mesh = self.parallel_mesh.fsdp
        first = next(iter(plans))
        return fsdp_settings(roots[first], plans[first], self.device_mesh), config

    def _fully_shard(self, fsdp2_kwargs: dict[str, Any], fsdp2_config: Fsdp2Config) -> None:
        """Apply the plans.

        A part that brings its own `fully_shard(process_group, fsdp2_config_path)` is asked first, as MindSpeed's
        `TorchFullyShardedDataParallel` asks; a true answer means that it did the work.
        """
        model = _module(self)
        mesh: DeviceMesh = fsdp2_kwargs["mesh"]
        for path, plan in self.sharding_plans.items():
            root = model.get_submodule(path)
            brings_own = path and callable(getattr(root, "fully_shard", None))
            if brings_own and self.parallel_mesh.sizes.together > 1:
                raise ShardingError(
                    f"{plan.full_path('')} shards itself, and is not told of more than data parallelism; set the sizes of "
                    f"{self.parallel_mesh.sizes} to 1."
                )
            if brings_own and _shards_itself(root, mesh, _relative_to(path, fsdp2_config)):
                log.info("%s sharded itself.", path)
                continue
            apply_plan(root, plan, mesh, self.parallel_mesh)

    def _post_fully_shard(self) -> None:
        """Read back what was done, and check it; a warning names the keys of fsdp2.yaml that were not followed."""
        model = _module(self)
        for path, plan in self.sharding_plans.items():
            root = model.get_submodule(path)
            if isinstance(root, FSDPModule) or needs_sharding(root, plan, self.device_mesh):
                seen = self.sharding_plans[path] = observe_plan(root, plan)
                found = differences(plan, seen)
                ranks, sizes = self.device_mesh.size(-1), shard_sizes(root, plan)
                if sizes - {ranks}:
                    shown = ", ".join(map(str, sorted(sizes)))
                    found["sharding_size"] = f"{ranks} was asked for, {shown} is there"
                for key, difference in found.items():
                    if plan.sources.get(key) == "fsdp2.yaml":
                        shown = plan.full_path("")
                        log.warning("%s did not follow %s of fsdp2.yaml: %s.", shown, key, difference)


def load_fsdp2_config(source: str | Path | Fsdp2Config | None) -> Fsdp2Config:
    """The configuration of a path, of an object that is one already, or the defaults.

    Raises:
        UserError: the file is missing or wrong; all findings at once.
    """
    from mm_core.config.document import read_document
    from mm_core.config.findings import ConfigError
    from mm_core.config.fsdp2 import Fsdp2Config
    from mm_core.config.section import check_section

    if source is None:
        return Fsdp2Config()
    if isinstance(source, Fsdp2Config):
        return source
    checked = check_section(Fsdp2Config, read_document(Path(source)))
    if checked.section is None:
        raise ConfigError(checked.findings)
    return checked.section


def _module(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ShardingError(f"{type(model).__name__} is a FSDP2Mixin but no nn.Module; derive it from both.")
    return model


def _shards_itself(part: Any, mesh: DeviceMesh, config: Fsdp2Config) -> bool:
    """Call a part's own `fully_shard` as MindSpeed does: by these two names, the second being a path.

    A part of ours takes the configuration as an object; one that was written for MindSpeed gets a file of it, whose
    patterns begin at the part.
    """
    group = _group_of(mesh)
    if isinstance(part, FSDP2Mixin):
        return part.fully_shard(process_group=group, fsdp2_config_path=config)
    import yaml

    with tempfile.TemporaryDirectory(prefix="mmzoo-fsdp2-") as folder:
        path = Path(folder) / "fsdp2.yaml"
        # What is absent MindSpeed reads as 1: it would shard nothing.
        written = {"sharding_size": config.sharding_size or "auto"}
        written |= config.model_dump(mode="json", exclude_unset=True, exclude_none=True)
        path.write_text(yaml.safe_dump(written), encoding="utf-8")
        return bool(part.fully_shard(process_group=group, fsdp2_config_path=str(path)))


def _group_of(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The group of all ranks of a mesh. Each of them calls this."""
    if mesh.ndim == 1:
        return mesh.get_group()
    ranks = mesh.mesh.flatten().tolist()
    if len(ranks) == dist.get_world_size():
        world = dist.group.WORLD
        assert world is not None
        return world
    return dist.new_group(ranks, use_local_synchronization=True)


def _relative_to(prefix: str, config: Fsdp2Config) -> Fsdp2Config:
    """The configuration as a part of the model sees it: its own patterns only, without the prefix."""
    changes: dict[str, Any] = {}
    for name in PATTERN_FIELDS:
        value = getattr(config, name)
        if value:
            own = tuple(p[len(prefix) + 1 :] for p in value if p.startswith(prefix + "."))
            changes[name] = (
                own or None
            )  # an empty list would mean "none", but the file says nothing about this part
    return config.model_copy(update=changes)
