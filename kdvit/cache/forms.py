"""The forms in which a teacher's signals are stored: what each takes on the disk, and how it becomes a signal again."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kdvit.signals import ATTENTION_SIGNALS, CLASS_SIGNALS, MAP_SIGNALS, SignalInfo

KINDS = "fp16, fp32, int8, top<k> (such as top10) and project<k> (such as project64)"
#: Tensors of one row, by the names of their parts: (shape, dtype).
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Form:
    """How one signal is stored.

    Args:
        text: its name on the command line.
        source: the signal as the teacher gives it.
    """

    def __init__(self, text: str, source: SignalInfo) -> None:
        self.text, self.source = text, source
        #: The signal as losses see it.
        self.info = source
        #: Name of what is kept beside the rows for it; None for nothing.
        self.constant: str | None = None

    def refusal(self) -> str:
        """Why the form does not suit the signal, in words; "" where it does."""
        return ""

    def layout(self) -> Layout:
        raise NotImplementedError

    @property
    def num_bytes(self) -> int:
        """Of one image."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.layout().values())

    def encode(self, signal: Tensor) -> dict[str, Tensor]:
        """The parts of a batch (B, ...) of a finite float32 signal."""
        raise NotImplementedError

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The float32 signal (B, ...) of a batch, on the device of its parts."""
        raise NotImplementedError


class FP32(Form):
    """As it is."""

    def layout(self) -> Layout:
        return {"value": (self.source.shape, torch.float32)}

    def encode(self, signal: Tensor) -> dict[str, Tensor]:
        return {"value": signal}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["value"].float()


class FP16(FP32):
    """Rounded to 11 significant bits: relative error <= 2^-11, or 2^-25 where |x| < 2^-14."""

    def layout(self) -> Layout:
        return {"value": (self.source.shape, torch.float16)}

    def encode(self, signal: Tensor) -> dict[str, Tensor]:
        return {"value": _half(signal, self.source)}


class INT8(Form):
    """8 bits a value, with one float32 scale for each token: of a map for each position, else for each row.

    x = scale * q,  scale = max |x| / 127,  q = round(x / scale): the error is <= max |x| / 254 of its token.
    """

    def refusal(self) -> str:
        if self.source.signal in CLASS_SIGNALS:
            return "8 bits are too few for logits"
        return ""

    @property
    def axis(self) -> int:
        """The axis that shares a scale, counted with the batch axis."""
        return 1 if self.source.signal in MAP_SIGNALS else len(self.source.shape)

    def layout(self) -> Layout:
        shape = self.source.shape
        scales = tuple(1 if place == self.axis else size for place, size in enumerate(shape, start=1))
        return {"value": (shape, torch.int8), "scale": (scales, torch.float32)}

    def encode(self, signal: Tensor) -> dict[str, Tensor]:
        largest = signal.abs().amax(dim=self.axis, keepdim=True)
        scale = (largest / 127).clamp_min(torch.finfo(torch.float32).tiny)  # all zeros: anything but a division by 0
        return {"value": (signal / scale).round().to(torch.int8), "scale": scale}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["value"].float() * parts["scale"]


class TopK(Form):
    """The k largest logits in fp16 with their classes, and the log-sum-exp of the others.

    Decoded, the others share their probability evenly: each of the C - k gets log-sum-exp - log(C - k), so the
    softmax of temperature 1 has the teacher's mass in the k classes and in the rest. Storing the log-sum-exp of the
    others, and not that of all, needs no difference of nearly equal numbers where the rest is nearly nothing.
    """

    def __init__(self, text: str, source: SignalInfo, k: int) -> None:
        super().__init__(text, source)
        self.k = k

    def refusal(self) -> str:
        if self.source.signal not in ("logits", "dist_logits"):
            return "it is for logits"
        if not 1 <= self.k <= self.source.dim:
            return f"k must be in 1..{self.source.dim}, the number of classes"
        return ""

    def layout(self) -> Layout:
        index = torch.int16 if self.source.dim <= torch.iinfo(torch.int16).max else torch.int32
        return {"value": ((self.k,), torch.float16), "class": ((self.k,), index), "rest": ((1,), torch.float32)}

    def encode(self, signal: Tensor) -> dict[str, Tensor]:
        top, classes = signal.topk(self.k, dim=1)
        others = signal.scatter(1, classes, -torch.inf)
        rest = others.logsumexp(dim=1, keepdim=True)
        if self.k == self.source.dim:
            rest = torch.zeros_like(rest)  # of nothing; decode does not look at it
        index = self.layout()["class"][1]
        return {"value": _half(top, self.source), "class": classes.to(index), "rest": rest}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        num_others = max(1, self.source.dim - self.k)
        logits = (parts["rest"].float() - math.log(num_others)).repeat(1, self.source.dim)
        return logits.scatter(1, parts["class"].long(), parts["value"].float())


class Projected(Form):
    """Features in k dimensions, as fp16: x @ P, the same orthonormal P (D, k) for all signals of a width.

    P^T P = D / k, so that inner products and distances stay what they are in the mean over all P. Losses see a teacher
    of width k. P is drawn once and kept in the cache.
    """

    def __init__(self, text: str, source: SignalInfo, k: int) -> None:
        super().__init__(text, source)
        self.k = k
        self.constant = f"projection.{source.dim}.{k}"
        shape = (k, *source.shape[1:]) if source.signal in MAP_SIGNALS else (*source.shape[:-1], k)
        self.info = replace(source, shape=shape)

    def refusal(self) -> str:
        if self.source.signal in (*CLASS_SIGNALS, *ATTENTION_SIGNALS):
            return "it is for tokens, maps and pooled features: what attention and logits mean is in their axes"
        if not 1 <= self.k <= self.source.dim:
            return f"k must be in 1..{self.source.dim}, the width"
        return ""

    def draw(self) -> Tensor:
        """A new P."""
        dim = self.source.dim
        normal = torch.randn(dim, self.k, generator=torch.Generator().manual_seed(dim), dtype=torch.float64)
        return (torch.linalg.qr(normal).Q * math.sqrt(dim / self.k)).float().contiguous()

    def project(self, signal: Tensor, matrix: Tensor) -> Tensor:
        if self.source.signal in MAP_SIGNALS:
            return torch.einsum("bdhw,dk->bkhw", signal, matrix)
        return signal @ matrix

    def layout(self) -> Layout:
        return {"value": (self.info.shape, torch.float16)}

    def encode(self, signal: Tensor) -> dict[str, Tensor]:
        """Of a signal that is projected already."""
        return {"value": _half(signal, self.source)}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["value"].float()


def make_form(text: str, info: SignalInfo) -> Form:
    """A form by its name, for one signal.

    Raises:
        ValueError: no such form, or it does not suit the signal.
    """
    form = _form(text, info)
    why = form.refusal()
    if why:
        raise ValueError(
            f"cache: form '{text}' must suit the signal, and does not suit {info.signal} of shape {info.shape}: {why}; "
            f"forms are {KINDS}."
        )
    return form


def choose_forms(texts: str | Sequence[str], infos: Sequence[SignalInfo]) -> list[Form]:
    """One form for each signal.

    Args:
        texts: a form for every signal that it suits, or ``SIGNAL=FORM``, or several of these; fp16 for the others.
        infos: the signals.

    Raises:
        ValueError: no such form or signal, a form suits none of them, a signal is named twice.

    Example:
        >>> infos = [SignalInfo("logits", "output", (100,)), SignalInfo("pooled", "head", (64,))]
        >>> [form.text for form in choose_forms("top5", infos)]
        ['top5', 'fp16']
    """
    words: list[str] = []
    named: dict[str, str] = {}
    for text in [texts] if isinstance(texts, str) else texts:
        signal, equals, form = text.partition("=")
        if not equals:
            words.append(text)
            continue
        if all(info.signal != signal for info in infos):
            known = ", ".join(dict.fromkeys(info.signal for info in infos))
            raise ValueError(f"cache: form must name a signal that the losses read, got '{signal}'; they read {known}.")
        if signal in named:
            raise ValueError(f"cache: form must be given once, got two for {signal}; drop one.")
        named[signal] = form
    for word in words:
        if all(_form(word, info).refusal() for info in infos):
            make_form(word, infos[0])  # raises
    return [make_form(named[info.signal] if info.signal in named else _suiting(words, info), info) for info in infos]


def _suiting(words: Sequence[str], info: SignalInfo) -> str:
    found = [word for word in words if not _form(word, info).refusal()]
    if len(found) > 1:
        raise ValueError(
            f"cache: form must be given once, got {' and '.join(found)} for {info.signal}; write {info.signal}=FORM."
        )
    return found[0] if found else "fp16"


def _form(text: str, info: SignalInfo) -> Form:
    if text in ("fp16", "fp32", "int8"):
        return {"fp16": FP16, "fp32": FP32, "int8": INT8}[text](text, info)
    found = re.fullmatch(r"(top|project)(\d+)", text)
    if found is None:
        raise ValueError(f"cache: form must be one of {KINDS}, got '{text}'; choose one.")
    return {"top": TopK, "project": Projected}[found[1]](text, info, int(found[2]))


def _half(signal: Tensor, source: SignalInfo) -> Tensor:
    largest = signal.abs().max()
    if largest > torch.finfo(torch.float16).max:
        raise ValueError(
            f"cache: {source.signal} of '{source.model}' at '{source.location}' must be within 65504 to be stored in "
            f"fp16, got {largest.item():.6g}; store it as fp32: --form {source.signal}=fp32."
        )
    return signal.half()
