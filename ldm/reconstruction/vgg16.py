"""The convolutions of VGG16 as LPIPS uses them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """Pictures to the five feature maps of conv1_2, conv2_2, conv3_3, conv4_3 and conv5_3, after their ReLU.

    Names and numbers of the layers are torchvision's, without the classifier. Simonyan and Zisserman 2014,
    arXiv:1409.1556, configuration D.
    """

    min_size = 16  # four halvings

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for block, widths in enumerate(WIDTHS):
            if block:
                layers.append(nn.MaxPool2d(2))
            for width in widths:
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(inplace=True)]
                before = width
        self.features = nn.Sequential(*layers)
        # ImageNet's mean and deviation for pictures in [-1, 1], rounded as LPIPS does
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).reshape(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).reshape(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] in [-1, 1] to [B, C, H / 2^k, W / 2^k], C = 64, 128, 256, 512, 512 for k = 0 to 4."""
        h = (images - self.get_buffer("shift")) / self.get_buffer("scale")
        maps = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                maps.append(h)
            h = layer(h)
        return [*maps, h]
