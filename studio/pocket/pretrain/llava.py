"""Train `pocket-llava`: a small language model that answers questions about pictures.

A transformers `LlavaForConditionalGeneration` (Liu et al., Visual Instruction Tuning, 2023, arXiv 2304.08485; the
two-layer projector is that of 2310.03744) on the frozen image tower of `pocket-clip`. Its patch features, one layer
before the last, go through the projector and stand before the text of a conversation about the picture:

    loss = - mean log p(answer token | picture, question, answer so far)

over the answers and their end marks only. The picture is the dear part of a row, so many questions share it. In three
rows of four each sees the picture and itself alone, at the positions that it would have as the only question: none can
be answered from the answers before it. The fourth is an ordinary conversation. Both towers and the language model are
small enough to draw new scenes at every step: none is seen twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from graft.studio.pocket.atlas import Atlas
from graft.studio.pocket.pretrain import network_adapter
from graft.studio.pocket.pretrain.clip import VISION
from graft.studio.pocket.pretrain.draw import on_device, pictures, rng_of
from graft.studio.pocket.questions import KINDS, Question, ask, question_scene
from graft.studio.pocket.scenes import Scene
from graft.studio.pocket.tokenizer import load_llava_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import LlavaConfig, PreTrainedTokenizerFast

    from graft.studio.adapter import Adapter
    from graft.studio.job import TrainConfig

TEXT: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "initializer_range": 0.05,  # 0.02 is for widths of thousands
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
}
PATCHES = (VISION["image_size"] // VISION["patch_size"]) ** 2
"""Image tokens of a picture."""
TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant>{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ eos_token }}{% endgeneration %}"
    "{% elif message['content'] is string %}{{ message['content'] + ' ' }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""Conversations as text; what the assistant says, its end mark included, is marked as generated."""
SHARES = {"name": 2, "exists": 3, "at": 3, "beside": 2, "place": 2}
"""How often a kind of question is tried for one picture, where not once: there are several things to ask for."""


