"""Tests of the choice of float32 where a processor emulates the dtype that was asked for."""

from __future__ import annotations

import logging

import pytest
import torch

from ldm.processor import quick_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("dtype", "probe"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_quick_dtype_is_float32_where_the_processor_emulates(
    dtype: torch.dtype, probe: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    for supported, expected in ((True, dtype), (False, torch.float32)):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{probe}_supported", lambda supported=supported: supported)
        assert quick_dtype(dtype, CPU, "--precision x") == expected
        assert quick_dtype(dtype, GPU, "--precision x") == dtype
        assert quick_dtype(torch.float32, CPU, "--precision x") == torch.float32
    assert [record.message.partition(",")[0] for record in caplog.records] == [
        "--precision x: this processor has to emulate it"
    ]
