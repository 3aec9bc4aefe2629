"""Models that the library trains and ships."""

from fastdiff.models.unet import UNet, UNetConfig

__all__ = ["UNet", "UNetConfig"]
