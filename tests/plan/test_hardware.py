"""The GPU table: found however it is written, consistent, and helpful about what it lacks."""

import pytest

from dsv3.errors import UserError
from dsv3.plan.display import gib, seconds, short
from dsv3.plan.hardware import GPUS, find_gpu


@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_is_found_however_it_is_written(name: str) -> None:
    for written in (name, name.lower(), name.replace("-", " "), name.replace("-", "")):
        assert find_gpu(written) is GPUS[name]


@pytest.mark.parametrize("name", GPUS)
def test_peaks_are_dense_and_links_ordered(name: str) -> None:
    gpu = GPUS[name]
    if gpu.fp8_flops is not None:
        assert gpu.fp8_flops == pytest.approx(2 * gpu.bf16_flops, rel=0.02)
    assert gpu.memory_bandwidth > gpu.nvlink_bandwidth > gpu.network_bandwidth > 1e9
    assert gpu.memory_bytes == gpu.memory_gib * 2**30


def test_unknown_names_list_what_is_known() -> None:
    with pytest.raises(UserError, match=r"no GPU 'H900' in the table; choose one of A100-80GB, H100, H800") as error:
        find_gpu("H900")
    assert all(name in str(error.value) for name in GPUS)


def test_peaks_are_refused_where_there_are_none() -> None:
    assert find_gpu("H100").peak_flops("fp8") == 1978.9e12
    with pytest.raises(UserError, match="A100-80GB has no FP8 tensor cores"):
        find_gpu("a100 80gb").peak_flops("fp8")
    with pytest.raises(UserError, match="'fp32' has no tensor-core peak"):
        find_gpu("H100").peak_flops("fp32")


def test_numbers_are_printed_in_their_units() -> None:
    assert short(671_026_419_200) == "671.03 B"
    assert short(70_272, "B") == "70.27 KB"
    assert short(250.457e9, "FLOP") == "250.46 GFLOP"
    assert short(999_999) == "1.00 M"
    assert (short(0, "B"), short(512), short(0.5)) == ("0 B", "512", "0.50")
    assert (gib(3 * 2**30), gib(60.5 * 2**30)) == ("3.00 GiB", "60.5 GiB")
    assert [seconds(x) for x in (1.38e-6, 0.02, 20.2, 7200, 4.9e6)] == [
        "1.38 us",
        "20.00 ms",
        "20.20 s",
        "2.00 h",
        "56.7 days",
    ]
