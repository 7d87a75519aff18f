"""The PatchGAN discriminator: is each patch of a picture real?"""

from __future__ import annotations

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Pictures [B, in_channels, H, W] in [-1, 1] to logits [B, 1, h, w], one for each patch; positive means real.

    width: channels of the first level, doubled at each of `layers` levels up to eight times.   layers: 3 looks at
        patches of 70 pixels, 2 at 34, 1 at 16.   norm_groups: of the group norms; the paper's batch norm would make the
        weights depend on how a batch is cut over devices.
    Raises ValueError for pictures without a single whole patch of logits.
    Source: Isola et al. 2017, arXiv:1611.07004, section 6.1.2; initial weights from N(0, 0.02).
    """

    def __init__(self, in_channels: int = 3, width: int = 64, layers: int = 3, norm_groups: int = 32) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers must be at least 1, not {layers}")
        if (2 * width) % norm_groups:
            raise ValueError(f"width {width} times two is not divisible by norm_groups {norm_groups}")
        self.smallest = 3 * 2**layers  # pixels; the two last convolutions cut one off their maps each
        blocks: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        channels = width
        for level in range(1, layers + 1):
            wider = width * min(2**level, 8)
            stride = 2 if level < layers else 1
            blocks += [nn.Conv2d(channels, wider, 4, stride, 1, bias=False), nn.GroupNorm(norm_groups, wider)]
            blocks += [nn.LeakyReLU(0.2)]
            channels = wider
        blocks.append(nn.Conv2d(channels, 1, 4, 1, 1))
        self.blocks = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.GroupNorm):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        if min(images.shape[-2:]) < self.smallest:
            raise ValueError(
                f"pictures of {images.shape[-1]}x{images.shape[-2]} are too small for this discriminator: "
                f"at least {self.smallest}; take fewer layers"
            )
        return self.blocks(images)
