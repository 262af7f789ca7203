"""What the embedded models can do, in figures: each measure is computed from the committed weights and a seed.

Known sprites are those of pretraining; new ones were never seen. Pictures are drawn as any user would draw them: by a
`StableDiffusionPipeline` from the standard folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from graft.studio.pocket import models
from graft.studio.pocket.atlas import Atlas
from graft.studio.pocket.pretrain.draw import pictures
from graft.studio.pocket.qa import exact_match, mean_accuracy
from graft.studio.pocket.questions import question_scene
from graft.studio.pocket.scenes import COLOURS, SIDE, UNSEEN_OPENING, sample_scene, with_article

STEPS, GUIDANCE = 25, 5.0
"""DDIM steps and classifier-free guidance of every generated picture."""


def psnr(pictures: Tensor, others: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each pair of pictures (b, 3, h, w) in [-1, 1], in dB, (b,)."""
    return -10 * torch.log10((pictures - others).square().mean((1, 2, 3)) / 4)


def share(hits: Tensor) -> float:
    """Return how many of the truth values hold, in percent."""
    return 100 * hits.float().mean().item()


@torch.no_grad()
def reconstructions(vae: Any, sprites: Sequence[int], count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return random scenes of the given sprites and what the autoencoder makes of them, (count, 3, 64, 64) each."""
    rng = np.random.default_rng(seed)
    scenes = pictures([sample_scene(rng, sprites) for _ in range(count)])
    output = [vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in scenes.split(50)]
    return scenes, torch.cat(output)


@torch.no_grad()
def generate(pipe: Any, prompts: Sequence[str], seed: int = 0, batch_size: int = 50, width: int = SIDE) -> Tensor:
    """Return one picture for each prompt, (b, 3, 64, width) in [-1, 1]; row k uses seed + k."""
    pipe.set_progress_bar_config(disable=True)
    parts = []
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        noise = [torch.Generator().manual_seed(seed + start + k) for k in range(len(part))]
        how = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "generator": noise, "output_type": "pt"}
        out = pipe(part, height=SIDE, width=width, **how)
        parts.append(out.images.float() * 2 - 1)
    return torch.cat(parts)


@torch.no_grad()
def text_features(clip: Any, texts: list[str]) -> Tensor:
    """Return the normalised projections of texts, (n, d)."""
    tokens = models.load_tokenizer()(texts, padding="longest", truncation=True, return_tensors="pt")
    return normalize(clip.text_projection(clip.text_model(tokens.input_ids).pooler_output), dim=-1)


@torch.no_grad()
def image_features(clip: Any, images: Tensor) -> Tensor:
    """Return the normalised projections of pictures (b, 3, 64, 64), (b, d)."""
    parts = [clip.visual_projection(clip.vision_model(part).pooler_output) for part in images.split(100)]
    return normalize(torch.cat(parts), dim=-1)


def name_ranks(
    clip: Any, images: Tensor, sprites: Sequence[int], opening: str = "{bare}", among: Sequence[int] | None = None
) -> Tensor:
    """Return the rank (0 = first) of each picture's own name among all known names, by zero-shot CLIP, (b,)."""
    atlas = Atlas.load()
    among = atlas.known if among is None else among
    told = text_features(clip, [opening.format(bare=atlas.names[i]) for i in among])
    scores = image_features(clip, images) @ told.T
    place = {sprite: k for k, sprite in enumerate(among)}
    own = scores.gather(1, torch.tensor([[place[s]] for s in sprites]))
    return (scores > own).sum(1)


@torch.no_grad()
def class_hits(vit: Any, images: Tensor, sprites: Sequence[int]) -> Tensor:
    """Return whether the classifier tells each picture's known sprite, (b,)."""
    place = {sprite: k for k, sprite in enumerate(Atlas.load().known)}
    found = torch.cat([vit(part).argmax(1) for part in images.split(100)])
    return found == torch.tensor([place[s] for s in sprites])


def border_colour(images: Tensor) -> list[str]:
    """Return the background colour name nearest to the mean border colour of each picture."""
    edge = torch.ones(images.shape[-2:], dtype=torch.bool)
    edge[3:-3, 3:-3] = False
    mean = (images[..., edge].mean(-1) + 1) * 127.5
    names = list(COLOURS)
    distance = torch.cdist(mean, torch.tensor([COLOURS[name] for name in names], dtype=torch.float32))
    return [names[k] for k in distance.argmin(1)]


def linear_probe(features: Tensor, labels: Tensor, others: Tensor, wanted: Tensor, decay: float = 1e-3) -> float:
    """Return the accuracy, in percent, of logistic regression on frozen features (n, d), tested on others (m, d)."""
    mean, std = features.mean(0), features.std(0) + 1e-6
    features, others = (features - mean) / std, (others - mean) / std
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.Linear(features.shape[1], int(labels.max()) + 1)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(layer(features), labels) + decay * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    with torch.no_grad():
        return share(layer(others).argmax(1) == wanted)


def single_scenes(sprites: Sequence[int], seed: int) -> Tensor:
    """Return one random scene of each sprite alone, (n, 3, 64, 64)."""
    rng = np.random.default_rng(seed)
    return pictures([sample_scene(rng, [s], objects=(1.0,)) for s in sprites])


def measure_autoencoder(seed: int, count: int = 400) -> dict[str, float]:
    """Return how well random scenes come back."""
    vae, atlas = models.autoencoder(), Atlas.load()
    sides = {"known": atlas.known, "new": atlas.new}
    return {
        f"PSNR on {side} sprites in random scenes, dB": psnr(*reconstructions(vae, sprites, count, seed)).mean().item()
        for side, sprites in sides.items()
    }


def measure_vit(seed: int) -> dict[str, float]:
    """Return how many known sprites the classifier tells."""
    known = Atlas.load().known
    return {"top-1 over all known classes, random scenes of one thing, %": share(
        class_hits(models.vit(), single_scenes(known, seed), known)
    )}  # fmt: skip


def measure_clip(seed: int, classes: int = 50, shots: int = 16, tests: int = 10) -> dict[str, float]:
    """Return zero-shot accuracy over known names, and what its frozen features are worth for new ones."""
    clip, atlas = models.clip(), Atlas.load()
    scenes = single_scenes(atlas.known, seed)
    figures = {
        f"zero-shot top-1 over all known names, {label}, %": share(name_ranks(clip, scenes, atlas.known, opening) < 1)
        for label, opening in (("bare name", "{bare}"), ("a phrasing not trained on", UNSEEN_OPENING))
    }
    new = [int(s) for s in np.random.default_rng(seed).permutation(atlas.new)[:classes]]
    labels = torch.arange(classes).repeat(shots + tests)
    pictured = single_scenes(new * (shots + tests), seed + 1)
    features = image_features(clip, pictured)
    cut = classes * shots
    probe = linear_probe(features[:cut], labels[:cut], features[cut:], labels[cut:])
    figures[f"linear probe on {classes} new classes, {shots} shots, %"] = probe
    ranks = name_ranks(clip, pictured[cut:], new * tests, UNSEEN_OPENING, among=new)
    figures[f"zero-shot top-1 on the same {classes} new classes, %"] = share(ranks < 1)
    return figures


def measure_llava(seed: int, count: int = 100) -> dict[str, float]:
    """Return how many questions about new scenes are answered to the letter, with the right picture and a wrong one."""
    model, processor, rng = models.llava(), models.llava_processor(), np.random.default_rng(seed)
    scenes = [question_scene(rng, Atlas.load().known) for _ in range(count)]
    scores = exact_match(model, processor, scenes, seed=seed)
    blind = exact_match(model, processor, scenes, seed=seed, shuffled=True)
    return {
        "answers right to the letter, mean over the kinds of questions, %": 100 * mean_accuracy(scores),
        "the same with the picture of another scene, %": 100 * mean_accuracy(blind),
        **{f"questions of the kind {kind}, %": 100 * score.accuracy for kind, score in scores.items()},
    }


def measure_sd(seed: int, names: int = 200) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return how many names are drawn so that they are told, and the pictures."""
    from diffusers import StableDiffusionPipeline

    atlas, pipe = Atlas.load(), StableDiffusionPipeline.from_pretrained(models.resolve("pocket-sd"))
    clip, vit = models.clip(), models.vit()
    chosen = [int(s) for s in np.random.default_rng(seed).permutation(atlas.known)[:names]]
    drawn = generate(pipe, [atlas.names[s] for s in chosen], 10_000 * seed)
    ranks = name_ranks(clip, drawn, chosen)
    figures = {
        f'"NAME" of {names} known names, told by pocket-vit, %': share(class_hits(vit, drawn, chosen)),
        "the same, right name first by pocket-clip, %": share(ranks < 1),
        "the same, right name in the first five by pocket-clip, %": share(ranks < 5),
    }
    left, right = chosen[: names // 4], chosen[-(names // 4) :]
    names_of = [[with_article(atlas.names[s]) for s in side] for side in (left, right)]
    prompts = [f"{a} and {b}" for a, b in zip(*names_of, strict=True)]
    pairs = generate(pipe, prompts, 10_000 * seed + 2000, width=2 * SIDE)
    halves = [class_hits(vit, half, side) for half, side in zip(pairs.split(SIDE, -1), (left, right), strict=True)]
    figures[f'"a NAME and a NAME" of {len(left)} pairs, twice as wide: both told by pocket-vit, %'] = share(
        halves[0] & halves[1]
    )
    colours = [list(COLOURS)[k % len(COLOURS)] for k in range(96)]
    prompts = [f"{atlas.names[s]} on a {colour} background" for s, colour in zip(chosen, colours, strict=False)]
    coloured = generate(pipe, prompts, 10_000 * seed + 1000)
    hits = [a == b for a, b in zip(border_colour(coloured), colours, strict=True)]
    figures['"NAME on a COLOUR background", colour as asked, %'] = 100 * float(np.mean(hits))
    return figures, {"known_names": drawn, "pairs": pairs, "colours": coloured}
