"""Pipelines whose denoiser is a transformer: Stable Diffusion 3, FLUX.1 and Z-Image.

All three follow rectified flow. Latents stay (b, c, h, w) everywhere outside; what a transformer wants instead, packed
patches or lists of pictures, is made in `denoise`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from graft.diffusion.base import Condition, DiffusionBase


class TransformerBase(DiffusionBase):
    """What they share: sides come in whole patches, and several tokenizers' ids stand side by side."""

    patch = 2
    """Side in latents of what becomes one token."""
    lengths: tuple[int, ...] = ()
    """Tokens of each text encoder."""

    @property
    def resolution(self) -> int:
        """Side in pixels that the pipeline draws at by itself."""
        return int(self.pipe.default_sample_size) * int(self.pipe.vae_scale_factor)

    @property
    def step(self) -> int:
        """Sides are multiples of this many pixels."""
        return self.patch * int(self.pipe.vae_scale_factor)

    def tokens(self, side: int) -> int:
        """What a square picture of so many pixels is to the transformer."""
        return (side // self.step) ** 2

    def _joined(self, prompts: list[str], tokenizers: tuple[object, ...]) -> Tensor:
        """Ids of several tokenizers, (p, sum of the lengths)."""
        parts = [
            tokenizer(prompts, padding="max_length", max_length=n, truncation=True, return_tensors="pt").input_ids  # type: ignore[operator]
            for tokenizer, n in zip(tokenizers, self.lengths, strict=True)
        ]
        return torch.cat(parts, 1)


class SD3Base(TransformerBase):
    """Stable Diffusion 3 (Esser et al., 2024, arXiv:2403.03206): two CLIP text encoders and, if it is loaded, a T5."""

    @property
    def lengths(self) -> tuple[int, ...]:  # type: ignore[override]
        """As the pipeline has them."""
        clip = int(self.pipe.tokenizer_max_length)
        return (clip, clip) if self.pipe.text_encoder_3 is None else (clip, clip, 256)

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Token ids of all tokenizers side by side: (p, n) long, on the CPU."""
        names = ("tokenizer", "tokenizer_2", "tokenizer_3")[: len(self.lengths)]
        return self._joined(prompts, tuple(getattr(self.pipe, name) for name in names))

    def condition(self, ids: Tensor) -> Condition:
        """Both CLIPs' last layers but one beside each other, padded to T5's width and followed by T5's tokens; and both
        pooled outputs."""
        parts = ids.to(self.device).split(self.lengths, 1)
        encoders = (self.pipe.text_encoder, self.pipe.text_encoder_2)
        told = [encoder(part, output_hidden_states=True) for encoder, part in zip(encoders, parts[:2], strict=True)]
        clip = torch.cat([each.hidden_states[-2] for each in told], -1)
        width = int(self.denoiser.config.joint_attention_dim)
        if len(parts) == 3:
            long = self.pipe.text_encoder_3(parts[2])[0]
        else:
            long = clip.new_zeros(len(ids), 256, width)
        text = torch.cat([F.pad(clip, (0, width - clip.shape[-1])), long.to(clip.dtype)], 1)
        return {"text": text, "pooled": torch.cat([each[0] for each in told], -1)}

    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The velocity: (b, c, h, w), (b,) and rows of `condition` -> (b, c, h, w)."""
        velocity: Tensor = self.denoiser(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=condition["text"],
            pooled_projections=condition["pooled"],
            return_dict=False,
        )[0]
        return velocity


class FluxBase(TransformerBase):
    """FLUX.1 (Black Forest Labs, 2024): CLIP's pooled output, T5's tokens, and packed latents of 2 x 2."""

    guidance = 1.0
    """What a guidance-distilled model is told in training: 1 is no guidance, as its pictures of the data have none."""

    @property
    def lengths(self) -> tuple[int, ...]:  # type: ignore[override]
        """CLIP's, and the pipeline's default for T5."""
        return int(self.pipe.tokenizer_max_length), min(512, int(self.pipe.tokenizer_2.model_max_length))

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Token ids of both tokenizers side by side: (p, n) long, on the CPU."""
        return self._joined(prompts, (self.pipe.tokenizer, self.pipe.tokenizer_2))

    def condition(self, ids: Tensor) -> Condition:
        """T5's tokens, and CLIP's pooled output."""
        short, long = ids.to(self.device).split(self.lengths, 1)
        return {"text": self.pipe.text_encoder_2(long)[0], "pooled": self.pipe.text_encoder(short).pooler_output}

    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The velocity; places in the picture are told apart from those in the text, which are all zero."""
        b, c, h, w = noisy.shape
        places = noisy.new_zeros(h // 2, w // 2, 3)
        places[..., 1] = torch.arange(h // 2, device=noisy.device)[:, None]
        places[..., 2] = torch.arange(w // 2, device=noisy.device)
        guided = self.denoiser.config.guidance_embeds
        velocity = self.denoiser(
            hidden_states=packed(noisy),
            timestep=(timesteps / 1000).to(noisy.dtype),
            guidance=noisy.new_full((b,), self.guidance) if guided else None,
            pooled_projections=condition["pooled"],
            encoder_hidden_states=condition["text"],
            txt_ids=noisy.new_zeros(condition["text"].shape[1], 3),
            img_ids=places.view(-1, 3),
            return_dict=False,
        )[0]
        return unpacked(velocity, h, w)

    def as_drawn(self, latents: Tensor, height: int, width: int) -> Tensor:
        """The pipeline's latents, packed, as (b, c, h, w)."""
        factor = int(self.pipe.vae_scale_factor)
        return unpacked(latents, height // factor, width // factor)


class ZImageBase(TransformerBase):
    """Z-Image (Tongyi Lab, 2025): a language model's hidden states of a chat turn, each prompt at its own length."""

    length = 512
    """Tokens of a prompt at most."""

    @property
    def resolution(self) -> int:
        """Its pictures' usual side."""
        return 1024

    @property
    def step(self) -> int:
        """Latents are an eighth of the picture, and patches two of them."""
        return 2 * int(self.pipe.vae_scale_factor)

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Token ids of the chat turn and, behind them, which are there: (p, 2 n) long, on the CPU."""
        turns = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
            for prompt in prompts
        ]
        found = self.tokenizer(
            turns, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        return torch.cat([found.input_ids, found.attention_mask], 1)

    def condition(self, ids: Tensor) -> Condition:
        """The last layer but one, and which of its tokens are there."""
        ids, there = ids.to(self.device).chunk(2, 1)
        told = self.pipe.text_encoder(input_ids=ids, attention_mask=there.bool(), output_hidden_states=True)
        return {"text": told.hidden_states[-2], "there": there}

    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The velocity. The transformer counts time from noise to picture, and answers the other way round."""
        texts = [text[there.bool()] for text, there in zip(condition["text"], condition["there"], strict=True)]
        answers = self.denoiser(
            list(noisy.unsqueeze(2).unbind()), ((1000 - timesteps) / 1000).to(noisy.dtype), texts, return_dict=False
        )[0]
        return -torch.stack(list(answers)).squeeze(2)


def packed(latents: Tensor) -> Tensor:
    """(b, c, h, w) -> (b, h/2 w/2, 4 c): each 2 x 2 square becomes a token, its channels outermost."""
    return F.pixel_unshuffle(latents, 2).flatten(2).mT


def unpacked(tokens: Tensor, h: int, w: int) -> Tensor:
    """The inverse of `packed` for latents of h x w."""
    return F.pixel_shuffle(tokens.mT.unflatten(2, (h // 2, w // 2)), 2)


FAMILIES = {"StableDiffusion3Pipeline": SD3Base, "FluxPipeline": FluxBase, "ZImagePipeline": ZImageBase}
"""Class of the pipeline -> family."""
