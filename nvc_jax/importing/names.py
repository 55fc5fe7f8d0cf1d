"""Where each tensor of a published checkpoint belongs in our parameter trees.

The rules go from our names to the published ones, so that our own model says which tensors, of
which shapes, a checkpoint must contain; nothing else is stored about it. Names are facts of the
released checkpoints of DCVC-RT, DCVC-DC (both microsoft/DCVC) and BRHVC (kwai/NVC).
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np


class Source(NamedTuple):
    """What one of our parameters is made of.

    Attributes:
      shapes: published name -> shape.
      build: their arrays, in that order -> our array.
    """

    shapes: dict[str, tuple[int, ...]]
    build: Callable[..., np.ndarray]


# Inside a block: our layer -> published layer. A name that ends in "/2" is a convolution of 2x2
# pixels with stride 2, ours a matrix behind `space_to_depth`.
_PLAIN = {"": "", "dense": "", "conv": ""}
_RT = _PLAIN | {
    "adaptor/dense": ".adaptor",
    "depth_in/dense": ".dc.0",
    "depth": ".dc.2",
    "depth_out/dense": ".dc.3",
    "point_in/dense": ".ffn.0",
    "point_out/dense": ".ffn.2",
}
_RT |= {f"block/{ours}": f".conv{theirs}" for ours, theirs in _RT.items() if theirs}
_RT |= {"patch/dense": ".down/2", "subpixel/dense": ".up.conv.0", "subpixel/conv": ".up.conv.0"}

_MIX = {
    "point_in/dense": ".conv1.0",
    "depth": ".depth_conv",
    "point_out/dense": ".conv2",
    "adaptor/dense": ".adaptor",
    "patch/dense": ".adaptor/2",
}
_DC = _PLAIN | _MIX | {f"mix/{ours}": f".block.0{theirs}" for ours, theirs in _MIX.items()}
_DC |= {
    "conv0/conv": ".conv1",
    "conv1/conv": ".conv2",
    "skip/dense": ".downsample",
    "up/subpixel/dense": ".subpel_conv.0",
    "conv/conv": ".conv",
    "skip/subpixel/dense": ".upsample.0",
    "subpixel/conv": ".0",
    "subpixel/dense": ".0",
}
_FFN = {"ffn/expand/dense": ".block.1.conv.0", "ffn/project/dense": ".block.1.conv.2"}
_GATED = {"ffn/expand/dense": ".block.1.conv", "ffn/project/dense": ".block.1.conv_out"}


def _unet(ours: str, theirs: str) -> list[tuple[str, str]]:
    return [
        *[(rf"{ours}/down{i}", rf"{theirs}.conv{i + 1}") for i in range(3)],
        (rf"{ours}/block(\d)", rf"{theirs}.context_refine.\1"),
        (rf"{ours}/subpixel1", rf"{theirs}.up3"),
        (rf"{ours}/up1", rf"{theirs}.up_conv3"),
        (rf"{ours}/subpixel0", rf"{theirs}.up2"),
        (rf"{ours}/up0", rf"{theirs}.up_conv2"),
    ]


def _every(ours: str, theirs: str, numbers: Mapping[int, int]) -> list[tuple[str, str]]:
    """Rules of a numbered series: our number -> theirs."""
    return [(ours.format(i), theirs.format(k)) for i, k in numbers.items()]


# Our module -> published module. The longest module that a rule names whole counts.
DCVC_RT_INTRA = [
    (r"encoder/patch", "enc.enc_1"),
    (r"encoder/latent", "enc.enc_2.6"),
    (r"encoder/blocks/block(\d)", r"enc.enc_2.\1"),
    (r"hyper_encoder/block", "hyper_enc.0"),
    *_every("hyper_encoder/down{}", "hyper_enc.{}", {0: 1, 1: 2}),
    (r"hyper_decoder/up([01])", r"hyper_dec.\1"),
    (r"hyper_decoder/block", "hyper_dec.2"),
    (r"prior_fusion/params", "y_prior_fusion.3"),
    (r"prior_fusion/blocks/block(\d)", r"y_prior_fusion.\1"),
    (r"spatial_prior_reduction", "y_spatial_prior_reduction"),
    *_every("spatial_prior_adaptors_{}", "y_spatial_prior_adaptor_{}", {0: 1, 1: 2, 2: 3}),
    (r"spatial_prior/params", "y_spatial_prior.3"),
    (r"spatial_prior/blocks/block(\d)", r"y_spatial_prior.\1"),
    (r"decoder/up", "dec.dec_1.0"),
    # Theirs count the upsampling too.
    *_every("decoder/blocks/block{}", "dec.dec_1.{}", {i: i + 1 for i in range(12)}),
    (r"decoder/pixels", "dec.dec_2"),
    (r"z_prior", "bit_estimator_z"),
    (r"q_scale_(enc|dec)", r"q_scale_\1"),
]

DCVC_RT_INTER = [
    (r"feature_adaptor_([ip])", r"feature_adaptor_\1"),
    (r"extractor_([12])/block(\d)", r"feature_extractor.conv\1.\2"),
    (r"encoder/patch", "encoder.conv1"),
    (r"encoder/blocks/block([01])", r"encoder.conv2.\1"),
    (r"encoder/blocks/block2", "encoder.conv3"),
    (r"encoder/latent", "encoder.down"),
    (r"hyper_encoder/block", "hyper_encoder.conv.0"),
    *_every("hyper_encoder/down{}", "hyper_encoder.conv.{}", {0: 1, 1: 2}),
    (r"hyper_decoder/up([01])", r"hyper_decoder.conv.\1"),
    (r"hyper_decoder/block", "hyper_decoder.conv.2"),
    (r"temporal_prior_encoder", "temporal_prior_encoder"),
    (r"prior_fusion/params", "y_prior_fusion.conv.3"),
    (r"prior_fusion/blocks/block(\d)", r"y_prior_fusion.conv.\1"),
    (r"spatial_prior/params", "y_spatial_prior.conv.2"),
    (r"spatial_prior/blocks/block(\d)", r"y_spatial_prior.conv.\1"),
    (r"decoder", "decoder"),
    (r"decoder/blocks/block(\d)", r"decoder.conv1.\1"),
    (r"decoder/feature", "decoder.conv2"),
    (r"recon_head_0/blocks/block(\d)", r"recon_generation_net.conv.\1"),
    (r"recon_head_0/pixels", "recon_generation_net.head"),
    (r"z_prior", "bit_estimator_z"),
    (r"q_(encoder|decoder|feature)/frame0", r"q_\1"),
    (r"q_recon_0", "q_recon"),
]

DCVC_DC_INTRA = [
    *_every("encoder/down{}", "enc.{}", {0: "enc_1.0", 1: "enc_2.0", 2: "enc_2.2"}),
    *_every("encoder/block{}", "enc.{}", {0: "enc_1.1", 1: "enc_2.1", 2: "enc_2.3"}),
    (r"encoder/latent", "enc.enc_2.4"),
    (r"hyper_encoder/block", "hyper_enc.0"),
    *_every("hyper_encoder/conv{}", "hyper_enc.{}", {0: 1, 1: 3}),
    (r"hyper_decoder/up([01])", r"hyper_dec.\1"),
    (r"hyper_decoder/block", "hyper_dec.2"),
    (r"fusion_(\d)", r"y_prior_fusion.\1"),
    (r"prior/adaptor(\d)", r"y_spatial_prior_adaptor_\1"),
    (r"prior/block(\d)", r"y_spatial_prior.\1"),
    *_every(
        "decoder/block{}", "dec.{}", dict(enumerate(("dec_1.0", "dec_1.2", "dec_1.4", "dec_2.0")))
    ),
    *_every(
        "decoder/up{}", "dec.{}", dict(enumerate(("dec_1.1", "dec_1.3", "dec_1.5", "dec_2.1")))
    ),
    *_unet("decoder/refine", "refine.0"),
    (r"decoder/pixels", "refine.1"),
    (r"z_prior", "bit_estimator_z"),
    (r"q_(encoder|decoder)", lambda m: f"q_{{}}_{m[1][:3]}"),
]

BRHVC = [
    *_every(
        r"flow/level(\d)/conv{}", r"optic_flow.moduleBasic.\1.conv{}", {i: i + 1 for i in range(5)}
    ),
    *_every("guess_feature/conv{}", "mv_ref_extracter.{}", {0: 0, 1: 2}),
    (r"motion_encoder/converge/conv(\d)", r"mv_encoder.fusion.conv\1.0"),
    (r"motion_encoder/converge/mix(\d)", r"mv_encoder.fusion.conv\1.2"),
    (r"motion_encoder/down([01])", r"mv_encoder.enc_1.\1"),
    (r"motion_encoder/state([01])", r"mv_encoder.dpb_conv.\1"),
    (r"motion_encoder/types/([ib]{2})", r"mv_encoder.dpb_adapter.adpater_\1"),
    (r"motion_encoder/out", "mv_encoder.enc_2"),
    *_every(
        "motion_hyper_encoder/conv{}", "mv_hyper_prior_encoder.{}", {i: 2 * i for i in range(5)}
    ),
    *_every("motion_hyper_decoder/conv{}", "mv_hyper_prior_decoder.{}", {0: 0, 1: 4, 2: 8}),
    *_every("motion_hyper_decoder/up{}", "mv_hyper_prior_decoder.{}", {0: 2, 1: 6}),
    *_every("motion_guess/conv{}", "mv_temporal_prior_encoder.{}", {i: 2 * i for i in range(4)}),
    (r"motion_types/([ib]{2})", r"mv_y_prior_fusion_LTA.adpater_\1"),
    (r"motion_fusion_(\d)", r"mv_y_prior_fusion.\1"),
    (r"motion_prior/adaptor(\d)", r"mv_y_spatial_prior_adaptor_\1"),
    (r"motion_prior/block(\d)", r"mv_y_spatial_prior.\1"),
    (r"motion_decoder/up([01])", r"mv_decoder.dec_2.\1"),
    (r"motion_decoder/fuse", "mv_decoder.ref_fusion"),
    *_every("motion_decoder/double{}", "mv_decoder.dec_{}.0", {0: 1, 1: 0}),
    *_every("motion_decoder/block{}", "mv_decoder.dec_{}.1", {0: 1, 1: 0}),
    (r"motion_decoder/flow(\d)", r"mv_decoder.adapter_\1"),
    (r"motion_z_prior", "bit_estimator_z_mv"),
    (r"q_motion_(encoder|decoder)", lambda m: f"mv_y_q_{{}}_{m[1][:3]}"),
    (r"feature_of_frame", "feature_adaptor_I"),
    (r"feature_of_feature", "feature_adaptor"),
    (r"layer_adaptor", "layer_feature_adaptor"),
    *_every("pyramid/conv{}", "feature_extractor.conv{}", {0: 1, 1: 2, 2: 3}),
    *_every("pyramid/res{}", "feature_extractor.res_block{}", {0: 1, 1: 2, 2: 3}),
    *_every("align/offset{}", "align.conv_offset.{}", {0: 0, 1: 2, 2: 4}),
    (r"align", "align.fusion"),
    (r"scale_fusion/up(\d)_res", r"context_fusion_net.res_block\1_up"),
    (r"scale_fusion/up(\d)", r"context_fusion_net.conv\1_up"),
    (r"scale_fusion/out(\d)_res", r"context_fusion_net.res_block\1_out"),
    (r"scale_fusion/out(\d)", r"context_fusion_net.conv\1_out"),
    (r"prior_context", "context3_fusion"),
    (r"encoder_fusion/guide(\d)", r"fb_context_fusion_Enc.pix_down\1"),
    (r"encoder_fusion/guide", "fb_context_fusion_Enc.pix_w_maker"),
    (r"encoder_fusion/maps(\d)", r"fb_context_fusion_Enc.adp\1"),
    (r"encoder_fusion/fuse(\d)", r"fb_context_fusion_Enc.fusion\1"),
    *_every("encoder/conv{}", "contextual_encoder.conv{}", {0: 1, 1: 2, 2: 3}),
    *_every("encoder/res{}", "contextual_encoder.res{}", {0: 1, 1: 2}),
    (r"encoder/latent", "contextual_encoder.conv4"),
    *_every(
        "hyper_encoder/conv{}", "contextual_hyper_prior_encoder.{}", {i: 2 * i for i in range(3)}
    ),
    *_every("hyper_decoder/conv{}", "contextual_hyper_prior_decoder.{}", {0: 0, 1: 4, 2: 8}),
    *_every("hyper_decoder/up{}", "contextual_hyper_prior_decoder.{}", {0: 2, 1: 6}),
    (r"z_prior", "bit_estimator_z"),
    *_every("temporal_prior/conv{}", "temporal_prior_encoder.{}", {0: 0, 1: 2}),
    (r"types/([ib]{2})", r"y_prior_fusion_adaptor_LTA.adpater_\1"),
    (r"fusion_(\d)", r"y_prior_fusion.\1"),
    (r"prior/adaptor(\d)", r"y_spatial_prior_adaptor_\1"),
    (r"prior/block(\d)", r"y_spatial_prior.\1"),
    # Theirs count from the coarsest level, which comes first on the decoder's side.
    *_every("decoder_fusion/pixels{}", "fb_context_fusion_Dec.pix_to_feat.{}", {0: 0, 1: 2}),
    *_every("decoder_fusion/latent{}", "fb_context_fusion_Dec.feat_up.{}", {0: 0, 1: 2}),
    *_every("decoder_fusion/guide{}", "fb_context_fusion_Dec.pix_up{}", {3: 1, 2: 2, 1: 3}),
    (r"decoder_fusion/guide", "fb_context_fusion_Dec.pix_w_maker"),
    *_every("decoder_fusion/maps{}", "fb_context_fusion_Dec.adp{}", {3: 1, 2: "2.0", 1: "3.0"}),
    *_every("decoder_fusion/fuse{}", "fb_context_fusion_Dec.fusion{}", {3: 1, 2: 2, 1: 3}),
    *_every("decoder/up{}", "contextual_decoder.up{}", {i: i + 1 for i in range(4)}),
    *_every("decoder/res{}", "contextual_decoder.res{}", {0: 1, 1: 2}),
    (r"decoder/join", "recon_generation_net.first_conv"),
    (r"decoder/pixels", "recon_generation_net.recon_conv"),
    *_unet("decoder/unet0", "recon_generation_net.unet_1"),
    *_unet("decoder/unet1", "recon_generation_net.unet_2"),
    (r"q_(encoder|decoder)", lambda m: f"y_q_{{}}_{m[1][:3]}"),
]


RULES = {
    "dcvc-rt-intra": (DCVC_RT_INTRA, _RT),
    "dcvc-rt-inter": (DCVC_RT_INTER, _RT),
    "brhvc-intra": (DCVC_DC_INTRA, _DC | _GATED),
    "brhvc": (BRHVC, _DC | _FFN),
}

CHAIN = [f"f{i}.h" for i in (1, 2, 3, 4)] + [f"f{i}.b" for i in (1, 2, 3, 4)]
CHAIN += [f"f{i}.a" for i in (1, 2, 3)]


def source(kind: str, path: str, shape: tuple[int, ...]) -> Source:
    """What a parameter of ours is made of.

    Args:
      kind: of checkpoint, a key of `RULES`.
      path: of the parameter, names joined by "/".
      shape: of the parameter.

    Raises:
      KeyError: no rule knows the parameter.
    """
    rules, layers = RULES[kind]
    module, _, leaf = path.rpartition("/")
    parts = module.split("/")
    for length in range(len(parts), 0, -1):
        whole = "/".join(parts[:length])
        for pattern, replacement in rules:
            if match := re.fullmatch(pattern, whole):
                theirs = replacement(match) if callable(replacement) else match.expand(replacement)
                return _source(theirs, layers, "/".join(parts[length:]), leaf, shape)
    raise KeyError(path)


def _source(theirs, layers, rest, leaf, shape) -> Source:
    if leaf == "chain":
        rows, channels, _ = shape
        names = [f"{theirs}.{part}" for part in CHAIN]
        return Source(
            dict.fromkeys(names, (rows, channels, 1, 1)),
            lambda *parts: np.stack([p[:, :, 0, 0] for p in parts], -1),
        )
    if leaf == "table":
        return Source({theirs: (*shape, 1, 1)}, lambda w: w[:, :, 0, 0])
    if leaf == "basic":
        return Source({theirs.format("basic"): (1, *shape, 1, 1)}, np.ravel)
    if leaf == "anchors":
        return Source({theirs.format("scale"): (*shape, 1, 1, 1)}, np.ravel)
    if leaf == "fusion_kernel":
        groups, i, o = shape
        return Source(
            {f"{theirs}.weight": (groups * o, i, 1, 1)},
            lambda w: w.reshape(groups, o, i).transpose(0, 2, 1),
        )
    if leaf == "fusion_bias":
        return Source({f"{theirs}.bias": shape}, lambda w: w)
    if theirs == "layer_feature_adaptor":
        names = [f"{theirs}.{i}." for i in range(shape[0])]
        if leaf == "bias":
            return Source({n + "bias": shape[1:] for n in names}, lambda *w: np.stack(w))
        _, i, o = shape
        return Source(
            {n + "weight": (o, i, 1, 1) for n in names},
            lambda *w: np.stack([k[:, :, 0, 0].T for k in w]),
        )
    layer, _, patch = layers[rest].partition("/")
    if leaf == "bias":
        return Source({f"{theirs}{layer}.bias": shape}, lambda w: w)
    name = f"{theirs}{layer}.weight"
    if len(shape) == 4:  # rows, columns, input, output
        return Source({name: shape[3:1:-1] + shape[:2]}, lambda w: w.transpose(2, 3, 1, 0))
    if len(shape) == 3:  # depth-wise
        return Source({name: (shape[2], 1, *shape[:2])}, lambda w: w[:, 0].transpose(1, 2, 0))
    # A matrix from (input, row, column), as `space_to_depth` orders them.
    side = int(patch or 1)
    i, o = shape[0] // side**2, shape[1]
    return Source({name: (o, i, side, side)}, lambda w: w.reshape(o, -1).T)
