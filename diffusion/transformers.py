"""Pipelines whose denoiser is a transformer: Stable Diffusion 3, FLUX.1, FLUX.2, Z-Image and Qwen-Image.

All follow rectified flow. Latents stay (b, c, h, w) everywhere outside; what a transformer wants instead, packed
patches or lists of pictures, is made in `denoise`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graft.diffusion.base import Condition, DiffusionBase
from graft.studio.errors import InputError


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
        return _turns(self.tokenizer, prompts, self.length, thinking=True)

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


class Flux2Base(TransformerBase):
    """FLUX.2 (Black Forest Labs, 2025): hidden states of three layers of a language model side by side, and latents
    whose 2 x 2 squares are channels, each with its own mean and deviation over pictures."""

    guidance = FluxBase.guidance
    layers = (10, 20, 30)
    """Whose hidden states are told."""

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Token ids of the pipeline's chat and, behind them, which are there: (p, 2 n) long, on the CPU."""
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        found = self.tokenizer.apply_chat_template(
            format_input(prompts, self.pipe.system_message),
            add_generation_prompt=False,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=int(self.pipe.tokenizer_max_length),
        )
        return torch.cat([found["input_ids"], found["attention_mask"]], 1)

    def condition(self, ids: Tensor) -> Condition:
        """Hidden states of the layers, beside each other: padding is told too, as in the pipeline."""
        ids, there = ids.to(self.device).chunk(2, 1)
        told = self.pipe.text_encoder(
            input_ids=ids, attention_mask=there, output_hidden_states=True, use_cache=False
        ).hidden_states
        return {"text": torch.cat([told[layer] for layer in self.layers], -1)}

    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The velocity; a token has four places: picture, row, column, and word."""
        b, _, h, w = noisy.shape
        n, device = condition["text"].shape[1], noisy.device
        rows, columns = torch.arange(h, device=device), torch.arange(w, device=device)
        zero = torch.zeros(1, dtype=torch.long, device=device)
        velocity: Tensor = self.denoiser(
            hidden_states=noisy.flatten(2).mT,
            timestep=(timesteps / 1000).to(noisy.dtype),
            guidance=noisy.new_full((b,), self.guidance) if self.denoiser.config.guidance_embeds else None,
            encoder_hidden_states=condition["text"],
            txt_ids=torch.cartesian_prod(zero, zero, zero, torch.arange(n, device=device)),
            img_ids=torch.cartesian_prod(zero, rows, columns, zero),
            return_dict=False,
        )[0]
        return velocity.mT.unflatten(2, (h, w))

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> dict[str, Tensor]:
        """The mode of the VAE's posterior, as the family is trained: (b, 4 c, h/2f, w/2f), without spread."""
        mean = self._normal(self.pipe.vae.encode(self.as_seen(pixels)).latent_dist.mode().float())
        return {"mean": mean, "std": torch.zeros_like(mean)}

    def as_drawn(self, latents: Tensor, height: int, width: int) -> Tensor:
        """The pipeline's latents, a row of tokens, as (b, c, h, w)."""
        return latents.mT.unflatten(2, (height // self.step, width // self.step))

    def _normal(self, latents: Tensor) -> Tensor:
        """The VAE's latents in squares, by the batch norm that it holds: (b, c, h, w) -> (b, 4 c, h/2, w/2)."""
        norm = self.pipe.vae.bn
        mean, variance = (each.view(-1, 1, 1).to(latents) for each in (norm.running_mean, norm.running_var))
        return (F.pixel_unshuffle(latents, 2) - mean) / (variance + self.pipe.vae.config.batch_norm_eps).sqrt()

    def guided(self, scale: float, negative: list[str] | None = None) -> dict[str, Any]:
        """The pipeline takes no negative prompt.

        Raises:
            InputError: one is asked for.
        """
        if any(negative or ()):
            raise InputError("negative_prompt", f"{type(self.pipe).__name__} takes none", "Leave it out")
        return {"guidance_scale": scale}


class Flux2KleinBase(Flux2Base):
    """The smaller FLUX.2 [klein] (Black Forest Labs, 2026), which asks Qwen3 in place of Mistral."""

    layers = (9, 18, 27)

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Token ids of the chat turn and, behind them, which are there: (p, 2 n) long, on the CPU."""
        return _turns(self.tokenizer, prompts, int(self.pipe.tokenizer_max_length), thinking=False)

    def as_drawn(self, latents: Tensor, height: int, width: int) -> Tensor:
        """The pipeline's latents, which are the VAE's here, as the transformer has them."""
        return self._normal(latents)


class QwenImageBase(TransformerBase):
    """Qwen-Image (Wu et al., 2025, arXiv:2508.02324): a language model's last hidden states, of a chat turn without its
    instruction, packed latents of 2 x 2, and a VAE of films, for which a picture is one frame."""

    length = 512
    """Tokens of a prompt at most."""

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Token ids of the pipeline's chat and, behind them, which are there: (p, 2 n) long, on the CPU."""
        found = self.tokenizer(
            [self.pipe.prompt_template_encode.format(prompt) for prompt in prompts],
            padding="max_length",
            padding_side="right",
            max_length=self.length + self.pipe.prompt_template_encode_start_idx,
            truncation=True,
            return_tensors="pt",
        )
        return torch.cat([found.input_ids, found.attention_mask], 1)

    def condition(self, ids: Tensor) -> Condition:
        """The last layer behind the instruction, and which of its tokens are there; the others are zero."""
        ids, there = ids.to(self.device).chunk(2, 1)
        told = self.pipe.text_encoder(input_ids=ids, attention_mask=there, output_hidden_states=True).hidden_states[-1]
        told, there = (each[:, self.pipe.prompt_template_encode_start_idx :] for each in (told, there))
        return {"text": told * there[..., None].to(told.dtype), "there": there}

    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The velocity; texts are cut to the longest of the batch."""
        b, _, h, w = noisy.shape
        there = condition["there"].bool()
        longest = int(there.sum(1).max())
        there, text = there[:, :longest], condition["text"][:, :longest]
        guided = self.denoiser.config.guidance_embeds
        velocity = self.denoiser(
            hidden_states=packed(noisy),
            timestep=(timesteps / 1000).to(noisy.dtype),
            guidance=noisy.new_full((b,), FluxBase.guidance) if guided else None,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=None if there.all() else there,
            img_shapes=[[(1, h // 2, w // 2)]] * b,
            return_dict=False,
        )[0]
        return unpacked(velocity, h, w)

    def as_seen(self, pixels: Tensor) -> Tensor:
        """As films of one frame: (b, 3, h, w) uint8 -> (b, 3, 1, h, w)."""
        return super().as_seen(pixels).unsqueeze(2)

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> dict[str, Tensor]:
        """The VAE's posterior, each channel by its mean and deviation over pictures."""
        config = self.pipe.vae.config
        found = self.pipe.vae.encode(self.as_seen(pixels)).latent_dist
        mean, std = (found.mean.new_tensor(each).view(-1, 1, 1) for each in (config.latents_mean, config.latents_std))
        return {"mean": ((found.mean[:, :, 0] - mean) / std).float(), "std": (found.std[:, :, 0] / std).float()}

    def as_drawn(self, latents: Tensor, height: int, width: int) -> Tensor:
        """The pipeline's latents, packed, as (b, c, h, w)."""
        factor = int(self.pipe.vae_scale_factor)
        return unpacked(latents, height // factor, width // factor)

    def guided(self, scale: float, negative: list[str] | None = None) -> dict[str, Any]:
        """The pipeline guides by a negative prompt, which may be empty, under another name."""
        return {"true_cfg_scale": scale, "negative_prompt": negative or ("" if scale > 1 else None)}


def _turns(tokenizer: Any, prompts: list[str], length: int, thinking: bool) -> Tensor:
    """Ids of prompts as turns of a chat and, behind them, which are there: (p, 2 n) long."""
    turns = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        for prompt in prompts
    ]
    found = tokenizer(turns, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return torch.cat([found.input_ids, found.attention_mask], 1)


def packed(latents: Tensor) -> Tensor:
    """(b, c, h, w) -> (b, h/2 w/2, 4 c): each 2 x 2 square becomes a token, its channels outermost."""
    return F.pixel_unshuffle(latents, 2).flatten(2).mT


def unpacked(tokens: Tensor, h: int, w: int) -> Tensor:
    """The inverse of `packed` for latents of h x w."""
    return F.pixel_shuffle(tokens.mT.unflatten(2, (h // 2, w // 2)), 2)


FAMILIES: dict[str, type[TransformerBase]] = {
    "StableDiffusion3Pipeline": SD3Base,
    "FluxPipeline": FluxBase,
    "Flux2Pipeline": Flux2Base,
    "Flux2KleinPipeline": Flux2KleinBase,
    "QwenImagePipeline": QwenImageBase,
    "ZImagePipeline": ZImageBase,
}
"""Class of the pipeline -> family."""

_PROJECTIONS = ("to_q", "to_k", "to_v", r"to_out\.0")
ATTENTION: dict[str, tuple[str, ...]] = {
    "Flux2Transformer2DModel": (*_PROJECTIONS, "to_qkv_mlp_proj", r"single_transformer_blocks\.\d+\.attn\.to_out"),
    "QwenImageTransformer2DModel": _PROJECTIONS,
}
"""Class of the denoiser -> what its family means by the targets "attention", where that is not every projection: a
fused one has the feed-forward layer in it, and those of the text are left alone."""
