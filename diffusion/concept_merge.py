r"""Custom Diffusion's constrained merge: concepts that were trained apart, in one adapter, without training.

Kumari et al., 2022, arXiv:2212.04488, section 3.2 and appendix. For every layer W (o, d) of keys or values

    minimise  || (Z - W) C_reg' ||_F   subject to  Z C' = V

C (m, d) are text features of the new words in a short prompt, V (m, o) what each concept's own trained layer makes of
its features, C_reg (n, d) features of ordinary captions, for which Z should stay what the base is. With
D = C (C_reg' C_reg)^-1

    Z = W + (V' - W C') (D C')^-1 D

Differs from the authors' code: one solve in float64 for all rows, with a ridge of 1e-6 of the mean eigenvalue, so that
few captions do; the constraint holds exactly all the same, since the ridge is part of D on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count, product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graft.diffusion.custom_diffusion import CustomDiffusion, attach_custom
from graft.diffusion.custom_diffusion_files import whole_weights, words_of
from graft.diffusion.words_and_weights import change_name, whole_name
from graft.studio.adapter import Adapter, Card
from graft.studio.config import from_dict
from graft.studio.errors import BaseMismatchError, InputError
from graft.studio.sites import named_modules

if TYPE_CHECKING:
    from graft.diffusion.base import DiffusionBase

RIDGE = 1e-6
_THINGS = (
    "dog cat horse bird fish mouse tree flower apple banana bread cake car bus train boat bicycle house bridge "
    "clock phone book key chair lamp ball guitar drum camera cup bottle hat shoe shirt bag umbrella star moon cloud sun"
)
_PLACES = ("on a red background", "on a table", "in the snow", "beside a tree", "with a blue sky behind it")
CAPTIONS = tuple(f"a photo of a {thing} {place}" for thing, place in product(_THINGS.split(), _PLACES))
"""200 ordinary captions, for which a merged denoiser stays as the base is."""


def merge_concepts(base: DiffusionBase, adapters: Sequence[Adapter], captions: Sequence[str] = CAPTIONS) -> Adapter:
    """Joins adapters of Custom Diffusion; a word that two of them have is renamed in the later one.

    Args:
        base: of all of them.
        adapters: two or more.
        captions: what should be drawn as before; a few hundred.

    Raises:
        InputError: fewer than two, another method's, concepts that prompts do not tell apart, or a base with two text
            encoders.
        BaseMismatchError: one that was trained on another base.
    """
    if len(adapters) < 2 or any(adapter.card.method != "custom_diffusion" for adapter in adapters):
        given = ", ".join(adapter.card.method for adapter in adapters) or "nothing"
        raise InputError(given, "a merge takes two or more adapters of custom_diffusion", "Name them one by one")
    methods = [from_dict(CustomDiffusion, adapter.card.config, "adapter.json") for adapter in adapters]
    if any(method.freeze_model != "crossattn_kv" for method in methods):
        reason = "the merge is of keys and values of the text; queries see no words to tell concepts by"
        raise InputError('freeze_model = "crossattn"', reason, 'Train the concepts with "crossattn_kv", or together')
    for adapter in adapters:
        if adapter.card.base_hash not in ("", base.hash):
            given, reason = f"adapter for {adapter.card.base}", f"{base.name} has hash {base.hash}"
            raise BaseMismatchError(f"{given} with hash {adapter.card.base_hash}", reason, "use its own base")
    if "text_encoder_2" in base.modules:
        raise InputError(base.name, "concepts in two text encoders cannot be merged", "Train them together")
    tokens = _names([method.tokens for method in methods])
    rows = [rows for adapter, method in zip(adapters, methods, strict=True) for rows in _rows(adapter, method)]
    vectors = [len(each) for each in rows]
    nouns = tuple(str(noun) for method in methods for noun in method.of_each(method.class_word, ""))
    joint = CustomDiffusion(token=sum(tokens, ()), class_word=nouns, vectors=max(vectors))
    embeddings = {f"embedding.{token}": each for token, each in zip(joint.tokens, rows, strict=True)}
    phrases = iter(joint.phrases)
    spoken = [[next(phrases) for _ in own] for own in tokens]
    handle = attach_custom(base, [joint], [0], vectors)
    try:
        for place, token in enumerate(joint.tokens):
            handle.words.load({"embedding": embeddings[f"embedding.{token}"]}, place)
        ordinary = features(base, captions)
        concepts = [_concept_features(base, own) for own in spoken]
        plan = handle.plan
    finally:
        handle.detach()
    merged = _merged(base, [whole_weights(adapter, base) for adapter in adapters], concepts, ordinary)
    tensors = embeddings | {change_name(site): merged[whole_name(site)] for site in plan}
    card = Card(
        method="custom_diffusion",
        config={"token": list(joint.tokens), "class_word": list(nouns), "vectors": joint.vectors},
        domain="diffusion",
        base=base.name,
        base_hash=base.hash,
        sites=plan.to_list(),
        data_digest=",".join(adapter.card.data_digest for adapter in adapters),
        trigger=joint.trigger,
        details={"merged": [list(method.tokens) for method in methods]},
    )
    return Adapter(tensors, card)


def _merged(
    base: DiffusionBase, trained: Sequence[Mapping[str, Tensor]], concepts: Sequence[Tensor], ordinary: Tensor
) -> dict[str, Tensor]:
    """Change of each layer."""
    modules: dict[str, Any] = named_modules(base.modules)
    told = torch.cat(list(concepts))
    first = _first_occurrences(told)
    changed = {}
    for name in trained[0]:
        weight = modules[name.removesuffix(".weight")].weight.detach().cpu().double()
        wanted = torch.cat([c @ own[name].double().T for c, own in zip(concepts, trained, strict=True)])
        merged = constrained(weight, told[first], wanted[first], ordinary)
        changed[name] = (merged - weight).float()
    return changed


def constrained(weight: Tensor, told: Tensor, wanted: Tensor, ordinary: Tensor) -> Tensor:
    """The weight nearest to the old one on ordinary features among those that do what is wanted.

    Args:
        weight: W (o, d).
        told: C (m, d).
        wanted: V (m, o).
        ordinary: C_reg (n, d).

    Returns:
        Z (o, d) float64.

    Raises:
        InputError: rows of C that depend on each other.
    """
    weight, told, wanted, ordinary = (tensor.double() for tensor in (weight, told, wanted, ordinary))
    gram = ordinary.T @ ordinary
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    d = torch.linalg.solve(gram, told.T).T  # (m, d)
    inner = d @ told.T
    if not float(torch.linalg.cond(inner)) < 1e13:
        raise InputError("the concepts", "their prompts have the same features", "Use other words for them")
    return weight + (wanted.T - weight @ told.T) @ torch.linalg.solve(inner, d)


def features(base: DiffusionBase, prompts: Sequence[str], skip: str = "") -> Tensor:
    """Text features that the denoiser is given, of every token after the first up to the end's: (n, d) float64.

    Args:
        base: with one text encoder.
        prompts: one after the other.
        skip: a beginning whose tokens are left out.
    """
    tokenizer, found = base.tokenizer, []
    start = 1 + len(tokenizer(skip, add_special_tokens=False).input_ids)
    with torch.no_grad():
        for at in range(0, len(prompts), 32):
            some = list(prompts[at : at + 32])
            whole = base.encode(base.tokenize(some)).double().cpu()
            plain = base.pipe.maybe_convert_prompt(some, tokenizer)
            ids = tokenizer(plain, truncation=True, max_length=whole.shape[1]).input_ids
            found += [row[start : len(own)] for row, own in zip(whole, ids, strict=True)]
    return torch.cat(found)


def _concept_features(base: DiffusionBase, phrases: Sequence[str]) -> Tensor:
    """Features of an adapter's words alone and in a prompt, whose beginning is the same for all."""
    return torch.cat([features(base, phrases), features(base, [f"photo of a {p}" for p in phrases], "photo of a")])


def _first_occurrences(rows: Tensor) -> list[int]:
    """Rows that are not a copy of an earlier one, up to rounding."""
    near = torch.cdist(rows, rows) < 1e-6 * rows.norm(dim=1).mean()
    return [i for i in range(len(rows)) if not bool(near[i, :i].any())]


def _rows(adapter: Adapter, method: CustomDiffusion) -> list[Tensor]:
    words = words_of(adapter)
    return [words[token]["embedding"] for token in method.tokens]


def _names(given: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The words of each adapter, those that occur again as the next free <new1>, <new2>, ..."""
    taken = {token for tokens in given for token in tokens}
    free, seen, names = (f"<new{i}>" for i in count(1)), set(), []
    for tokens in given:
        own = tuple(next(name for name in free if name not in taken) if token in seen else token for token in tokens)
        seen |= set(own)
        names.append(own)
    return names
