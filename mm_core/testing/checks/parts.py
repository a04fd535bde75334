"""What else a job is made of: datasets, tasks, callbacks, pipelines."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from mm_core.testing.check import CheckFailed, CheckSkipped, check
from mm_core.testing.lazy import LazyModule

if TYPE_CHECKING:
    import torch

    from mm_core.testing import builds, toy_model
    from mm_core.testing.case import Case
else:
    torch, builds = LazyModule("torch"), LazyModule("mm_core.testing.builds")
    toy_model = LazyModule("mm_core.testing.toy_model")

DATASET, TASK, CALLBACK, PIPELINE = ("dataset",), ("task",), ("callback",), ("pipeline",)


# Datasets


def _dataset(case: Case) -> Any:
    from mm_core.data.build import build_dataset

    if case.example is None:
        raise CheckSkipped("its plugin declares no example with data that it could read")
    return build_dataset(builds.section(case), 0)


def _is_streamed(dataset: Any) -> bool:
    from mm_core.data import DataError
    from mm_core.data.streams import is_streamed

    try:
        return is_streamed(dataset)
    except DataError as error:
        raise CheckFailed(str(error)) from error


def _item(dataset: Any, index: int, key: int) -> dict[str, Any]:
    item = dataset.get(index, key) if hasattr(dataset, "get") else dataset[index]
    if not isinstance(item, dict) or not any(isinstance(value, torch.Tensor) for value in item.values()):
        raise CheckFailed(f"item {index} is no dict of tensors but {type(item).__name__}")
    return item


@check("it has a length or is a stream, and its items are dicts of tensors", stage="build", roles=DATASET)
def dataset_has_items(case: Case) -> None:
    dataset = _dataset(case)
    if _is_streamed(dataset):
        return  # dataset_loads_in_batches reads it
    if not hasattr(dataset, "__len__") or len(dataset) < 1:
        raise CheckFailed("it has no length, or its example has no sample")
    for index in range(min(3, len(dataset))):
        _item(dataset, index, index)


@check("a sample depends on its key and the run's seed alone", stage="build", roles=DATASET)
def dataset_is_keyed(case: Case) -> None:
    first, second = _dataset(case), _dataset(case)
    if _is_streamed(first):
        raise CheckSkipped("it is a stream, whose samples have no key")
    torch.manual_seed(1)
    before = builds.global_state()
    one = _item(first, 0, 5)
    if found := builds.changed(before, builds.global_state()):
        raise CheckFailed(
            f"reading an item changes {', '.join(found)}; draw from a generator keyed by seed and key"
        )
    _item(second, len(second) - 1, 6)  # another order, another state
    other = _item(second, 0, 5)
    for name, value in one.items():
        same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        if not same:
            raise CheckFailed(f"{name} of one sample and key is another one when it is read again")


@check("clips have the shape that bucket(index) says, for any key", stage="build", roles=DATASET)
def dataset_keeps_to_its_buckets(case: Case) -> None:
    dataset = _dataset(case)
    bucket = getattr(dataset, "bucket", None)
    if bucket is None:
        raise CheckSkipped("it has no method bucket, and its samples cannot be grouped by size")
    for index in range(min(len(dataset), 4)):
        shape = bucket(index)
        for key in (index, 1000 + index):
            video = _item(dataset, index, key).get("video")
            if shape is None or not isinstance(video, torch.Tensor):
                continue
            if list(video.shape[1:]) != list(shape):
                raise CheckFailed(
                    f"bucket({index}) is {list(shape)} (frames, height, width), but its clip has shape {list(video.shape)}"
                )


@check("the loader makes batches of it, the same ones after a resume", stage="build", roles=DATASET)
def dataset_loads_in_batches(case: Case) -> None:
    from mm_core.config.data import DataConfig
    from mm_core.data import build_loader

    data = DataConfig(dataset_param={})
    batches: list[list[dict[str, Any]]] = []
    position: Any = None
    for consumed in (0, 2):
        loader = build_loader(
            _dataset(case), data, seed=0, dp_rank=0, dp_size=1, micro_batch_size=2, global_batch_size=2,
            consumed_samples=consumed, position=position,
        )  # fmt: skip
        stream = iter(loader)
        batches.append([next(stream)])
        if not consumed:
            position = loader.state_dict()  # None, unless it is a stream
            batches[0].append(next(stream))
    expected, found = batches[0][1], batches[1][0]
    if not any(isinstance(value, torch.Tensor) for name, value in found.items() if name != "sample_index"):
        raise CheckFailed("its batches have no tensors")
    for name, value in expected.items():
        same = torch.equal(value, found[name]) if isinstance(value, torch.Tensor) else value == found[name]
        if not same:
            raise CheckFailed(f"{name} of the second batch is another one when the run starts there")


# Tasks


def _task(case: Case, model: Any) -> Any:
    target: Any = case.manager.load(case.spec)
    try:
        return target(model, seed=0, device=torch.device("cpu"))
    except AttributeError as error:
        if f"{type(model).__name__!r} object has no attribute" not in str(error):
            raise
        raise CheckSkipped(f"it wants another model than the kit's ({error})") from error


def _losses(case: Case, model: Any, batches: list[dict[str, Any]]) -> list[tuple[Any, Any, Any]]:
    task = _task(case, model)
    results = []
    try:
        prepared = list(task.prepare(batches))
    except (KeyError, AttributeError) as error:
        raise CheckSkipped(
            f"it wants another model or batch than the kit's ({type(error).__name__}: {error})"
        ) from error
    if len(prepared) != len(batches):
        raise CheckFailed(
            f"prepare makes {len(prepared)} items of {len(batches)} micro batches; the loop wants one each"
        )
    for inputs in prepared:
        outputs = task.forward(model, inputs)
        results.append(task.loss(outputs, inputs))
        if type(task.tokens(inputs)) is not int:
            raise CheckFailed("tokens() returns no int")
    return results


@check("a task is built as task(model, seed=…, device=…) and has the four methods", stage="build", roles=TASK)
def task_builds(case: Case) -> None:
    built = _task(case, toy_model.toy_model())
    absent = [
        name for name in ("prepare", "forward", "loss", "tokens") if not callable(getattr(built, name, None))
    ]
    if absent:
        raise CheckFailed(f"it has no {', '.join(absent)}")


@check("its loss is a sum and a weight a sample, with metrics that are sums", stage="build", roles=TASK)
def task_losses_are_sums(case: Case) -> None:
    ((sums, weights, metrics),) = _losses(case, toy_model.toy_model(), [toy_model.toy_batch(0, 3)])
    for name, value in (("sums", sums), ("weights", weights)):
        if not isinstance(value, torch.Tensor) or value.shape != (3,) or not bool(value.isfinite().all()):
            raise CheckFailed(f"{name} of 3 samples is no finite tensor [3]")
    if not bool((weights >= 0).all()) or not float(weights.sum()) > 0:
        raise CheckFailed(f"weights are {weights.tolist()}; they are not negative, and not all zero")
    if not sums.requires_grad or weights.requires_grad:
        raise CheckFailed("sums must carry the gradient, and weights none")
    if not isinstance(metrics, dict) or any(getattr(value, "ndim", None) != 0 for value in metrics.values()):
        raise CheckFailed("metrics is no dict of 0-d tensors")


@check("a sample's loss does not depend on the micro batch that it is in", stage="build", roles=TASK)
def task_losses_are_per_sample(case: Case) -> None:
    torch.manual_seed(1)
    ((whole, weights, _),) = _losses(case, toy_model.toy_model(), [toy_model.toy_batch(0, 4)])
    torch.manual_seed(2)
    parts = _losses(case, toy_model.toy_model(), [toy_model.toy_batch(0, 1), toy_model.toy_batch(1, 3)])
    sums, split = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    builds.must_be_close(
        sums,
        whole,
        1e-5,
        "samples have other losses in another micro batch; key noise and timestep by sample_index",
    )
    builds.must_be_close(split, weights, 1e-6, "samples have other weights in another micro batch")


@check("gradients of the loss reach the predictor, and no encoder", stage="build", roles=TASK)
def task_trains_the_predictor(case: Case) -> None:
    model = toy_model.toy_model()
    ((sums, _, _),) = _losses(case, model, [toy_model.toy_batch(0, 2)])
    sums.sum().backward()
    if all(p.grad is None for p in model.predictor.parameters()):
        raise CheckFailed("no parameter of the predictor gets a gradient")
    encoders = [p for part in (model.ae, model.text_encoder) for p in part.parameters()]
    if any(p.grad is not None for p in encoders):
        raise CheckFailed("parameters of an encoder get a gradient; encoders are frozen")


# Callbacks


def _callback(case: Case) -> Any:
    target: Any = case.manager.load(case.spec)
    return target()


@check("a callback runs through a training run and changes nothing in it", stage="build", roles=CALLBACK)
def callback_runs_through(case: Case) -> None:
    from mm_core.observe.callback import RunContext, StepRecord

    for folder in (None, case.folder):
        model = toy_model.toy_model()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        state = builds.global_state()
        callback = _callback(case)
        context = RunContext(0, 1, 0, 2, 1, folder, model)
        callback.on_train_start(context)
        for step in (1, 2):
            callback.on_step_start(context, step)
            callback.on_step_end(context, StepRecord(step, 0.5, 1.0, 1e-4, 0.1, 20.0, 800.0, 10**6, 2 * step))
        callback.on_train_end(context)
        if found := builds.changed(state, builds.global_state()):
            raise CheckFailed(f"it changed {', '.join(found)}; an observer must not change a run's numbers")
        after = model.state_dict()
        if changed := [name for name, value in before.items() if not torch.equal(value, after[name])]:
            raise CheckFailed(f"it changed weights: {', '.join(changed[:3])}")


@check(
    "its on_train_end works right after the start, as when a run fails early", stage="build", roles=CALLBACK
)
def callback_ends_early(case: Case) -> None:
    from mm_core.observe.callback import RunContext

    callback = _callback(case)
    context = RunContext(0, 1, 0, 2, 1, None, toy_model.toy_model())
    callback.on_train_start(context)
    callback.on_train_end(context)


# Pipelines


@check(
    "a pipeline is called with model, tokenizer, device and its section's fields",
    stage="build",
    roles=PIPELINE,
)
def pipeline_signature_fits(case: Case) -> None:
    target: Any = case.manager.load(case.spec)
    fields = builds.section(case).fields if case.example is not None else {}
    try:
        signature = inspect.signature(target)
        bound = signature.bind_partial if case.example is None else signature.bind
        bound("model", "tokenizer", device="cpu", **fields)
    except TypeError as error:
        raise CheckFailed(
            f"pipeline(model, tokenizer, device=…, **fields) does not fit it: {error}"
        ) from error
    wanted = {"seed", "indices", "steps", "guidance_scale", "negative_prompt", "latents", "progress"}
    declared = inspect.signature(target.__call__).parameters
    if any(p.kind is p.VAR_KEYWORD for p in declared.values()):
        return
    if absent := sorted(wanted - declared.keys()):
        raise CheckFailed(f"its __call__ has no {', '.join(absent)}, which mm generate passes")


@check("with the plugin's own components it makes finite videos in [-1, 1]", stage="build", roles=PIPELINE)
def pipeline_makes_videos(case: Case) -> None:
    pipeline = _pipeline(case)
    videos = pipeline(["a red ball", "two cats"], seed=0, indices=[0, 1], steps=2)
    if not isinstance(videos, torch.Tensor) or videos.ndim != 5 or videos.shape[:2] != (2, 3):
        raise CheckFailed("two prompts do not become a tensor [2, 3, T, H, W]")
    if not bool(videos.isfinite().all()) or float(videos.abs().max()) > 1 + 1e-6:
        raise CheckFailed(
            f"values reach {float(videos.abs().max()):.3g}, or are not finite; videos are in [-1, 1]"
        )


@check("a prompt's video depends on seed and index, not on its batch", stage="build", roles=PIPELINE)
def pipeline_is_keyed(case: Case) -> None:
    pipeline = _pipeline(case)
    prompts = ["a red ball", "two cats"]
    before = builds.global_state()
    both = pipeline(prompts, seed=0, indices=[3, 4], steps=2)
    if found := builds.changed(before, builds.global_state()):
        raise CheckFailed(
            f"it changed {', '.join(found)}; draw noise from generators keyed by seed and index"
        )
    alone = pipeline(prompts[1:], seed=0, indices=[4], steps=2)
    other = pipeline(prompts[1:], seed=1, indices=[4], steps=2)
    builds.must_be_close(
        both[1:], alone, 1e-3, "the second prompt's video is another one when it is made alone"
    )
    builds.must_differ(other, alone, "another seed makes the same video")


def _pipeline(case: Case) -> Any:
    """The pipeline around the plugin's own predictor, autoencoder and diffusion, and a toy text encoder.

    Raises:
        CheckSkipped: the plugin has no examples of these.
    """
    from mm_core.models.sora import SoRAModel
    from mm_core.testing.execute import make_case

    if case.example is None:
        raise CheckSkipped("its plugin declares no example for it")
    parts: dict[str, Case] = {}
    for spec in case.plugin.components:
        other = make_case(case.plugin, spec, case.folder, with_example=True)
        if other.example is not None:
            parts.setdefault(other.role, other)
    if absent := sorted({"predictor", "ae", "diffusion"} - parts.keys()):
        raise CheckSkipped(f"its plugin has no {', '.join(absent)} with an example to try it with")
    length, width = builds.prompt_size(parts["predictor"])
    model = SoRAModel(
        predictor=builds.trainable(parts["predictor"]),
        ae=builds.build(parts["ae"]),
        diffusion=builds.build(parts["diffusion"]),
        text_encoder=toy_model.ToyTextEncoder(width),
    )
    target: Any = case.manager.load(case.spec)
    fields = builds.section(case).fields
    return target(model.eval(), toy_model.ToyTokenizer(length), device=torch.device("cpu"), **fields)
