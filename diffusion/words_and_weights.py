"""What attaches new words together with changes of the denoiser's weights: Custom Diffusion and pivotal tuning.

A bias is a site of its own. Its change is called `SITE.bias.d`, that of a weight by Custom Diffusion `SITE.change`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from torch import Tensor, nn

from graft.diffusion.textual_inversion import ENCODERS, Concepts
from graft.studio.errors import FormatError
from graft.studio.sites import Site, named_modules
from graft.studio.slots import Handle


def parameter(site: Site) -> str:
    """The parameter that a site covers."""
    return "bias" if site.kind == "bias" else "weight"


def change_name(site: Site) -> str:
    """What an adapter calls the change of a site."""
    return f"{site.key}.d" if site.kind == "bias" else f"{site.key}.change"


def whole_name(site: Site) -> str:
    """What an adapter from another program's file calls the whole parameter of a site."""
    return f"{site.name}.{parameter(site)}"


class WordsAndWeights:
    """New words and changed weights, attached together; `bank` holds what is trained, a slot for each method."""

    def __init__(self, words: Concepts, weights: Handle, methods: Sequence[Any], inner: list[list[str]]):
        self.words, self.weights, self.methods, self.plan = words, weights, methods, weights.plan
        self.bank = nn.ModuleDict({"words": words.bank, "weights": weights.bank})
        self._inner = inner
        ends = [sum(map(len, inner[:slot])) for slot in range(len(inner) + 1)]
        self._places = [range(*pair) for pair in zip(ends, ends[1:], strict=False)]
        self.route, self.scale = weights.route, weights.scale

    @property
    def routed(self) -> Tensor | None:
        """What `route` was told last."""
        return self.weights.routed

    def spoken(self, slot: int, prompt: str) -> str:
        """The prompt with the words that a method's concepts have here, where several methods may share one."""
        pairs = zip(self.methods[slot].tokens, self._inner[slot], strict=True)
        for token, inner in sorted(pairs, key=lambda pair: -len(pair[0])):
            prompt = prompt.replace(token, inner)
        return prompt

    def param_groups(self) -> list[dict[str, Any]]:
        """Words, with their own share of the learning rate, and changes."""
        words = {"params": list(self.words.bank.parameters()), "lr_scale": self.methods[0].word_rate}
        return [words, {"params": list(self.weights.bank.parameters())}]

    def owned(self) -> list[tuple[nn.Parameter, int | None]]:
        """Words belong to the methods that have them; changes are stacks over all."""
        of = {place: slot for slot, places in enumerate(self._places) for place in places}
        words = [(row, of[place]) for row, place in self.words.owned() if place is not None]
        return [*words, *((stack, None) for stack in self.weights.bank.parameters())]

    def tensors(self, slot: int = 0) -> dict[str, Tensor]:
        """What a trained adapter keeps: `embedding.WORD` (n, d), of a second text encoder `embedding_2.WORD`, and
        `SITE.change` (o, i)."""
        named = zip(self.methods[slot].tokens, self._places[slot], strict=True)
        rows = {f"{name}.{token}": rows for token, place in named for name, rows in self.words.tensors(place).items()}
        return rows | {name: tensor.cpu() for name, tensor in self.weights.tensors(slot).items()}

    def load(self, tensors: Mapping[str, Tensor], slot: int = 0) -> None:
        """Sets a slot's words and changes, the latter also from whole weights `SITE.weight` and biases `SITE.bias`.

        Raises:
            FormatError: a name missing or unknown, or another shape than this base needs.
        """
        for token, place in zip(self.methods[slot].tokens, self._places[slot], strict=True):
            rows = {name: tensors[key] for name in ENCODERS if (key := f"{name}.{token}") in tensors}
            self.words.load(rows, place)
        changes = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] not in ENCODERS}
        modules: dict[str, Any] = named_modules(self.words.base.modules)
        for site in self.plan:
            whole, own = changes.pop(whole_name(site), None), getattr(modules[site.name], parameter(site)).detach()
            if whole is not None and whole.shape == own.shape:
                changes[change_name(site)] = whole.float() - own.float().cpu()
        self.weights.load(changes, slot)

    def restored(self, tensors: Mapping[str, Tensor]) -> Self:
        """Itself with trained values, which are trained no more.

        Raises:
            FormatError: tensors that do not fit; nothing is attached then.
        """
        try:
            self.load(tensors)
        except FormatError:
            self.detach()
            raise
        self.bank.eval().requires_grad_(False)
        return self

    def probe(self, run: Callable[[], Tensor]) -> None:
        """One forward and backward each: every word and every layer must get a gradient."""
        self.words.probe(run)
        self.weights.probe(run)

    def merge(self, slot: int = 0) -> None:
        """Puts changes into the weights and words into the token table; `detach` restores both."""
        self.words.merge()
        self.weights.merge(slot)

    def detach(self) -> None:
        """Restores the base bit for bit."""
        self.words.detach()
        self.weights.detach()
