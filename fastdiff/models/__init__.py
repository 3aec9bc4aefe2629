"""Models that the library trains and ships."""

from fastdiff.models.autoencoder import Autoencoder, AutoencoderConfig
from fastdiff.models.dit import DiT, DiTConfig
from fastdiff.models.latent import LatentDiffusion, LatentDiffusionConfig
from fastdiff.models.unet import UNet, UNetConfig
from fastdiff.models.vae import VAE, VAEConfig

__all__ = [
    "VAE", "Autoencoder", "AutoencoderConfig", "DiT", "DiTConfig", "LatentDiffusion",
    "LatentDiffusionConfig", "UNet", "UNetConfig", "VAEConfig",
]  # fmt: skip