def config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """Return the configuration of `pocket-llava`."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    marks = {f"{mark}_token_id": getattr(tokenizer, f"{mark}_token_id") for mark in ("bos", "eos", "pad")}
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT, **marks, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=PATCHES,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


class Batch(NamedTuple):
    """Pictures (b, 3, 64, 64); ids, labels, positions and segments of tokens (b, n).

    A token sees earlier ones of its own segment and of segment 0, which holds the picture.
    """

    pictures: Tensor
    input_ids: Tensor
    labels: Tensor
    positions: Tensor
    segments: Tensor


@dataclass(frozen=True)
class Llava:
    """How much text goes with a picture, and what it starts from."""

    go_on: bool = False
    """Start from the committed weights instead of from nothing."""
    tokens: int = 160
    """Tokens of a row: 64 of them are the picture, questions and answers fill the rest."""
    compile: bool = False
    """Compile the language model: two minutes more at the start, each step a third shorter on a CPU."""

    def task(self, train: TrainConfig) -> LlavaTask:
        """Return the training, on the committed image tower."""
        from graft.studio.pocket import models

        tower = models.clip().vision_model.to(train.device or "cpu")
        task = LlavaTask(tower, train.batch_size, self.tokens)
        if self.go_on:
            start = models.llava().model
            del start.vision_tower
            task.llava.load_state_dict(start.state_dict())
        if self.compile:
            task.llava.language_model.compile()
        return task


class LlavaTask(nn.Module):
    """One training of projector and language model.

    Args:
        tower: the frozen image tower, a `CLIPVisionModel`. It loses its last layer, which is not read.
        batch_size: pictures in a step.
        tokens: of a row.
    """

    default_learning_rate = 1e-3

    def __init__(self, tower: Any, batch_size: int = 32, tokens: int = 160):
        super().__init__()
        from transformers import LlavaModel

        self.batch_size, self.tokens = batch_size, tokens
        self.sprites = Atlas.load().known
        self.tokenizer = load_llava_tokenizer()
        self.words: dict[str, list[int]] = {}
        self.llava = LlavaModel(config(self.tokenizer))  # without a head: the embedding table is the head, too
        del self.llava.vision_tower
        # On a CPU the fused attention takes longer, nearly all of it in the backward pass.
        self.llava.language_model.set_attn_implementation("eager")
        tower.set_attn_implementation("eager")
        del tower.encoder.layers[-1]
        self.frozen = (tower.eval().requires_grad_(False),)  # a tuple hides it from parameters()

    def batch(self, step: int, generator: torch.Generator) -> Batch:
        """Return new scenes and conversations about them."""
        rng = rng_of(generator)
        scenes = [question_scene(rng, self.sprites) for _ in range(self.batch_size)]
        rows = [self._row(self._questions(scene, rng), apart=k % 4 > 0) for k, scene in enumerate(scenes)]
        return Batch(pictures(scenes), *(torch.tensor(column) for column in zip(*rows, strict=True)))

    def _questions(self, scene: Scene, rng: np.random.Generator) -> list[Question]:
        """Return what may be asked about a scene, in random order."""
        kinds = rng.permutation([kind for kind in KINDS for _ in range(SHARES.get(kind, 1))])
        found = [ask(scene, str(kind), rng, self.sprites) for kind in kinds]
        return list({(q.kind, q.text): q for q in found if q is not None}.values())

    def _row(self, questions: list[Question], apart: bool) -> tuple[list[int], ...]:
        """Return ids, labels, positions and segments of one row, with as many questions as fit."""
        mark = self.tokenizer.convert_tokens_to_ids
        ids = [self.tokenizer.bos_token_id] + [mark("<image>")] * PATCHES
        labels, positions, segments = [-100] * len(ids), list(range(len(ids))), [0] * len(ids)
        for k, question in enumerate(questions):
            asked = [*self._ids(question.text), mark("<assistant>")]
            told = [*self._ids(question.answer), self.tokenizer.eos_token_id]
            count = len(asked) + len(told)
            if len(ids) + count > self.tokens:
                continue
            first = 1 + PATCHES if apart else len(ids)
            ids += asked + told
            labels += [-100] * len(asked) + told
            positions += range(first, first + count)
            segments += [k + 1 if apart else 0] * count
        rest = self.tokens - len(ids)
        padding = [self.tokenizer.pad_token_id] * rest
        return ids + padding, labels + [-100] * rest, positions + [0] * rest, segments + [0] * rest

    def _ids(self, text: str) -> list[int]:
        """Return the ids of a text, word by word from a store: the tokenizer itself takes longer than a scene."""
        for word in text.split():
            if word not in self.words:
                self.words[word] = self.tokenizer(word).input_ids
        return [i for word in text.split() for i in self.words[word]]

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and the share of answer tokens that are the likeliest ones."""
        batch, table = on_device(batch, self), self.llava.get_input_embeddings()
        with torch.no_grad():
            features = self.frozen[0](batch.pictures).last_hidden_state[:, 1:]
        embeds = table(batch.input_ids)
        seen = self.llava.multi_modal_projector(features).to(embeds.dtype)
        embeds = torch.cat([embeds[:, :1], seen, embeds[:, 1 + PATCHES :]], dim=1)
        output = self.llava.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask(batch.segments, embeds.dtype),
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state
        asked = batch.labels[:, 1:] != -100
        logits, labels = linear(output[:, :-1][asked], table.weight).float(), batch.labels[:, 1:][asked]
        return cross_entropy(logits, labels), {"token_top1": (logits.argmax(-1) == labels).float().mean()}

    def sample(self, step: int, folder: Path) -> list[Path]:
        """Draw nothing: this model answers in words."""
        return []

    def adapter(self, metrics: dict[str, Any]) -> Adapter:
        """Return projector and language model."""
        return network_adapter(self.llava, "llava", metrics)


def attention_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to attention scores, (b, 1, n, n): 0 where a token may look, else the lowest number."""
    earlier = torch.ones(2 * (segments.shape[1],), dtype=torch.bool, device=segments.device).tril()
    mine, theirs = segments[:, :, None], segments[:, None, :]
    allowed = earlier & ((theirs == 0) | (theirs == mine))
    return torch.zeros(allowed.shape, dtype=dtype, device=segments.device).masked_fill(
        ~allowed, torch.finfo(dtype).min
    )[:, None]
