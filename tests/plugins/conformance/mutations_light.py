"""One thing broken in the toy for each check of the stages `metadata` and `light`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from toy import Toy
from toy_site import DISTRIBUTION

DIT = "predictor/toy_dit"
_CONFIGS, _POLICIES, _WEIGHTS = "mm_core.configs", "mm_core.sharding_policies", "mm_core.weights"
_PREDICTORS = "mm_core.predictor_models"


@dataclass(frozen=True)
class Mutation:
    """How the toy is broken.

    Attributes:
        apply: breaks it.
        says: what the message of the failed check must contain.
        subject: whose check must fail.
    """

    apply: Callable[[Toy], None]
    says: str
    subject: str = DIT


MUTATIONS: dict[str, Mutation] = {}


def _breaks(
    check: str, says: str, subject: str = DIT
) -> Callable[[Callable[[Toy], None]], Callable[[Toy], None]]:
    def declare(apply: Callable[[Toy], None]) -> Callable[[Toy], None]:
        assert check not in MUTATIONS
        MUTATIONS[check] = Mutation(apply, says, subject)
        return apply

    return declare


# The whole plugin


@_breaks("found-without-import", "mm_plugin_toy", DISTRIBUTION)
def _imported_at_start_up(toy: Toy) -> None:
    toy.loose["toy.pth"] = "import mm_plugin_toy\n"


@_breaks("metadata-is-sound", "package.module:object", DISTRIBUTION)
def _two_copies(toy: Toy) -> None:
    toy.entries[_CONFIGS][DIT] = "mm_plugin_toy config ToyDiTConfig"


@_breaks("names-follow-the-grammar", "'toy dit'", DISTRIBUTION)
def _space_in_an_id(toy: Toy) -> None:
    toy.entries[_PREDICTORS]["toy dit"] = "mm_plugin_toy.predictor:ToyDiT"


@_breaks("targets-have-their-form", "package.module:object", DISTRIBUTION)
def _module_as_target(toy: Toy) -> None:
    toy.entries[_PREDICTORS]["toy_dit"] = "mm_plugin_toy.predictor"


@_breaks("companions-have-components", "did it mean 'predictor/toy_dit'", DISTRIBUTION)
def _misspelt_companion(toy: Toy) -> None:
    toy.entries[_POLICIES] = {"predictor/toy_dti": toy.entries[_POLICIES][DIT]}


@_breaks("aliases-lead-somewhere", "'toy_dlt'", DISTRIBUTION)
def _alias_of_nothing(toy: Toy) -> None:
    toy.entries["mm_core.aliases"]["predictor/toy_transformer"] = "toy_dlt"


@_breaks("farewells-name-versions", "earlier", DISTRIBUTION)
def _farewell_in_the_future(toy: Toy) -> None:
    toy.entries["mm_core.farewells"]["predictor/toy_unet"] = "2.0"


@_breaks("declares-its-api-range", "mmzoo-core >=9", DISTRIBUTION)
def _other_api(toy: Toy) -> None:
    toy.requires[0] = "mmzoo-core>=9"


@_breaks("readme-is-included", "readme", DISTRIBUTION)
def _no_readme(toy: Toy) -> None:
    toy.readme = ""


@_breaks("licence-is-stated", "licence", DISTRIBUTION)
def _no_licence(toy: Toy) -> None:
    del toy.header["License-Expression"]


@_breaks("nothing-runs-at-start-up", "toy.pth", DISTRIBUTION)
def _path_file(toy: Toy) -> None:
    toy.loose["toy.pth"] = "import os; os.environ['TOY'] = '1'\n"


@_breaks("uninstall-leaves-no-ids", "toy_dit", DISTRIBUTION)
def _left_by_a_build(toy: Toy) -> None:
    folder = "mmzoo_plugin_toy.egg-info"
    toy.loose[f"{folder}/PKG-INFO"] = f"Metadata-Version: 2.4\nName: {DISTRIBUTION}\nVersion: 1.0\n"
    toy.loose[f"{folder}/entry_points.txt"] = f"[{_PREDICTORS}]\ntoy_dit = mm_plugin_toy.predictor:ToyDiT\n"
    toy.unrecorded |= {f"{folder}/PKG-INFO", f"{folder}/entry_points.txt"}


@_breaks("uninstall-leaves-no-files", "table.py", DISTRIBUTION)
def _written_beside(toy: Toy) -> None:
    toy.files["table.py"] = "SINES = ()\n"
    toy.unrecorded.add("mm_plugin_toy/table.py")


@_breaks("hooks-can-be-activated", "overwrite_confg", DISTRIBUTION)
def _misspelt_hook(toy: Toy) -> None:
    toy.replace("hooks.py", "def overwrite_config", "def overwrite_confg")


@_breaks("hooks-keep-to-their-own", "not its own", DISTRIBUTION)
def _patches_strangers(toy: Toy) -> None:
    toy.replace("hooks.py", '(role, model_id) != ("predictor", "toy_dit") or', 'role != "predictor" or')


@_breaks("hooks-are-light", "torch", DISTRIBUTION)
def _torch_in_hooks(toy: Toy) -> None:
    toy.prepend("hooks.py", "import torch")


# One component, from metadata


@_breaks("can-be-used", "ambiguous")
def _claimed_twice(toy: Toy) -> None:
    folder = "mmzoo_plugin_rival-1.0.dist-info"
    toy.loose[f"{folder}/METADATA"] = "Metadata-Version: 2.4\nName: mmzoo-plugin-rival\nVersion: 1.0\n"
    toy.loose[f"{folder}/entry_points.txt"] = f"[{_PREDICTORS}]\ntoy_dit = mm_plugin_rival:Rival\n"


@_breaks("companions-can-be-used", "broken")
def _malformed_companion(toy: Toy) -> None:
    toy.entries[_CONFIGS][DIT] = "mm_plugin_toy.config:"


# One component, imported


@_breaks("target-exists", "ToyDIT")
def _missing_target(toy: Toy) -> None:
    toy.entries[_PREDICTORS]["toy_dit"] = "mm_plugin_toy.predictor:ToyDIT"


@_breaks("companions-exist", "no_such_module")
def _companion_needs_a_module(toy: Toy) -> None:
    toy.prepend("weights.py", "import no_such_module")


@_breaks("target-builds", "not a class")
def _instance(toy: Toy) -> None:
    toy.files["predictor.py"] += "\n\nTOY = ToyDiT()\n"
    toy.entries[_PREDICTORS]["toy_dit"] = "mm_plugin_toy.predictor:TOY.width"


@_breaks("has-the-methods-of-its-role", "context")
def _other_arguments(toy: Toy) -> None:
    toy.replace("predictor.py", "        prompt: Any,\n", "        context: Any,\n")


@_breaks("constructor-takes-its-section", "width")
def _config_with_another_field(toy: Toy) -> None:
    toy.replace("predictor.py", "width: int = 8", "hidden: int = 8")


@_breaks("pickles-by-id", "pickle")
def _local_class(toy: Toy) -> None:
    toy.files["predictor.py"] += (
        "\n\ndef _make():\n    class Local(ToyDiT):\n        pass\n\n    return Local\n\n\nLOCAL = _make()\n"
    )
    toy.entries[_PREDICTORS]["toy_dit"] = "mm_plugin_toy.predictor:LOCAL"


@_breaks("spawned-worker-resolves-it", "only in the first process")
def _refuses_workers(toy: Toy) -> None:
    toy.prepend(
        "config.py",
        "import multiprocessing\n\nif multiprocessing.parent_process() is not None:\n"
        "    raise RuntimeError('only in the first process')",
    )


@_breaks("config-is-light", "imports av")
def _video_library_in_config(toy: Toy) -> None:
    toy.prepend("config.py", "import av")


@_breaks("policy-is-light", "modules")
def _many_modules_in_policy(toy: Toy) -> None:
    for number in range(120):
        toy.files[f"part{number}.py"] = ""
    names = ", ".join(f"part{number}" for number in range(120))
    toy.prepend("policy.py", f"from mm_plugin_toy import {names}")


@_breaks("weights-adapter-is-light", "torch")
def _torch_in_adapter(toy: Toy) -> None:
    toy.prepend("weights.py", "import torch")


@_breaks("example-is-light", "imports av")
def _video_library_in_example(toy: Toy) -> None:
    toy.prepend("examples.py", "import av")


@_breaks("import-touches-no-cuda", "CUDA")
def _cuda(toy: Toy) -> None:
    toy.prepend(
        "predictor.py",
        "import contextlib\nimport torch\n\nwith contextlib.suppress(Exception):\n    torch.cuda.init()",
    )


@_breaks("import-starts-no-process-group", "torch.distributed")
def _process_group(toy: Toy) -> None:
    toy.prepend(
        "predictor.py",
        "import torch.distributed as dist\n\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)",
    )


@_breaks("import-keeps-torch-state", "default dtype")
def _default_dtype(toy: Toy) -> None:
    toy.prepend("predictor.py", "import torch\n\ntorch.set_default_dtype(torch.float64)")


@_breaks("import-keeps-the-environment", "TOKENIZERS_PARALLELISM")
def _environment(toy: Toy) -> None:
    toy.prepend("config.py", "import os\n\nos.environ['TOKENIZERS_PARALLELISM'] = 'maybe'")


@_breaks("import-keeps-the-interpreter", "root logger")
def _logging(toy: Toy) -> None:
    toy.prepend("predictor.py", "import logging\n\nlogging.basicConfig(level=logging.DEBUG)")


@_breaks("import-writes-no-files", "toy.log")
def _file(toy: Toy) -> None:
    toy.prepend("predictor.py", "from pathlib import Path\n\nPath('toy.log').write_text('')")


@_breaks("import-starts-no-threads", "toy-watch")
def _thread(toy: Toy) -> None:
    toy.prepend(
        "predictor.py",
        "import threading\n\n"
        "threading.Thread(target=threading.Event().wait, name='toy-watch', daemon=True).start()",
    )


@_breaks("import-prints-nothing", "hello")
def _print(toy: Toy) -> None:
    toy.prepend("predictor.py", "print('hello')")


# Its section


@_breaks("section-is-accepted", "channel")
def _example_with_a_misspelt_key(toy: Toy) -> None:
    toy.replace(
        "examples.py",
        'TOY_DIT = Example({"init": "random"}',
        'TOY_DIT = Example({"init": "random", "channel": 4}',
    )


@_breaks("config-refuses-unknown-keys", "SectionModel")
def _lax_about_keys(toy: Toy) -> None:
    toy.replace(
        "config.py",
        "class ToyDiTConfig(SectionModel):\n",
        'class ToyDiTConfig(SectionModel, extra="ignore"):\n',
    )


@_breaks("config-refuses-wrong-types", "channels")
def _lax_about_types(toy: Toy) -> None:
    toy.prepend("config.py", "from pydantic import BaseModel")
    toy.replace(
        "config.py", "class ToyDiTConfig(SectionModel):\n", 'class ToyDiTConfig(BaseModel, extra="forbid"):\n'
    )


@_breaks("config-defaults-validate", "width")
def _default_out_of_range(toy: Toy) -> None:
    toy.replace("config.py", "    width: Annotated[int, Field(ge=2, le=64, multiple_of=2)] = 8\n",
                "    width: Annotated[int, Field(ge=2, le=64, multiple_of=2)] = 7\n")  # fmt: skip


@_breaks("config-has-a-schema", "JSON schema")
def _no_schema(toy: Toy) -> None:
    toy.prepend("config.py", "from collections.abc import Callable")
    toy.replace("config.py", "class ToyDiTConfig(SectionModel):\n",
                "class ToyDiTConfig(SectionModel):\n    activation: Callable[[float], float] | None = None\n")  # fmt: skip


@_breaks("fields-are-plain-data", "JSON")
def _path_as_field(toy: Toy) -> None:
    toy.prepend("config.py", "from pathlib import Path")
    toy.replace("config.py", "class ToyDiTConfig(SectionModel):\n",
                "class ToyDiTConfig(SectionModel):\n    table: Path = Path('table')\n")  # fmt: skip


@_breaks("policy-is-one", "braces")
def _malformed_pattern(toy: Toy) -> None:
    toy.replace("policy.py", 'units=("blocks.{*}", ', 'units=("blocks.{*", ')


@_breaks("weights-adapter-is-one", "to_folder")
def _half_an_adapter(toy: Toy) -> None:
    toy.replace("weights.py", "def to_folder", "def to_file")


@_breaks("example-is-valid", "no check")
def _failure_of_nothing(toy: Toy) -> None:
    toy.replace(
        "examples.py", "prompt=(5, 6)", 'prompt=(5, 6), known_failures={"builds-a-modul": "it does not"}'
    )


@_breaks("example-is-small", "latents")
def _large_example(toy: Toy) -> None:
    toy.replace("examples.py", "latents=(4, 2, 4, 4)", "latents=(4, 64, 64, 64)")


# Its hooks


@_breaks("hooks-keep-their-input", "changes the section")
def _hook_writes_into_its_argument(toy: Toy) -> None:
    toy.replace(
        "hooks.py", "    return ConfigPatch(", '    config["num_layers"] = 2\n    return ConfigPatch('
    )


@_breaks("hooks-are-idempotent", "num_layers")
def _hook_counts(toy: Toy) -> None:
    toy.replace("hooks.py", ' or "num_layers" in config', "")
    toy.replace(
        "hooks.py",
        'ConfigPatch({"num_layers": 2}, ',
        'ConfigPatch({"num_layers": config.get("num_layers", 1) + 1}, required=True, ',
    )
