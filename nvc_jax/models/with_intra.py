"""Codecs of predicted frames together with the intra codec that their first frames come from.

UI2C does without an intra codec; DCVC-RT (arXiv 2502.20762) and BRHVC (arXiv 2511.08938) do not.
"""

from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from nvc_jax.models import brhvc, dcvc_dc, hem, intra, ui2c

MODULES = {
    intra.Config: intra.Intra,
    dcvc_dc.Config: dcvc_dc.Intra,
    ui2c.Config: ui2c.UI2C,
    brhvc.Config: brhvc.BFrame,
    hem.Config: hem.PFrame,
}
# Coding orders; of B-frames in groups without a row here.
SCHEDULES = {ui2c.Config: "low_delay_refresh", hem.Config: "low_delay"}


@dataclass(frozen=True)
class Config:
    """Configs of both codecs."""

    intra: Any
    inter: Any


DCVC_RT_SIZES = {"full": Config(intra.SIZES["full"], ui2c.SIZES["dcvc_rt"])}
# Without the exact mode's networks, which B-frames do not have.
BRHVC_SIZES = {
    "full": Config(dcvc_dc.SIZES["full"], brhvc.SIZES["full"]),
    "small": Config(intra.SIZES["dev"], brhvc.SIZES["small"]),
    "nano": Config(replace(intra.SIZES["nano"], scale_head=0), brhvc.SIZES["nano"]),
}
LIGHT_SIZES = {name: Config(intra.SIZES["light"], inter) for name, inter in hem.SIZES.items()}


class WithIntra(nn.Module):
    """The pair. Units without references are coded by `intra`, all others by `inter`."""

    cfg: Config
    dtype: Any = jnp.float32

    frames_per_unit = 1

    @property
    def _inter(self):
        """The class of the codec of predicted frames: its constants, outside of a program."""
        return MODULES[type(self.cfg.inter)]

    @property
    def references(self) -> int:
        return self._inter.references

    @property
    def refers_to_pictures(self) -> bool:
        return self._inter.refers_to_pictures

    @property
    def schedule(self) -> str:
        return SCHEDULES.get(type(self.cfg.inter), "hierarchical")

    @property
    def searches(self) -> bool:
        """Whether the inter codec searches motion, see `search`."""
        return getattr(self._inter(self.cfg.inter, parent=None), "searches", False)

    @property
    def qp_rows(self) -> int:
        return self._inter.qp_rows

    @property
    def rgb(self) -> bool:
        return MODULES[type(self.cfg.intra)](self.cfg.intra, parent=None).rgb

    def setup(self):
        c = self.cfg
        self.intra = MODULES[type(c.intra)](c.intra, self.dtype)
        self.inter = self._inter(c.inter, self.dtype)

    def start(self, frame):
        """What the inter codec may refer to of a picture [batch, height, width, 3]."""
        return self._inter.start(frame)

    def complete(self, refs, unit, height, width, exact=False):
        """See `nvc_jax.models.ui2c.UI2C.complete`. Without references: ()."""
        if not refs:
            return ()
        inter = self._inter(self.cfg.inter, self.dtype, parent=None)
        return inter.complete(refs, unit, height, width, exact)

    def motion(self, a, b):
        """Of inter codecs that look for motion: see `nvc_jax.models.brhvc.BFrame.motion`."""
        return self.inter.motion(a, b)

    def search(self, frame, ref, qp):
        """Of inter codecs that search motion: see `nvc_jax.models.light.Light.search`."""
        return self.inter.search(frame, ref, qp)

    def __call__(self, frames, refs, qp, bottleneck):
        """Codes one frame: arguments and results as those of both codecs.

        A qp beyond the intra codec's range counts as its highest.
        """
        if refs:
            recon, (ref,) = self.inter(frames, refs, qp, bottleneck)
            if ref.frame is None:
                ref = ref._replace(frame=jnp.clip(recon[:, 0], 0, 1))
            return recon, (ref,)
        recon, _ = self.intra(frames, (), jnp.minimum(qp, self.intra.qp_rows - 1), bottleneck)
        return recon, (self.inter.start(jnp.clip(recon[:, 0], 0, 1)),)
