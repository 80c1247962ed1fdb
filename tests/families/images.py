"""UNets that generate images, and a transformer of classes: DDPM to Stable Cascade."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from diffusers.pipelines.stable_cascade.pipeline_stable_cascade import PaellaVQModel

from tests.families.family import Family
from tests.families.parts import WIDTH, autoencoder, clip, clip_vision, image, mask, seeded, t5, tokenizer, unet
from tests.families.parts import ddim as little_noise

SIZE = {"height": 16, "width": 16}


def pixels(**config: Any) -> Any:
    """Return an unconditional UNet of one channel, 16 pixels high and wide."""
    shape = {
        "sample_size": 16, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": (32, 64),
        "norm_num_groups": 8, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 16,
    }  # fmt: skip
    return seeded(diffusers.UNet2DModel, 2, **(shape | config))


def ddpm(folder: Path) -> Any:
    return diffusers.DDPMPipeline(pixels(), diffusers.DDPMScheduler())


def ddim(folder: Path) -> Any:
    return diffusers.DDIMPipeline(pixels(), diffusers.DDIMScheduler())


def consistency(folder: Path) -> Any:
    """Class labels as an embedding added to that of the timestep, and `CMStochasticIterativeScheduler`."""
    denoiser = pixels(
        in_channels=3, out_channels=3, num_class_embeds=10, resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    )  # fmt: skip
    scheduler = diffusers.CMStochasticIterativeScheduler(num_train_timesteps=40, sigma_min=0.002, sigma_max=80.0)
    return diffusers.ConsistencyModelPipeline(denoiser, scheduler)


def latent_diffusion(folder: Path) -> Any:
    config = LDMBertConfig(
        vocab_size=16, d_model=WIDTH, encoder_layers=1, encoder_ffn_dim=32, encoder_attention_heads=2, head_dim=16
    )
    return diffusers.LDMTextToImagePipeline(
        vqvae=autoencoder(), bert=seeded(LDMBertModel, 1, config=config), tokenizer=tokenizer(), unet=unet(),
        scheduler=little_noise(),
    )  # fmt: skip


def dit(folder: Path) -> Any:
    transformer = seeded(
        diffusers.DiTTransformer2DModel, 2, sample_size=8, in_channels=4, out_channels=8, patch_size=2, num_layers=2,
        num_attention_heads=2, attention_head_dim=16, num_embeds_ada_norm=1000,
    )  # fmt: skip
    names = {str(label): f"class {label}" for label in range(10)}
    return diffusers.DiTPipeline(transformer, autoencoder(), diffusers.DDIMScheduler(), id2label=names)


def stable_diffusion(pipeline: str, scheduler: Any = None, denoiser: Any = None, **more: Any) -> Any:
    """Return a function that builds a pipeline of Stable Diffusion 1 or 2."""

    def build(folder: Path) -> Any:
        letters, text_encoder = clip(folder / "clip")
        components = {name: make() for name, make in more.items()}
        return getattr(diffusers, pipeline)(
            vae=autoencoder(), text_encoder=text_encoder, tokenizer=letters, unet=(denoiser or unet)(),
            scheduler=(scheduler or little_noise)(),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False, **components,
        )  # fmt: skip

    return build


def stable_diffusion_2_unet() -> Any:
    return unet(use_linear_projection=True, attention_head_dim=(2, 4))


def v_prediction() -> Any:
    return diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False, rescale_betas_zero_snr=True)


def controlnet() -> Any:
    """Return a ControlNet whose outputs are not zero."""
    model = diffusers.ControlNetModel.from_unet(unet(), conditioning_embedding_out_channels=(8, 8)).eval()
    torch.manual_seed(3)
    for module in (model.controlnet_down_blocks, model.controlnet_mid_block):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def adapter() -> Any:
    return seeded(diffusers.T2IAdapter, 3, in_channels=3, channels=[32, 64], num_res_blocks=1, downscale_factor=2)


def sdxl(pipeline: str = "StableDiffusionXLPipeline") -> Any:
    """Return a function that builds Stable Diffusion XL: pooled text and image sizes as added conditions."""

    def build(folder: Path) -> Any:
        tokenizer_1, text_encoder = clip(folder / "one")
        tokenizer_2, text_encoder_2 = clip(folder / "two", projected=True)
        denoiser = unet(
            cross_attention_dim=2 * WIDTH, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=WIDTH + 6 * 8, use_linear_projection=True,
        )  # fmt: skip
        return getattr(diffusers, pipeline)(
            vae=autoencoder(), text_encoder=text_encoder, text_encoder_2=text_encoder_2, tokenizer=tokenizer_1,
            tokenizer_2=tokenizer_2, unet=denoiser, add_watermarker=False,
            scheduler=diffusers.EulerDiscreteScheduler(prediction_type="v_prediction"),
        )  # fmt: skip

    return build


def lcm_unet() -> Any:
    """Return a UNet with the guidance scale as an added condition."""
    return unet(time_cond_proj_dim=32)


def deepfloyd(folder: Path) -> Any:
    """Pixels, T5, learned variance, added key and value projections."""
    words, text_encoder = t5()
    denoiser = unet(
        sample_size=16, in_channels=3, out_channels=6, attention_head_dim=16, addition_embed_type="text",
        addition_embed_type_num_heads=2, encoder_hid_dim=WIDTH, encoder_hid_dim_type="text_proj",
        act_fn="gelu", resnet_time_scale_shift="scale_shift", cross_attention_norm="group_norm",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", thresholding=True, variance_type="learned_range"
    )
    return diffusers.IFPipeline(
        tokenizer=words, text_encoder=text_encoder, unet=denoiser, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, watermarker=None, requires_safety_checker=False,
    )  # fmt: skip


def movq() -> Any:
    """Return the autoencoder of Kandinsky, whose decoder is normalized by the latents."""
    return seeded(
        diffusers.VQModel, block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), layers_per_block=1,
        latent_channels=4, norm_num_groups=32, norm_type="spatial", num_vq_embeddings=12, vq_embed_dim=4,
    )  # fmt: skip


def kandinsky22_prior(folder: Path) -> Any:
    """A transformer that generates image embeddings from text."""
    letters, text_encoder = clip(folder / "clip", projected=True)
    processor, image_encoder = clip_vision()
    prior = seeded(
        diffusers.PriorTransformer, 2, num_attention_heads=2, attention_head_dim=16, num_layers=2, embedding_dim=WIDTH,
        num_embeddings=16,
    )  # fmt: skip
    scheduler = diffusers.UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000, clip_sample_range=5.0
    )
    return diffusers.KandinskyV22PriorPipeline(
        prior=prior, image_encoder=image_encoder, text_encoder=text_encoder, tokenizer=letters, scheduler=scheduler,
        image_processor=processor,
    )  # fmt: skip


def kandinsky22_decoder(folder: Path) -> Any:
    """A UNet of image embeddings, without text."""
    denoiser = unet(
        in_channels=4, out_channels=8, addition_embed_type="image", encoder_hid_dim=WIDTH,
        encoder_hid_dim_type="image_proj", resnet_time_scale_shift="scale_shift", attention_head_dim=16,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    )  # fmt: skip
    return diffusers.KandinskyV22Pipeline(unet=denoiser, scheduler=little_noise(), movq=movq())


def kandinsky3(folder: Path) -> Any:
    words, text_encoder = t5()
    denoiser = seeded(
        diffusers.Kandinsky3UNet, 2, in_channels=4, time_embedding_dim=32, groups=4, attention_head_dim=8,
        layers_per_block=3, block_out_channels=(32, 64), cross_attention_dim=WIDTH, encoder_hid_dim=WIDTH,
    )  # fmt: skip
    return diffusers.Kandinsky3Pipeline(
        tokenizer=words, text_encoder=text_encoder, unet=denoiser, movq=movq(),
        scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True),
    )  # fmt: skip


CASCADE_BLOCKS = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")


def stable_cascade_prior(folder: Path) -> Any:
    letters, text_encoder = clip(folder / "clip", projected=True)
    prior = seeded(
        diffusers.models.StableCascadeUNet, 2, in_channels=4, out_channels=4, conditioning_dim=64,
        block_out_channels=(32, 32), num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1), block_types_per_layer=(CASCADE_BLOCKS, CASCADE_BLOCKS),
        clip_image_in_channels=WIDTH, clip_text_in_channels=WIDTH, clip_text_pooled_in_channels=WIDTH,
        switch_level=(False,), timestep_ratio_embedding_dim=16,
    )  # fmt: skip
    return diffusers.StableCascadePriorPipeline(
        tokenizer=letters, text_encoder=text_encoder, prior=prior, scheduler=diffusers.DDPMWuerstchenScheduler()
    )


def stable_cascade_decoder(folder: Path) -> Any:
    letters, text_encoder = clip(folder / "clip", projected=True)
    decoder = seeded(
        diffusers.models.StableCascadeUNet, 2, in_channels=4, out_channels=4, conditioning_dim=64, patch_size=2,
        block_out_channels=(32, 64), num_attention_heads=(0, 4), down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1), block_types_per_layer=(CASCADE_BLOCKS[:2], CASCADE_BLOCKS),
        clip_text_pooled_in_channels=WIDTH, effnet_in_channels=4, pixel_mapper_in_channels=3, clip_seq=4,
        timestep_ratio_embedding_dim=16, timestep_conditioning_type=("sca",),
    )  # fmt: skip
    vqgan = seeded(PaellaVQModel, embed_dim=8, num_vq_embeddings=16, bottleneck_blocks=1)
    return diffusers.StableCascadeDecoderPipeline(
        decoder=decoder, tokenizer=letters, text_encoder=text_encoder, scheduler=diffusers.DDPMWuerstchenScheduler(),
        vqgan=vqgan, latent_dim_scale=4.0,
    )  # fmt: skip


def embedding(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


UNET = ("unet",)
FAMILIES = {
    "DDPM": Family(ddpm, denoisers=UNET),
    "DDIM": Family(ddim, denoisers=UNET),
    "Consistency model": Family(consistency, denoisers=UNET),
    "Latent Diffusion": Family(latent_diffusion, {"guidance_scale": 2.0} | SIZE, denoisers=UNET),
    "DiT": Family(dit),
    "Stable Diffusion 1.5": Family(stable_diffusion("StableDiffusionPipeline"), SIZE, denoisers=UNET),
    "Stable Diffusion 2.1": Family(
        stable_diffusion("StableDiffusionPipeline", v_prediction, stable_diffusion_2_unet), SIZE, denoisers=UNET
    ),
    "Stable Diffusion img2img": Family(
        stable_diffusion("StableDiffusionImg2ImgPipeline"), {"image": image(), "strength": 1.0}, denoisers=UNET
    ),
    "Stable Diffusion inpainting": Family(
        stable_diffusion("StableDiffusionInpaintPipeline", denoiser=lambda: unet(in_channels=9)),
        {"image": image(), "mask_image": mask()} | SIZE, denoisers=UNET,
    ),
    "InstructPix2Pix": Family(
        stable_diffusion("StableDiffusionInstructPix2PixPipeline", denoiser=lambda: unet(in_channels=8)),
        {"image": image()}, denoisers=UNET,
    ),
    "Stable Diffusion ControlNet": Family(
        stable_diffusion("StableDiffusionControlNetPipeline", controlnet=controlnet), {"image": image()}, denoisers=UNET
    ),
    "Stable Diffusion T2I-Adapter": Family(
        stable_diffusion("StableDiffusionAdapterPipeline", adapter=adapter), {"image": image()} | SIZE, denoisers=UNET
    ),
    "LCM": Family(
        stable_diffusion("LatentConsistencyModelPipeline", lambda: diffusers.LCMScheduler(beta_end=0.002), lcm_unet),
        SIZE, denoisers=UNET,
    ),
    "SDXL": Family(sdxl(), SIZE, denoisers=UNET),
    "SDXL img2img": Family(
        sdxl("StableDiffusionXLImg2ImgPipeline"), {"image": image(), "strength": 1.0}, denoisers=UNET
    ),
    "DeepFloyd IF": Family(deepfloyd, {"clean_caption": False} | SIZE, denoisers=UNET),
    "Kandinsky 2.2 prior": Family(kandinsky22_prior, denoisers=("prior",)),
    "Kandinsky 2.2 decoder": Family(
        kandinsky22_decoder,
        {"image_embeds": embedding(1, WIDTH, seed=1), "negative_image_embeds": embedding(1, WIDTH, seed=2)} | SIZE,
        denoisers=UNET,
    ),
    "Kandinsky 3": Family(kandinsky3, SIZE, denoisers=UNET),
    "Stable Cascade prior": Family(stable_cascade_prior, {"height": 128, "width": 128}, denoisers=("prior",)),
    "Stable Cascade decoder": Family(
        stable_cascade_decoder, {"image_embeddings": embedding(1, 4, 2, 2, seed=1), "guidance_scale": 2.0},
        denoisers=("decoder",),
    ),
}  # fmt: skip
