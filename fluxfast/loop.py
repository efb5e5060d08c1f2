"""FluxPipeline with its denoising loop as one function of tensors, so that one CUDA graph can hold it.

The text encoders, the noise and the decoder are the stock pipeline's, the scheduler's own `step` computes every step,
and the images are equal bit for bit. What is left out is what a captured loop cannot do: callbacks, interruption,
true classifier-free guidance, IP-adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from diffusers import FluxPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.flux.pipeline_flux import FluxPipelineOutput, calculate_shift, retrieve_timesteps
from PIL import Image

if TYPE_CHECKING:
    from fluxfast.staging import StagedModulation


class LoopPipeline(FluxPipeline):
    """A FluxPipeline that denoises in one call of `denoise`.

    Attributes:
        loops: pipeline calls that went through `denoise`.
        modulation: if set, its table is computed at the beginning of the loop, or in front of it by `modulate`.
    """

    loops: int = 0
    modulation: StagedModulation | None = None
    _schedules: dict[Hashable, tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def of(cls, pipeline: FluxPipeline) -> Self:
        """Made of the components of `pipeline`; not in `__init__`, whose arguments diffusers takes for components."""
        own: Self = cls(**pipeline.components)
        own.set_progress_bar_config(disable=True)
        own.image_processor = DeviceImageProcessor(vae_scale_factor=own.vae_scale_factor * 2)
        own._schedules = {}
        return own

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        *,
        height: int,
        width: int,
        num_inference_steps: int,
        guidance_scale: float,
        max_sequence_length: int,
        generator: torch.Generator | None = None,
        latents: torch.Tensor | Callable[[], torch.Tensor] | None = None,
        output_type: str = "pil",
    ) -> FluxPipelineOutput:
        """FluxPipeline's arguments, of which the loop takes no others.

        Args:
            latents: the noise, or what makes it: called when the text encoders are launched, so that a CPU draws while
                the device encodes.

        Returns:
            `images` as FluxPipeline gives them for the `output_type`.
        """
        self.check_inputs(prompt, None, height, width, max_sequence_length=max_sequence_length)
        device = self._execution_device
        side = 2 * self.vae_scale_factor
        timesteps, sigmas = self.schedule(num_inference_steps, (height // side) * (width // side))
        guidance = None
        if self.transformer.config.guidance_embeds:
            batch = 1 if isinstance(prompt, str) else len(prompt)
            guidance = torch.full([1], guidance_scale, device=device, dtype=torch.float32).expand(batch)
        embeddings, pooled, text_ids = self.encode_prompt(
            prompt=prompt, prompt_2=None, device=device, max_sequence_length=max_sequence_length
        )
        modulated = self.modulate(timesteps, embeddings.dtype, pooled, guidance)
        channels = self.transformer.config.in_channels // 4
        noise, image_ids = self.prepare_latents(
            len(embeddings), channels, height, width, embeddings.dtype, device, generator,
            latents() if callable(latents) else latents,
        )  # fmt: skip
        denoised, _ = self.denoise(
            latents=noise,
            encoder_hidden_states=embeddings,
            pooled_projections=pooled,
            guidance=guidance,
            txt_ids=text_ids,
            img_ids=image_ids,
            timesteps=timesteps,
            sigmas=sigmas,
            **modulated,
        )
        self.loops += 1
        if output_type == "latent":
            return FluxPipelineOutput(images=denoised)
        denoised = self._unpack_latents(denoised, height, width, self.vae_scale_factor)
        denoised = (denoised / self.vae.config.scaling_factor) + self.vae.config.shift_factor
        image = self.vae.decode(denoised, return_dict=False)[0]
        return FluxPipelineOutput(images=self.image_processor.postprocess(image, output_type=output_type))

    def modulate(
        self, timesteps: torch.Tensor, dtype: torch.dtype, pooled: torch.Tensor, guidance: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """What `denoise` is given of the modulation, as keyword arguments: nothing, it computes that itself.

        Args:
            timesteps, dtype, pooled, guidance: as `StagedModulation.compute` takes them.
        """
        return {}

    def denoise(
        self,
        *,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        sigmas: torch.Tensor,
        modulation: torch.Tensor | None = None,
        **conditions: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loop: reads tensors alone and synchronises nowhere.

        Args:
            latents: (batch, image tokens, channels).
            timesteps: (steps,) and sigmas: (steps + 1,), float32, of the scheduler.
            modulation: of all steps, from `modulate`; None where it is computed here, or by the blocks.
            conditions: what the transformer takes beside `hidden_states` and `timestep`.

        Returns:
            The denoised latents, and what the transformer gave in the first step.
        """
        scheduler = self.scheduler
        scheduler.timesteps, scheduler.sigmas = timesteps, sigmas
        # As after `set_timesteps`: a capture runs this function several times.
        scheduler._step_index = None
        scheduler.set_begin_index(0)
        if self.modulation is not None and modulation is None:
            self.modulation.restart()
        elif self.modulation is not None:
            pooled, guidance = conditions["pooled_projections"], conditions["guidance"]
            self.modulation.use(modulation, timesteps, latents.dtype, pooled, guidance)
        first = None
        for moment in timesteps.unbind():
            timestep = moment.expand(len(latents)).to(latents.dtype)
            noise = self.transformer(
                hidden_states=latents,
                timestep=timestep / 1000,
                joint_attention_kwargs={},
                return_dict=False,
                **conditions,
            )[0]
            first = noise if first is None else first
            latents = scheduler.step(noise, moment, latents, return_dict=False)[0]
        return latents, first

    def schedule(self, num_inference_steps: int, image_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps (steps,) and sigmas (steps + 1,) on the device, made once: their copies wait for the device."""
        key = (self.scheduler, num_inference_steps, image_tokens)
        if key not in self._schedules:
            config = self.scheduler.config
            sigmas = None
            if not config.get("use_flow_sigmas"):
                sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
            mu = calculate_shift(
                image_tokens,
                config.get("base_image_seq_len", 256),
                config.get("max_image_seq_len", 4096),
                config.get("base_shift", 0.5),
                config.get("max_shift", 1.15),
            )
            retrieve_timesteps(self.scheduler, num_inference_steps, self._execution_device, sigmas=sigmas, mu=mu)
            self._schedules[key] = (self.scheduler.timesteps, self.scheduler.sigmas)
        return self._schedules[key]


class DeviceImageProcessor(VaeImageProcessor):
    """Makes the bytes of a PIL image on the device and copies those, an eighth of what NumPy would be given."""

    def postprocess(self, image: torch.Tensor, output_type: str = "pil", **kwargs: Any) -> Any:
        """As the base class; for "pil" equal byte for byte."""
        if output_type != "pil" or kwargs:
            return super().postprocess(image, output_type=output_type, **kwargs)
        image = super().postprocess(image, output_type="pt")
        pixels = (image.permute(0, 2, 3, 1).float() * 255).round().to(torch.uint8).contiguous()
        if pixels.device.type == "cuda":
            host = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
            host.copy_(pixels)
            pixels = host
        return [Image.fromarray(picture) for picture in pixels.numpy()]
