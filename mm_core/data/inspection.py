"""What a set of videos and images gives: counts per bucket, what is left out and why, captions, sample frames."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mm_core.data.annotations import Annotation
from mm_core.data.buckets import ClipShape
from mm_core.data.clips import ClipReader
from mm_core.data.errors import UnreadableSampleError
from mm_core.data.frames import FrameRule
from mm_core.data.resolution import ResolutionRule
from mm_core.data.selection import Refused, Rules, Sample, Unreadable
from mm_core.random import keyed_seed

#: Tokens, or None where there is no tokenizer.
Count = Callable[[str], int]
_ENDLESS = 2**40  # frames; no video is as long


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A sample that is not trained on, or is replaced: where its annotation stands, and why."""

    origin: str
    path: str
    rule: str
    reason: str


@dataclass(frozen=True, slots=True)
class Captions:
    """Lengths of captions in tokens, before they are cut.

    Attributes:
        texts: how many captions there are; a sample may have several.
        empty: of these, without a text.
        tokens: length -> number of captions; empty where they were not counted.
        limit: `model_max_length`; longer captions are cut.
    """

    texts: int
    empty: int
    tokens: Counter[int]
    limit: int | None = None

    @property
    def cut(self) -> int:
        """Captions that are longer than the limit."""
        return 0 if self.limit is None else sum(n for size, n in self.tokens.items() if size > self.limit)

    def quantile(self, share: float) -> int | None:
        """Return the length that at least `share` of the captions do not exceed."""
        seen, wanted = 0, share * self.tokens.total()
        for size in sorted(self.tokens):
            seen += self.tokens[size]
            if seen >= wanted:
                return size
        return None


@dataclass(frozen=True)
class Inspected:
    """What `mm data inspect` needs of a dataset; its class says it with a static method `inspected(seed, **fields)`.

    Attributes:
        count: tokens of a caption; None: `no_tokens` says why they cannot be counted.
        limit: tokens that are kept of a caption.
    """

    name: str
    annotations: list[Annotation]
    rules: Rules
    reader: ClipReader
    count: Count | None = None
    limit: int | None = None
    no_tokens: str = ""


@dataclass
class Inspection:
    """What was found in a set.

    Attributes:
        name: the set.
        samples: what can be trained on.
        left_out: what cannot, with the rule: a rule for length or shape, or `unreadable`.
    """

    name: str
    total: int = 0
    samples: list[Sample] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    captions: Captions = field(default_factory=lambda: Captions(0, 0, Counter()))

    @property
    def buckets(self) -> Counter[ClipShape]:
        """Samples of each shape of clip."""
        return Counter(sample.shape for sample in self.samples if sample.shape is not None)

    @property
    def rules(self) -> Counter[str]:
        """What is left out, by rule."""
        return Counter(item.rule for item in self.left_out)

    @property
    def images(self) -> int:
        """Samples that are images."""
        return sum(sample.image for sample in self.samples)

    @property
    def seconds(self) -> float:
        """Length of all videos that can be trained on."""
        return sum(sample.frames / sample.fps for sample in self.samples if not sample.image)


def whole_files() -> Rules:
    """Rules that leave nothing out: a bucket is the files' own frames, height and width."""
    frames = FrameRule(num_frames=_ENDLESS, auto_interval=False, drop_short_ratio=0.0, temporal_stride=1)
    resolution = ResolutionRule(max_height=1, max_width=1, hw_aspect_thr=float(_ENDLESS))
    return Rules(frames, resolution, lambda height, width: (height, width))


def inspect(
    dataset: Inspected,
    *,
    decode: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Inspection:
    """Look at every annotation of a set.

    Args:
        decode: read a clip of every sample, so that damaged files are found; without it only headers of files are read,
            and only where the annotations do not say all.
        progress: is called with the number of samples that were looked at.
    """
    rules = dataset.rules
    found = Inspection(dataset.name, len(dataset.annotations))
    for number, item in enumerate(rules.judged(dataset.annotations), start=1):
        match item:
            case Refused():
                found.left_out.append(_left_out(item.annotation, item.rule, item.reason))
            case Unreadable():
                found.left_out.append(_left_out(item.sample.annotation, "unreadable", item.error.reason))
            case Sample():
                reason = _broken(item, rules, dataset.reader, number) if decode else None
                if reason is None:
                    found.samples.append(item)
                else:
                    found.left_out.append(_left_out(item.annotation, "unreadable", reason))
        if progress is not None:
            progress(number)
    found.captions = _captions(found.samples, dataset.count, dataset.limit)
    return found


def spread(samples: Sequence[Sample], number: int) -> list[Sample]:
    """Return `number` samples in their order: one or more of each bucket as far as they reach, the others evenly."""
    if number >= len(samples):
        return list(samples)
    first: dict[Any, int] = {}
    for index, sample in enumerate(samples):
        first.setdefault(sample.shape, index)
    chosen = set(list(first.values())[:number])
    rest = [index for index in range(len(samples)) if index not in chosen]
    missing = number - len(chosen)
    chosen |= {rest[k * len(rest) // missing] for k in range(missing)}
    return [samples[index] for index in sorted(chosen)]


def clip_frames(sample: Sample, rules: Rules, key: int = 0) -> list[int]:
    """Return the frames of one of the sample's clips."""
    if sample.image:
        return [0]
    return rules.frames.choose(sample.frames, sample.fps, keyed_seed(rules.seed, "frames", key))


def _left_out(annotation: Annotation, rule: str, reason: str) -> LeftOut:
    return LeftOut(annotation.origin, str(annotation.path), rule, reason)


def _broken(sample: Sample, rules: Rules, reader: ClipReader, key: int) -> str | None:
    try:
        clip = reader.read(sample.annotation, clip_frames(sample, rules, key))
    except UnreadableSampleError as error:
        return error.reason
    if tuple(clip.shape[1:]) != sample.shape:
        made = "×".join(map(str, clip.shape[1:]))
        return f"its annotation promises a clip of {sample.shape}, but it gives one of {made}"
    return None


def _captions(samples: Iterable[Sample], count: Count | None, limit: int | None) -> Captions:
    texts, empty = 0, 0
    tokens: Counter[int] = Counter()
    for text in _texts(samples):
        texts += 1
        empty += not text.strip()
        if count is not None:
            tokens[count(text)] += 1
    return Captions(texts, empty, tokens, limit)


def _texts(samples: Iterable[Sample]) -> Iterator[str]:
    for sample in samples:
        yield from sample.annotation.captions
