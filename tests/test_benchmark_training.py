"""The benchmark of training steps, small, and that what it compares with computes the same."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from conftest import SIZES, random_parameters
from test_training import config_of, folder, stage, toy_codec, write_config  # noqa: F401

from nvc_jax.benchmarks.training import as_plain_convolutions, benchmark, emulated
from nvc_jax.entropy.bottleneck import Estimate
from nvc_jax.errors import NvcError
from nvc_jax.models import registry


def test_plain_convolutions_compute_the_same():
    model = registry.build("intra", SIZES["intra"])
    params = random_parameters(model)
    frames = np.random.default_rng(0).uniform(0, 1, (2, 1, 32, 48, 3)).astype(np.float32)
    qp = np.array([[10], [50]])

    def code():
        return model.apply({"params": params}, frames, (), qp, Estimate())[0]

    ours, text = code(), str(jax.make_jaxpr(lambda: code())())
    with nn.intercept_methods(as_plain_convolutions):
        np.testing.assert_allclose(code(), ours, atol=0.02)
        plain = str(jax.make_jaxpr(lambda: code())())  # a new function, nothing is kept
    assert "feature_group_count=16" in plain and "feature_group_count=16" not in text


@pytest.mark.slow
def test_the_benchmark(folder, tmp_path, capsys):  # noqa: F811
    file = str(write_config(tmp_path / "config.py", config_of(folder, stage(6))))
    results = benchmark(file, None, 0, 2, [], True)
    printed = capsys.readouterr().out
    for name in (
        "steps_per_second_resident", "real_data_share", "share_of_a_matrix_product",
        "plain_convolutions_times_slower",
    ):  # fmt: skip
        assert results[name] > 0 and name in printed
    with pytest.raises(NvcError, match="has stages 0 to 0"):
        benchmark(file, None, 7, 2, [], False)
    taught = stage(6, teacher=dict(weights="previous", recon=1.0), lr_scale=dict(prior=0.0))
    file = str(write_config(tmp_path / "config.py", config_of(folder, stage(6), taught)))
    results = benchmark(file, None, 1, 2, [], False)
    assert results["steps_per_second_resident"] > 0 and "tflop_per_step" not in results


@pytest.mark.slow
def test_devices_are_emulated_by_a_process_of_its_own(folder, tmp_path):  # noqa: F811
    model = dict(name="intra", size=SIZES["intra"], dtype="float32")
    config = config_of(folder, stage(6), stage(6, batch=3), model=model)
    file = str(write_config(tmp_path / "config.py", config))
    assert emulated(file, None, 0, 1, 2) > 0
    with pytest.raises(NvcError, match="multiple of the 2 devices"):
        emulated(file, None, 1, 1, 2)
