"""What one component puts out must be what the next takes in, as far as sections or `config.json` files say.

A predictor's config class may have, torch-free: `latent_channels`, channels of the latents that it predicts;
`condition_channels`, channels that it reads beside those of the latents; `text_width`, channels of the embeddings that
it reads. Without, the keys `out_dim`, `in_dim` and `text_dim` are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mm_core.config.component import ComponentConfig
from mm_core.config.document import Document, expanded
from mm_core.config.findings import Finding
from mm_core.config.latents import latent_channels, read_hf_config
from mm_registry.errors import UserError


def check_channels(components: Mapping[str, ComponentConfig], document: Document) -> Iterator[Finding]:
    """What one component puts out must be what the next takes in, as far as their sections or config.json
    files say.

    Raises:
        UserError: a property of a plugin's config class raised; its distribution is named.
    """
    encoders = [component for name, component in components.items() if name.split(".")[0] == "text_encoder"]
    for name in ("predictor", "low_noise_predictor"):
        predictor = components.get(name)
        # A second expert that is a folder has the first one's section, where this has been said.
        if predictor is None or (name != "predictor" and not document.keys.get((name, "model_id"))):
            continue
        ae = components.get("ae")
        if ae is not None:
            latent = latent_channels(ae) or _number(ae, "z_dim", "latent_channels")
            if latent is not None:
                yield from _check_latents(predictor, document, ae, latent)
        if len(encoders) == 1:
            yield from _check_width(predictor, document, encoders[0])


def _check_latents(
    predictor: ComponentConfig, document: Document, ae: ComponentConfig, latent: int
) -> Iterator[Finding]:
    produced, has = (
        _stated(predictor, "latent_channels", "out_dim"),
        f"but {ae.label} has {latent} latent channels",
    )
    if produced is not None and produced != latent:
        yield _finding(predictor, document, "out_dim", produced, latent, "predicts {} channels", has)
        return
    conditions = _told(predictor, "condition_channels")
    taken = predictor.fields.get("in_dim")
    if not isinstance(taken, int) or isinstance(taken, bool):
        return
    if conditions is not None and taken != latent + conditions:
        wanted = latent + conditions
        beside = f"{has} and {conditions} of conditions are joined to them" if conditions else has
        yield _finding(predictor, document, "in_dim", taken, wanted, "reads {} channels", beside)
    elif taken < latent:
        yield _finding(predictor, document, "in_dim", taken, latent, "reads {} channels", has)


def _check_width(
    predictor: ComponentConfig, document: Document, encoder: ComponentConfig
) -> Iterator[Finding]:
    width = _number(encoder, "d_model", "hidden_size")
    taken = _stated(predictor, "text_width", "text_dim")
    if width is not None and taken is not None and taken != width:
        has = f"but {encoder.label} has embeddings of {width}"
        yield _finding(predictor, document, "text_dim", taken, width, "reads embeddings of {}", has)


def _finding(
    predictor: ComponentConfig, document: Document, key: str, value: int, wanted: int, does: str, has: str
) -> Finding:
    if key in predictor.fields and predictor.fields[key] == value:
        path = (*predictor.path, key)
        text, mend = f"{key} is {value}, {has}", f"Write {wanted}"
        return Finding.at(document.origin(path), "error", "channels", text, path=path, suggestion=mend)
    text = f"{predictor.label} {does.format(value)}, {has}"
    return Finding.at(document.key_origin(predictor.path), "error", "channels", text, path=predictor.path)


def _stated(predictor: ComponentConfig, name: str, key: str) -> int | None:
    told = _told(predictor, name)
    value = predictor.fields.get(key) if told is None else told
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _told(predictor: ComponentConfig, name: str) -> int | None:
    """Return what the config class says about itself."""
    try:
        value = getattr(predictor.config, name, None)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{predictor.label}: {name} of {predictor.spec.provider}'s config class raised {text}"
        ) from error
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(component: ComponentConfig, *names: str) -> int | None:
    """Return a size that the section states (itself or in `config`), or the config.json of its pretrained
    folder.
    """
    nested = component.fields.get("config")
    sources: list[Mapping[str, Any]] = [component.fields]
    if isinstance(nested, Mapping):
        sources.append(nested)
    if component.init == "pretrained" and component.from_pretrained:
        sources.append(read_hf_config(expanded(component.from_pretrained)))
    for source in sources:
        for name in names:
            value = source.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None
